"""Texts of pods, nodes and other programs, made fit for a terminal, a status and a log."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
"""Terminal sequences: colours, cursor movements, titles of windows, links."""
_UNFIT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # control characters
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of text around
    "\ufeff\ufff9-\ufffb]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


_WRITTEN_AS = {
    r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$": "a module and a name in it, such as my_package.rewards:score",
    r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$": "an amount as Kubernetes writes it, such as 500m, 64Gi or 1.5T",
}
"""What the patterns of the specification mean."""


def problem_of(error: Mapping[str, Any]) -> str:
    """What an error of pydantic asks for, in words."""
    kind, found = error["type"], error.get("input")
    if kind == "string_pattern_mismatch":
        pattern = str(error["ctx"]["pattern"])
        return f"must be {_WRITTEN_AS.get(pattern, f'of the form {pattern}')}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "list_type":
        entries = "one entry for each" if isinstance(found, Mapping) else "also for one entry ([...])"
        return f"must be a list, {entries}"
    return str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")


def dotted(text: str, keep: str = "") -> str:
    """The text with a dot for what is not printable, but for the characters to keep: so a model never drives a terminal."""
    return "".join(c if c.isprintable() or c in keep else "·" for c in text)


def clean(text: str) -> str:
    """The text without terminal sequences, control characters but newline and tab, and marks of direction."""
    if text.isprintable() and text.isascii():
        return text
    text = _UNFIT.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    return _SURROGATES.sub("\ufffd", text).replace("\u2028", "\n").replace("\u2029", "\n")


def one_line(text: str) -> str:
    """The text, clean, with its line breaks written as the two characters backslash and n."""
    return clean(text).replace("\n", "\\n")
