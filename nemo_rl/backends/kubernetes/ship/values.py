"""Writes plain values (numbers, text, containers of them) as Python text that gives exactly the same value."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from nemo_rl.backends.kubernetes.ship.errors import NotSource

_LINE = 110
CONTAINERS = (list, tuple, dict, set, frozenset)


def is_atom(value: Any) -> bool:
    """Whether the value has no parts and needs no import: None, numbers, text, bytes, …; exact types only."""
    return type(value) in (type(None), bool, int, float, complex, str, bytes, bytearray, range, slice) or (
        value is Ellipsis or value is NotImplemented
    )


def atom(value: Any) -> str:
    """Text of an atom. NotSource for a NaN with a payload, which text cannot hold."""
    if type(value) is float:
        return _float(value)
    if type(value) is complex:
        return f"complex({_float(value.real)}, {_float(value.imag)})"
    if type(value) is int:
        return repr(value) if abs(value) < 1 << 64 else hex(value)
    if type(value) is str:
        return repr(value) if value.isprintable() else ascii(value)
    if type(value) is slice:
        if not all(is_atom(part) for part in (value.start, value.stop, value.step)):
            raise NotSource("a slice of objects")
        return f"slice({atom(value.start)}, {atom(value.stop)}, {atom(value.step)})"
    return repr(value)


def _float(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    if math.isinf(value):
        return "float('inf')" if value > 0 else "float('-inf')"
    for text in ("nan", "-nan"):
        if struct.pack("<d", value) == struct.pack("<d", float(text)):
            return f"float({text!r})"
    raise NotSource("a NaN with a payload")


def container(value: Any, write: Callable[[Any], str]) -> str:
    """Text of a list, tuple, dict, set or frozenset whose parts `write` writes."""
    if type(value) is dict:
        return _laid_out("{", [f"{write(k)}: {write(v)}" for k, v in value.items()], "}")
    parts = [write(item) for item in value]
    if type(value) is list:
        return _laid_out("[", parts, "]")
    if type(value) is tuple:
        return _laid_out("(", parts, ",)" if len(parts) == 1 else ")")
    parts.sort()  # the order of a set differs from process to process
    if type(value) is frozenset:
        return _laid_out("frozenset({", parts, "})") if parts else "frozenset()"
    return _laid_out("{", parts, "}") if parts else "set()"


def _laid_out(start: str, parts: list[str], end: str) -> str:
    line = start + ", ".join(parts) + end
    if len(line) <= _LINE and "\n" not in line:
        return line
    lines: list[str] = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) > _LINE:
            lines.append("")
        lines[-1] += f"{part}, "
    return start + "\n    " + "\n    ".join(text.rstrip() for text in lines) + "\n" + end.lstrip(",")
