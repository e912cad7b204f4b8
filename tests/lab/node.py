"""The node: process 1 of its own PID, mount, network, UTS and IPC namespaces, which starts and restarts every program.

When it ends, the kernel ends all that is in these namespaces and drops their mounts, links and iptables rules.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

from lab import components
from lab.settings import CGROUP, HOSTPATH_PV, LOGS, NODE, NODE_IP, NODE_NET, PKI, RUN, SOCKET, STORE, out, sh

CGROUPS = Path("/sys/fs/cgroup")


def run() -> None:
    """Runs until SIGTERM, and then ends with everything in its namespaces."""
    stopping: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prepare_cgroup()
    _prepare_mounts()
    _prepare_network()
    socket.sethostname(NODE)
    _forget_old_containers()
    supervisor = Supervisor()
    while not stopping:
        supervisor.step()
        _open_new_volumes()
        time.sleep(0.05 if supervisor.waiting else 0.2)
    supervisor.stop()
    os._exit(0)


class Supervisor:
    """Keeps the programs running; reaps what containers leave behind."""

    def __init__(self) -> None:
        self.commands = components.commands()
        self.running: dict[str, int] = {}
        self.started: dict[str, float] = {}
        self.restart_at: dict[str, float] = {}
        self.waiting = [name for name in self.commands if name not in components.FIRST]
        for name in components.FIRST:
            self.start(name)

    def start(self, name: str) -> None:
        with open(LOGS / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                self.commands[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.running[name], self.started[name] = process.pid, time.monotonic()
        (RUN / "components.json").write_text(json.dumps(self.running))

    def step(self) -> None:
        if self.waiting and ready("127.0.0.1", 6443):
            for name in self.waiting:
                self.start(name)
            self.waiting = []
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) > 0:
                for name in [n for n, p in self.running.items() if p == pid]:
                    del self.running[name]
                    self.restart_at[name] = max(time.monotonic() + 0.5, self.started[name] + 2)
        for name in [n for n, at in self.restart_at.items() if time.monotonic() >= at]:
            del self.restart_at[name]
            self.start(name)

    def stop(self) -> None:
        for name in components.STOP_ORDER:
            if name in self.running:
                os.kill(self.running[name], signal.SIGTERM)
        time.sleep(0.2)


def ready(host: str, port: int) -> bool:
    """Whether the API server says that it is ready."""
    context = ssl.create_default_context(cafile=str(PKI / "ca.crt"))
    context.load_cert_chain(PKI / "admin.crt", PKI / "admin.key")
    try:
        connection = http.client.HTTPSConnection(host, port, timeout=3, context=context)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def ctr(*words: object) -> list[str]:
    return ["ctr", "-a", str(SOCKET), "-n", "k8s.io", *map(str, words)]


def cgroup_roots() -> list[Path]:
    """The hierarchies of cgroup v1, or the single one of v2."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [p for p in CGROUPS.iterdir() if p.is_dir() and not p.is_symlink() and (p / "cgroup.procs").exists()]


def _prepare_cgroup() -> None:
    """The node's own processes go to CGROUP/node, its pods to CGROUP/kubepods."""
    for root in cgroup_roots():
        for folder in (root / CGROUP, root / CGROUP / "node"):
            folder.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                # empty in a new v1 cpuset: no process could enter
                parent = folder.parent / name
                if (folder / name).exists() and parent.exists() and not (folder / name).read_text().strip():
                    with contextlib.suppress(OSError):
                        (folder / name).write_text(parent.read_text())
        (root / CGROUP / "node/cgroup.procs").write_text("0")
        if root == CGROUPS:
            _delegate(root / CGROUP)


def _delegate(folder: Path) -> None:
    """cgroup v2: what the root has is handed down, or the kubelet could not limit its pods."""
    for parent in (folder.parent, folder):
        controllers = (parent / "cgroup.controllers").read_text().split()
        with contextlib.suppress(OSError):
            (parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))


def _prepare_mounts() -> None:
    """Private folders where the programs' paths are fixed, and a /sys that shows this network namespace."""
    stash = RUN / "stash"
    stash.mkdir(parents=True, exist_ok=True)
    sh("mount", "--rbind", CGROUPS, stash)
    sh("mount", "-t", "sysfs", "sysfs", "/sys")
    sh("mount", "--rbind", stash, CGROUPS)
    sh("umount", "--lazy", stash)
    sh("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for folder in ("/run/netns", "/run/lock"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    private = {Path("/var/log"): "varlog", Path("/var/lib/cni"): "varlibcni", HOSTPATH_PV: "volumes"}
    for place, name in private.items():
        for folder in (RUN / name, place):
            folder.mkdir(parents=True, exist_ok=True)
        sh("mount", "--bind", RUN / name, place)
    # last, or the unmounting above would spread; the kubelet wants shared propagation among the node's own mounts
    sh("mount", "--make-rshared", "/")


def _prepare_network() -> None:
    """A pair of virtual Ethernet devices, both ends here: a node address and a default route that lead nowhere."""
    bits = NODE_NET.split("/")[1]
    for line in (
        "link set lo up",
        "link add node0 type veth peer name nowhere0",
        f"address add {NODE_IP}/{bits} dev node0",
        "link set node0 up",
        "link set nowhere0 up",
        "route add default dev node0",
    ):
        sh("ip", *line.split())
    for name in ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables"):
        if (Path("/proc/sys") / name).exists():
            (Path("/proc/sys") / name).write_text("1")


def _forget_old_containers() -> None:
    """After a crash or `down`, the store still lists the last cluster's containers: remove them, keep the images."""
    if not (STORE / "io.containerd.metadata.v1.bolt/meta.db").exists():
        return
    command = ["containerd", "--config", f"{RUN}/containerd.toml"]
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemon = subprocess.Popen(command, **silent)  # type: ignore[call-overload]
    limit = time.monotonic() + 20
    while subprocess.run(ctr("version"), capture_output=True).returncode and time.monotonic() < limit:
        time.sleep(0.05)
    old = out(*ctr("containers", "ls", "-q")).split()
    for batch in range(0, len(old), 50):
        subprocess.run(ctr("containers", "rm", *old[batch : batch + 50]), capture_output=True)
    daemon.terminate()
    daemon.wait()
    for name in ("sandboxes", "containers"):
        shutil.rmtree(STORE / "io.containerd.grpc.v1.cri" / name, ignore_errors=True)


def _open_new_volumes() -> None:
    """The host-path provisioner makes folders of mode 0750 owned by root; pods run as anyone."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(HOSTPATH_PV):
            if entry.stat().st_mode & 0o777 != 0o777:
                os.chmod(entry.path, 0o777)
