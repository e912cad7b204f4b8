"""Where the lab keeps its files, and the addresses and names that its parts agree on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

SOURCE = Path(__file__).resolve().parent
HOME = Path(os.environ.get("NEMO_RL_LAB_HOME") or Path.home() / ".cache/nemo-rl/lab").resolve()
BIN = HOME / "bin"
CNI_BIN = HOME / "cni"
PKI = HOME / "pki"
RUN = HOME / "run"
"""State of the running cluster; made by `up`, removed by `down`."""
LOGS = HOME / "logs"
STORE = HOME / "containerd"
"""Images; they outlive `down`."""
BUILDER = HOME / "buildah"
TEMPORARY = HOME / "tmp"
SOCKET = RUN / "containerd.sock"
KUBECONFIG = HOME / "kubeconfig"
STATE = RUN / "lab.json"
CONTROL_PLANE = HOME / "control-plane"

HOST_PORT = int(os.environ.get("NEMO_RL_LAB_PORT", "16443"))
NODE = os.environ.get("NEMO_RL_LAB_NODE", "lab-node")
NODE_IP = "10.88.0.10"
NODE_NET = "10.88.0.0/24"
POD_CIDR = "10.244.0.0/24"
SERVICE_CIDR = "10.96.0.0/16"
KUBERNETES_IP = "10.96.0.1"
DNS_IP = "10.96.0.10"
CLUSTER_DOMAIN = "cluster.local"
CGROUP = f"nemo-rl-lab-{HOST_PORT}"
PAUSE_IMAGE = "localhost/pause:lab"
COREDNS_IMAGE = "localhost/coredns:lab"
BASE_IMAGE = "localhost/python:3.11"
HOSTPATH_PV = Path("/tmp/hostpath_pv")
"""Fixed in the controller manager's provisioner; the node sees a folder of RUN there."""


class LabError(Exception):
    """What went wrong, and what to do about it."""


def say(*words: object) -> None:
    print(*words, flush=True)


def fail(message: str) -> NoReturn:
    sys.exit(f"lab: {message}")


def sh(*command: object, **options: Any) -> subprocess.CompletedProcess[Any]:
    return subprocess.run([str(c) for c in command], check=True, **options)


def out(*command: object, **options: Any) -> str:
    return str(sh(*command, stdout=subprocess.PIPE, text=True, **options).stdout)


# program -> Debian package that has it
NODE_PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "unshare": "util-linux",
    "openssl": "openssl",
}
IMAGE_PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}


def need(packages: dict[str, str]) -> None:
    """Installs the Debian packages of programs that are missing; says what to do where it may not."""
    missing = sorted({package for program, package in packages.items() if not shutil.which(program)})
    if not missing:
        return
    cure = f"apt-get install {' '.join(missing)}"
    if os.geteuid() != 0:
        fail(f"missing programs; run as root: {cure}")
    if not shutil.which("apt-get"):
        fail(f"missing programs, and no apt-get here; install with your package manager: {' '.join(missing)}")
    say(f"installing {' '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
    ):
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
            fail(f"`{' '.join(command)}` failed; install by hand: {cure}")


def need_root() -> None:
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        fail("a node needs root on Linux; without it use `up --control-plane`, or set KUBECONFIG to a cluster")
