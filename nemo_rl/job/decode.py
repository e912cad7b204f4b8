"""JSON of the API server, of pods and of users, decoded without ever raising for how deep it is nested.

Free-form fields (rows, affinity) may hold anything that a user can write; a few kilobytes of brackets are deeper than
Python's decoder can go, and whoever fails on them fails for all other objects in the same answer too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from nemo_rl.job import names

KEPT_DEPTH = 100
"""Levels that are kept of a text that is nested too deep to decode. More than any field may have, so that what is cut is
still seen to be nested too deep."""

_LISTS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def loads(content: bytes | str) -> Any:
    """The value of a JSON text, with null in place of what is nested too deep. ValueError for no JSON."""
    text = content.encode() if isinstance(content, str) else content
    try:
        found = json.loads(text)
    except RecursionError:
        return json.loads(b"".join(_cut(text, KEPT_DEPTH)))
    return json.loads(b"".join(_cut(text, KEPT_DEPTH))) if deeper(text, KEPT_DEPTH) else found


def deeper(text: bytes, limit: int) -> bool:
    """Whether lists and mappings of a JSON text are nested more than `limit` levels deep; what is no JSON may look so.

    Every answer of the API server comes by here; it takes a third of the time of a walk through the value.
    """
    empty = text.count(b"{}") + text.count(b"[]")  # a level at most, however many: managed fields are mostly that
    if text.count(b"[") + text.count(b"{") - empty + bool(empty) <= limit:
        return False
    outside_strings = text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]
    brackets = b"".join(outside_strings).translate(_LISTS, delete=_NO_BRACKETS)
    for _ in range(limit):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")  # the innermost level of each
    return bool(brackets)


def _cut(text: bytes, limit: int) -> Iterator[bytes]:
    """The text with null in place of every list and mapping that has more than `limit` around it."""
    depth, kept = 0, 0
    for match in _STRUCTURE.finditer(text):
        mark = text[match.start()]
        if mark in b"[{":
            depth += 1
            if depth == limit + 1:
                yield text[kept : match.start()]
        elif mark in b"]}":
            if depth == limit + 1:
                yield b"null"
                kept = match.end()
            depth -= 1
    if depth <= limit:
        yield text[kept:]


def too_deep(value: Any, limit: int = names.MAX_NESTING) -> bool:
    """Whether lists and mappings are nested more than `limit` levels deep. Does not recurse."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | tuple | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | tuple | dict)
        ]
        if not level:
            return False
    return True
