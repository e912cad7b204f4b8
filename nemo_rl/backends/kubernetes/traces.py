"""Tracebacks of pods, told in the names and with the source lines of this machine."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Mapping

_FRAME = re.compile(r'  File "(.+)", line (\d+), in ')


def told_here(trace: str, origins: Mapping[str, str]) -> str:
    """The traceback with the cells named as here, and with the line of the user's code where the pod had no text of it.

    A pickled function brings no text along; its lines are taken from what this process has loaded, and from no other
    file, whatever name the pod gives.
    """
    for label, origin in origins.items():
        trace = trace.replace(label, origin)
    lines = trace.splitlines()
    known = _loaded_files()
    told: list[str] = []
    for number, line in enumerate(lines):
        told.append(line)
        frame = _FRAME.match(line)
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if frame is None or following.startswith("    ") or frame[1] not in known:
            continue
        if source := linecache.getline(frame[1], int(frame[2])).strip():
            told.append(f"    {source}")
    return "\n".join(told)


def _loaded_files() -> set[str]:
    """Modules of this process, and cells, which only linecache knows."""
    modules = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return {file for file in modules if file} | set(linecache.cache)
