"""Who writes to a run in an object store, and who gives way to whom."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl.errors import LeaseLost

held_here: set[str] = set()
"""Tokens of the leases that this process holds."""


class RunHeldError(RuntimeError):
    """Another process that lives writes to this run."""


@dataclass(frozen=True)
class Writer:
    """Who writes. Of one `owner` (a job's uid) the highest number wins; without an owner the one that lives does."""

    owner: str = ""
    number: int = 0
    name: str = ""
    """For people: which pod it is."""

    def record(self, token: str) -> dict[str, Any]:
        return {
            "owner": self.owner,
            "number": self.number,
            "name": self.name or f"{socket.gethostname()}, process {os.getpid()}",
            "machine": _machine(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "token": token,
        }

    def may_replace(self, holder: dict[str, Any], uri: str) -> bool:
        """Whether a holder gives way at once. RunHeldError and LeaseLost where it never does."""
        if self.owner and holder.get("owner") == self.owner:
            if int(holder.get("number") or 0) > self.number:
                raise LeaseLost(
                    f"attempt {self.number} came too late: attempt {holder['number']} (pod {holder.get('name')}) writes to "
                    f"{uri}, so this one writes nothing"
                )
            return True
        if holder.get("machine") != _machine():
            return False
        if holder.get("pid") == os.getpid():
            lives = holder.get("token") in held_here
        else:
            lives = holder.get("born") is not None and holder["born"] == _born(int(holder.get("pid") or 0))
        if lives:
            raise RunHeldError(
                f"the run in {uri} is being trained by another call at this moment ({holder.get('name')}); wait until it ends, "
                "or give resume=False to begin another one beside it"
            )
        return True


def _machine() -> str:
    """This machine since it was started; a pod is a machine of its own, for its processes are not seen from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, space = "", ""
    return hashlib.sha256(f"{socket.gethostname()} {boot} {space}".encode()).hexdigest()[:24]


def _born(pid: int) -> str | None:
    """When the process with this id began, in the kernel's own ticks; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
