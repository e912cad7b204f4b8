"""Ports for what the tests start: each is given out once, to whichever process of this machine asks first."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import IO

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST, _CLIENTS = 20000, 32768
_reserved: list[IO[bytes]] = []
"""The files whose locks hold the ports of this process until it ends."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that are this process's own until it ends.

    Between the look and the use of a port another process may take it, be it a client: the kernel gives those a port
    of its own range. So these are below that range, and a lock on a file keeps other test processes from each.
    """
    first_of_clients = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else _CLIENTS
    candidates = range(min(_FIRST, first_of_clients // 2), first_of_clients)
    folder = Path(tempfile.gettempdir()) / f"nemo-rl-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found: list[int] = []
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        if len(found) == count:
            return found
        lock = open(folder / str(port), "wb")  # noqa: SIM115
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("", port))
            _reserved.append(lock)
            found.append(port)
            continue
        lock.close()
    raise RuntimeError(f"found fewer than {count} free ports among {candidates}")


def free_port() -> int:
    (found,) = free_ports(1)
    return found
