"""What a reward sees before the words that were sampled: the tag by which the prompt has opened the thinking."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_OPENED = re.compile(r"(?:<(?:think|thinking|thought|reasoning)>|\[THINK\])\s*$")
_TAIL = 16
"""Tokens of a prompt in which an opening tag is looked for."""


def opening_tag(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The tag that a prompt (token ids) ends with, as the templates of reasoning models write it; "" where there is none.

    A completion then holds the closing tag alone. Before it, the text looks the same whoever opened the thinking.
    """
    opened = _OPENED.search(tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False))
    return opened.group() if opened else ""
