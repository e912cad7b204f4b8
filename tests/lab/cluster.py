"""Bringing the single-node cluster up and down, and asking how it is."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lab import components, images, programs
from lab.node import cgroup_roots, ctr, ready
from lab.settings import (
    BIN,
    BUILDER,
    CGROUP,
    HOME,
    HOST_PORT,
    HOSTPATH_PV,
    KUBECONFIG,
    LOGS,
    NODE,
    NODE_PACKAGES,
    PKI,
    RUN,
    SOURCE,
    STATE,
    STORE,
    TEMPORARY,
    fail,
    need,
    need_root,
    say,
    sh,
)

# the kubelet sets these for the whole machine
SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
UP_SECONDS = 120
SCRIPT = str(SOURCE / "lab.py")
NAMESPACES = ["--mount", "--propagation", "private", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
COREDNS = "/apis/apps/v1/namespaces/kube-system/deployments/coredns"


def up() -> None:
    """Starts the cluster and waits for a Ready node and DNS; a cluster that is up already is only checked."""
    need_root()
    if is_up():
        say(f"up already\nexport KUBECONFIG={KUBECONFIG}")
        return
    need(NODE_PACKAGES)
    programs.ensure(programs.NODE)
    _clean(state())
    begin = time.monotonic()
    components.make_keys()
    components.write_files()
    _fresh_logs()
    STORE.mkdir(parents=True, exist_ok=True)
    outer, forwarder = _start()

    def until(what: str, check: Callable[[], Any]) -> None:
        limit = time.monotonic() + UP_SECONDS
        while not check():
            if outer.poll() is not None or forwarder.poll() is not None:
                fail(f"{what}: a process ended (is port {HOST_PORT} taken? set NEMO_RL_LAB_PORT); see {LOGS}")
            if time.monotonic() > limit:
                fail(f"{what}: not within {UP_SECONDS} s; see {LOGS}")
            time.sleep(0.05)
        say(f"{time.monotonic() - begin:6.2f} s  {what}")

    until("API server ready", lambda: ready("127.0.0.1", HOST_PORT))
    until("containerd answers", lambda: not subprocess.run(ctr("version"), capture_output=True).returncode)
    images.load_own()
    kubectl("apply", "-f", SOURCE / "manifests", stdout=subprocess.DEVNULL)
    until("node ready", _node_ready)
    until("DNS available", lambda: (get(COREDNS) or {}).get("status", {}).get("availableReplicas"))
    say(f"export KUBECONFIG={KUBECONFIG}")


def _fresh_logs() -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    for log in LOGS.iterdir():
        log.unlink()


def _start() -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """The node in its namespaces, and the forwarder from the host to it; both are recorded for `down`."""
    sysctls = {name: (Path("/proc/sys") / name).read_text().strip() for name in SYSCTLS}
    with open(LOGS / "node.log", "ab") as log:
        outer = subprocess.Popen(
            ["unshare", *NAMESPACES, "--mount-proc", sys.executable, SCRIPT, "_node"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    init = None
    while init is None:
        if outer.poll() is not None:
            fail(f"the node did not start; see {LOGS}/node.log")
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        # the child shares unshare's name until it has become the script
        init = next((int(c) for c in children if _alive(int(c), "_node")), None)
        time.sleep(0.01)
    with open(LOGS / "forward.log", "ab") as log:
        forwarder = subprocess.Popen(
            [sys.executable, SCRIPT, "_forward", str(init)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    recorded = {"outer": outer.pid, "init": init, "forward": forwarder.pid, "sysctls": sysctls}
    STATE.write_text(json.dumps(recorded))
    return outer, forwarder


def down(purge: bool) -> None:
    """Ends everything and leaves no trace but the cache: programs, keys, logs and images; purge takes those too."""
    _clean(state())
    KUBECONFIG.unlink(missing_ok=True)
    if purge:
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        # the image builder keeps its folder mounted, and a failed build its container
        for point in reversed(points):
            if point.startswith(f"{HOME}/"):
                sh("umount", point)
        for folder in (STORE, PKI, LOGS, BUILDER, TEMPORARY):
            shutil.rmtree(folder, ignore_errors=True)
    say("down")


def state() -> dict[str, Any]:
    try:
        return dict(json.loads(STATE.read_text()))
    except (OSError, ValueError):
        return {}


def is_up() -> bool:
    return _alive(state().get("init", 0), "_node") and _alive(state().get("forward", 0), "_forward")


def status() -> None:
    """Prints programs with their memory, and the nodes and pods; exit code 1 when the lab is down."""
    recorded = state()
    if not is_up():
        fail("the lab is down; start it with `make lab-up`")
    inner = _inner_pids(recorded["init"])
    rows = {name: inner.get(pid) for name, pid in json.loads((RUN / "components.json").read_text()).items()}
    rows |= {"supervisor": recorded["init"], "forwarder": recorded["forward"]}
    say(f"{'program':26}{'pid':>8}{'RSS MiB':>10}")
    for name, pid in rows.items():
        say(f"{name:26}{pid or '-':>8}{_resident(pid) if pid else 0:>10}")
    say(f"{'sum':26}{'':8}{sum(_resident(pid) for pid in rows.values() if pid):>10}")
    kubectl("get", "nodes,pods", "-A", "-o", "wide")


def kill(program: str, name: str) -> None:
    """Signals one program; the supervisor starts it again."""
    running = json.loads((RUN / "components.json").read_text())
    if program not in running:
        fail(f"no program {program}; there are: {', '.join(running)}")
    number = getattr(signal, "SIG" + name.upper().removeprefix("SIG"))
    os.kill(_inner_pids(state()["init"])[running[program]], number)


def extend(assignment: str) -> None:
    """Advertises a resource on the node, as a device plugin would: nvidia.com/gpu=4."""
    resource, _, count = assignment.partition("=")
    where = "/status/capacity/" + resource.replace("~", "~0").replace("/", "~1")
    patch = json.dumps([{"op": "add", "path": where, "value": count}])
    kubectl("patch", "node", NODE, "--subresource=status", "--type=json", "-p", patch)
    limit = time.monotonic() + 30
    while _allocatable(resource) != count:
        if time.monotonic() > limit:
            fail(f"the node does not offer {assignment} after 30 s")
        time.sleep(0.1)


def run(command: Sequence[str]) -> NoReturn:
    """Becomes the command, with the lab as its cluster and the lab's programs ahead of others."""
    if not is_up():
        fail("the lab is down; start it with `make lab-up`")
    if not command:
        fail("no command; for example `lab.py run kubectl get pods -A`")
    found = os.environ | {"KUBECONFIG": str(KUBECONFIG), "PATH": f"{BIN}:{os.environ['PATH']}"}
    # by the path of the command to be, not of this process
    program = shutil.which(command[0], path=found["PATH"])
    if program is None:
        fail(f"no program {command[0]}")
    sys.stdout.flush()
    os.execve(program, list(command), found)


def kubectl(*words: object, **options: Any) -> None:
    sh(programs.path("kubectl"), f"--kubeconfig={KUBECONFIG}", *words, **options)


def get(path: str) -> dict[str, Any] | None:
    context = ssl.create_default_context(cafile=str(PKI / "ca.crt"))
    context.load_cert_chain(PKI / "admin.crt", PKI / "admin.key")
    connection = http.client.HTTPSConnection("127.0.0.1", HOST_PORT, timeout=5, context=context)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    return dict(json.loads(body)) if response.status == 200 else None


def _node_ready() -> bool:
    found = (get(f"/api/v1/nodes/{NODE}") or {}).get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in found)


def _allocatable(resource: str) -> str | None:
    found = (get(f"/api/v1/nodes/{NODE}") or {}).get("status", {}).get("allocatable", {})
    return str(found[resource]) if resource in found else None


def _alive(pid: int, word: str) -> bool:
    """Whether the process is still the one that was recorded, not another with its number."""
    try:
        return word in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False


def _clean(recorded: dict[str, Any]) -> None:
    """Ends a cluster, also one that crashed half-way, and undoes what it did to the machine."""
    for key, word in (("forward", "_forward"), ("init", "_node")):
        if _alive(recorded.get(key, 0), word):
            os.kill(recorded[key], signal.SIGTERM)
    for key, word in (("init", "_node"), ("outer", "unshare"), ("forward", "_forward")):
        limit = time.monotonic() + 10
        while _alive(recorded.get(key, 0), word):
            if time.monotonic() > limit:
                os.kill(recorded[key], signal.SIGKILL)
            time.sleep(0.05)
    for name, value in recorded.get("sysctls", {}).items():
        (Path("/proc/sys") / name).write_text(value)
    for root in cgroup_roots():
        _remove_cgroup(root / CGROUP)
    shutil.rmtree(RUN, ignore_errors=True)
    if not _used_by_another(HOSTPATH_PV):
        with contextlib.suppress(OSError):
            HOSTPATH_PV.rmdir()


def _used_by_another(folder: Path) -> bool:
    """Whether it is a mount point anywhere: removing it would unmount it from under another lab."""
    for entry in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):
            if f" {folder} " in entry.read_text():
                return True
    return False


def _remove_cgroup(folder: Path) -> None:
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            _remove_cgroup(entry)
    for _ in range(100):
        # the kernel may still be ending the last process
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.05)


def _inner_pids(init: int) -> dict[int, int]:
    """Process ids within the node's namespace → process ids here."""
    namespace = os.readlink(f"/proc/{init}/ns/pid")
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, StopIteration):
            if os.readlink(entry / "ns/pid") == namespace:
                line = next(row for row in (entry / "status").read_text().splitlines() if row.startswith("NSpid:"))
                found[int(line.split()[-1])] = int(entry.name)
    return found


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) // 1024
    return 0
