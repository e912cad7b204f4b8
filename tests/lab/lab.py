#!/usr/bin/env python3
"""A real Kubernetes on one Linux machine, from Go modules and Debian packages.

lab.py up                    start the single-node cluster and wait until it is ready (idempotent)
lab.py up --control-plane    only etcd, API server and controller manager, as ordinary processes: no root
lab.py status                programs with their memory, nodes and pods
lab.py down [--purge]        stop everything; --purge removes images, keys and logs too
lab.py kubeconfig            print the path of the administrator's kubeconfig
lab.py run COMMAND ...       run a command with the lab's KUBECONFIG, kubectl and helm
lab.py build [PROGRAM ...]   compile the programs into the cache (`up` does so when they are missing)
lab.py base                  make the base image localhost/python:3.11
lab.py image TAG FOLDER ...  build a Dockerfile (further options go to buildah) and load it into the node
lab.py deploy                build the project's images, load them, install the operator: what has changed
lab.py deploy --replicas     the image of rollout replicas too, with vLLM of tests/real_vllm
lab.py kueue                 install Kueue, by its own chart
lab.py policies [off]        enforce NetworkPolicies, by kube-network-policies
lab.py claims [off]          offer devices by claims (DRA), by Kubernetes' own test driver
lab.py load TAG ...          load images that were built before into the node
lab.py extend NAME=COUNT     advertise a resource on the node, for example nvidia.com/gpu=4
lab.py kill PROGRAM [SIGNAL] signal one of the node's programs; it is started again

Everything is kept under $NEMO_RL_LAB_HOME (default ~/.cache/nemo-rl/lab); $NEMO_RL_LAB_PORT (16443) is the API
server's port on 127.0.0.1. Set both to run a second lab beside the first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# as a script, this file's own folder comes first in the path, where `lab` would be this file
sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab import (  # noqa: E402
    cluster,
    control_plane_process,
    deploy,
    dra,
    forward,
    images,
    kueue,
    network_policies,
    node,
    programs,
)
from lab.settings import CONTROL_PLANE, KUBECONFIG, LabError, fail, say  # noqa: E402


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name in ("up", "down", "status", "kubeconfig"):
        verbs.add_parser(name).add_argument("--control-plane", action="store_true")
    verbs.choices["down"].add_argument("--purge", action="store_true")
    verbs.add_parser("run").add_argument("command", nargs=argparse.REMAINDER)
    verbs.add_parser("build").add_argument("programs", nargs="*")
    verbs.add_parser("base")
    verbs.add_parser("deploy").add_argument("--replicas", action="store_true")
    verbs.add_parser("kueue")
    verbs.add_parser("policies").add_argument("state", nargs="?", default="on", choices=("on", "off"))
    verbs.add_parser("claims").add_argument("state", nargs="?", default="on", choices=("on", "off"))
    builder = verbs.add_parser("image")
    builder.add_argument("tag")
    builder.add_argument("folder")
    verbs.add_parser("load").add_argument("tags", nargs="+")
    verbs.add_parser("extend").add_argument("assignment")
    killer = verbs.add_parser("kill")
    killer.add_argument("program")
    killer.add_argument("signal", nargs="?", default="KILL")
    verbs.add_parser("_node")
    verbs.add_parser("_forward").add_argument("init", type=int)
    verbs.add_parser("_control-plane")
    given, rest = parser.parse_known_args(arguments)
    if rest and given.verb != "image":
        parser.error(f"unknown: {' '.join(rest)}")
    return given, rest


def main() -> None:
    given, rest = parse(sys.argv[1:])
    try:
        run(given, rest)
    except LabError as error:
        fail(str(error))


def run(given: argparse.Namespace, rest: list[str]) -> None:
    if getattr(given, "control_plane", False):
        getattr(control_plane_process, given.verb)()
        return
    match given.verb:
        case "up":
            cluster.up()
        case "down":
            cluster.down(given.purge)
        case "status":
            cluster.status()
        case "kubeconfig":
            say(KUBECONFIG)
        case "run":
            cluster.run(given.command)
        case "build":
            programs.build(given.programs or programs.PROGRAMS)
        case "base":
            images.make_base()
        case "image":
            images.build(given.tag, given.folder, rest)
        case "deploy":
            deploy.deploy(replicas=given.replicas)
        case "kueue":
            kueue.install()
        case "policies":
            network_policies.on() if given.state == "on" else network_policies.off()
        case "claims":
            dra.on() if given.state == "on" else dra.off()
        case "load":
            for tag in given.tags:
                images.load(tag)
        case "extend":
            cluster.extend(given.assignment)
        case "kill":
            cluster.kill(given.program, given.signal)
        case "_node":
            node.run()
        case "_forward":
            forward.run(given.init)
        case "_control-plane":
            control_plane_process.supervise(CONTROL_PLANE)


if __name__ == "__main__":
    main()
