"""NetworkPolicies that are enforced in the lab: kube-network-policies, compiled from its Go module, by its own manifest.

Its program decides on each first packet of a connection, which the kernel hands to it by a queue. It asks for that by the
`queue` expression of nftables. A kernel may lack it (CONFIG_NFT_QUEUE) and yet have the target NFQUEUE of iptables, which
leads to the same queue: so the rules that lead there are made here, with the exceptions of its own ones. Where the kernel
has both, a packet is asked about twice, with one answer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from lab import cluster, images, programs
from lab.settings import HOME, KUBECONFIG, SOURCE, fail, need_root, out, say, sh

VERSION = "v0.8.0"
"""As in build/kube-network-policies/go.mod."""
MANIFEST = HOME / "kube-network-policies" / VERSION / "install.yaml"
IMAGE = f"localhost/kube-network-policies:{VERSION}"
QUEUE = 98
"""As in that manifest."""
CHAIN = "LAB-POLICIES"
RULES = (
    "--match owner --uid-owner 0 --jump RETURN",  # the kubelet's probes, and what the API server asks of pods
    "--match conntrack --ctstate ESTABLISHED,RELATED --jump RETURN",
    f"--jump NFQUEUE --queue-num {QUEUE}",
)
SECONDS = 120


def ensure() -> None:
    """Compiles the program and copies its manifest into the cache, where they are missing."""
    programs.ensure(("netpol",))
    if MANIFEST.exists():
        return
    environment = os.environ | {"GOFLAGS": "-mod=mod"}
    folder = SOURCE / "build/kube-network-policies"
    module = out("go", "mod", "download", "-json", "sigs.k8s.io/kube-network-policies", cwd=folder, env=environment)
    MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    unfinished = MANIFEST.with_name(f".install.{os.getpid()}")
    shutil.copyfile(Path(json.loads(module)["Dir"]) / "install.yaml", unfinished)
    unfinished.rename(MANIFEST)


def on() -> None:
    """From now on the lab's node lets no packet pass that a policy forbids."""
    need_root()
    if not cluster.is_up():
        fail("the lab is down; start it with `make lab-up`")
    ensure()
    images.load_program(IMAGE, "netpol", "netpol")
    cluster.kubectl("apply", "--server-side", "-f", "-", input=manifest(), text=True, stdout=subprocess.DEVNULL)
    wait = ("rollout", "status", "daemonset/kube-network-policies", f"--timeout={SECONDS}s")
    cluster.kubectl("--namespace", "kube-system", *wait, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + SECONDS
    while not _listens():
        if time.monotonic() > limit:
            cluster.kubectl("--namespace", "kube-system", "logs", "daemonset/kube-network-policies", "--tail=30")
            fail(f"kube-network-policies does not listen on queue {QUEUE}; its log is above")
        time.sleep(0.1)
    _forget_rules()
    inside("iptables", "--wait", "--table", "mangle", "--new-chain", CHAIN)
    for rule in RULES:
        inside("iptables", "--wait", "--table", "mangle", "--append", CHAIN, *rule.split())
    inside("iptables", "--wait", "--table", "mangle", "--append", "POSTROUTING", "--jump", CHAIN)
    say(f"kube-network-policies {VERSION}: policies are enforced")


def off() -> None:
    """Lets every packet pass again."""
    need_root()
    _forget_rules()
    delete = ("delete", "--ignore-not-found", "--wait=false", "-f", "-")
    cluster.kubectl(*delete, input=manifest(), text=True, stdout=subprocess.DEVNULL)
    say("policies are not enforced any more")


def inside(*command: object, check: bool = True) -> None:
    """Runs a command in the node's network, and in its mounts, which are those of this machine but for /run and /proc."""
    if check:
        sh(*nsenter(*command))
    else:
        subprocess.run(nsenter(*command), stderr=subprocess.DEVNULL)


def nsenter(*command: object) -> list[str]:
    return ["nsenter", f"--target={cluster.state()['init']}", "--net", "--mount", "--pid", "--", *map(str, command)]


def manifest() -> str:
    """The project's own, but for its image, and what this node has not: NRI of containerd 1.7, and that bug of old kernels."""
    objects = _objects(MANIFEST)
    (daemons,) = [found for found in objects if found["kind"] == "DaemonSet"]
    spec = daemons["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    _, *arguments = container["args"]
    assert f"--nfqueue-id={QUEUE}" in arguments
    container |= {"image": IMAGE, "imagePullPolicy": "Never", "volumeMounts": []}
    container["args"] = [*arguments, "--disable-nri=true", "--netfilter-bug-1766-fix=false"]
    spec["volumes"] = []
    spec["terminationGracePeriodSeconds"] = 1
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


def _objects(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file, which kubectl reads: Python alone has no YAML."""
    kubectl = (programs.path("kubectl"), f"--kubeconfig={KUBECONFIG}")
    text = out(*kubectl, "create", "--dry-run=client", "--output=json", "-f", path)
    found, decoder = [], json.JSONDecoder()
    while text := text.strip():
        document, end = decoder.raw_decode(text)
        found += document["items"] if document["kind"] == "List" else [document]
        text = text[end:]
    return found


def _listens() -> bool:
    queues = Path(f"/proc/{cluster.state()['init']}/net/netfilter/nfnetlink_queue").read_text()
    return any(line.split()[0] == str(QUEUE) for line in queues.splitlines())


def _forget_rules() -> None:
    for words in (
        ("--delete", "POSTROUTING", "--jump", CHAIN),
        ("--flush", CHAIN),
        ("--delete-chain", CHAIN),
    ):
        inside("iptables", "--wait", "--table", "mangle", *words, check=False)
