"""Folders below the machine's temporary one that hold weights: what a killed process left is removed by the next one.

Standard library only: servers use it, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

_LOCK = ".in-use"
_held: dict[Path, IO[str]] = {}


def make(prefix: str) -> Path:
    """A new folder whose name begins with `prefix`. Removes those of that prefix whose processes have ended."""
    remove_abandoned(prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    hold(folder)
    return folder


def hold(folder: Path) -> None:
    """Keeps a folder for as long as this process lives. Where several hold one, they do so one after the other."""
    lock = folder / _LOCK
    new = folder / f"{_LOCK}-{os.getpid()}"
    stream = open(lock if lock.exists() else new, "a")  # noqa: SIM115 - it is open until the process ends
    fcntl.flock(stream, fcntl.LOCK_SH)
    if stream.name == str(new):  # nobody sees it before it is locked
        new.rename(lock)
    _held[folder] = stream


def held(folder: Path) -> bool:
    return folder in _held


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if (stream := _held.pop(folder, None)) is not None:
        stream.close()


def remove_abandoned(prefix: str) -> None:
    """Removes the folders of this user that nobody holds any more."""
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_LOCK}"):
        with contextlib.suppress(OSError):
            if lock.stat().st_uid != os.getuid():
                continue
            with open(lock) as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
