"""`lab.py up --control-plane`: a control plane that stays after the command has ended, until `down`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab.control_plane import ControlPlane
from lab.settings import CONTROL_PLANE, SOURCE, LabError, fail, say

UP_SECONDS = 900
"""Long enough to compile the programs first."""


def up() -> None:
    if _pid():
        say("up already")
        kubeconfig()
        return
    shutil.rmtree(CONTROL_PLANE, ignore_errors=True)
    CONTROL_PLANE.mkdir(parents=True)
    with open(CONTROL_PLANE / "supervisor.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(SOURCE / "lab.py"), "_control-plane"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    limit = time.monotonic() + UP_SECONDS
    while not _serving().exists():
        if process.poll() is not None or time.monotonic() > limit:
            fail(f"the control plane does not serve; see {CONTROL_PLANE}/supervisor.log")
        time.sleep(0.05)
    kubeconfig()


def down() -> None:
    pid = _pid()
    if pid:
        os.kill(pid, signal.SIGTERM)
        limit = time.monotonic() + 20
        while _pid():
            if time.monotonic() > limit:
                raise LabError(f"process {pid} does not end; see {CONTROL_PLANE}/supervisor.log")
            time.sleep(0.05)
    shutil.rmtree(CONTROL_PLANE, ignore_errors=True)
    say("down")


def status() -> None:
    pid = _pid()
    if not pid:
        fail("the control plane is down; start it with `lab.py up --control-plane`")
    say(f"up, supervised by process {pid}")
    kubeconfig()


def kubeconfig() -> None:
    say(f"export KUBECONFIG={CONTROL_PLANE}/kubeconfig")


def supervise(folder: Path) -> None:
    """Runs a control plane until SIGTERM or SIGINT, starting again what ends."""
    plane = ControlPlane(folder)
    ends: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: ends.append(received))
    try:
        plane.start()
        (folder / "serving").write_text(str(os.getpid()))
        while not ends:
            time.sleep(0.2)
            for name, process in list(plane.processes.items()):
                if process.poll() is not None:
                    say(f"{name} ended with {process.returncode}; starting it again")
                    plane.launch(name)
    finally:
        plane.stop()


def _serving() -> Path:
    return CONTROL_PLANE / "serving"


def _pid() -> int:
    """The supervisor's process id, or 0 when it is gone."""
    try:
        pid = int(_serving().read_text())
        return pid if b"_control-plane" in Path(f"/proc/{pid}/cmdline").read_bytes() else 0
    except (OSError, ValueError):
        return 0
