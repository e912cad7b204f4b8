"""Completions as text, as rewards, evaluations and people see them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

_OPENED = re.compile(r"(?:<(?:think|thinking|thought|reasoning)>|\[THINK\])\s*$")
_TAIL = 16
"""Tokens of a prompt in which an opening tag is looked for."""


@dataclass(frozen=True)
class Decoded:
    """`texts` without special tokens; `raw` with them but for what ends a completion; `hidden`: the special tokens between."""

    texts: list[str]
    raw: list[str]
    hidden: set[int]


def decoded(
    tokenizer: Any, prompt: Sequence[int], completions: Sequence[Sequence[int]], ends: Collection[int | None]
) -> Decoded:
    """The texts of completions (token ids) of one prompt. Each begins with the tag by which the prompt has opened the thinking.

    `ends`: tokens that are no part of the answer where they stand at its end.
    """
    texts = tokenizer.batch_decode([list(ids) for ids in completions], skip_special_tokens=True)
    kept = []
    for completion in completions:
        ids = list(completion)
        while ids and ids[-1] in ends:
            ids.pop()
        kept.append(ids)
    raw = tokenizer.batch_decode(kept, skip_special_tokens=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}.difference(ends)
    hidden = {i for ids in kept for i in ids if i in special}
    opened = opening_tag(tokenizer, prompt)
    return Decoded([opened + text for text in texts], [opened + text for text in raw], hidden)


def opening_tag(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The tag that a prompt (token ids) ends with, as the templates of reasoning models write it; "" where there is none.

    A completion then holds the closing tag alone. Before it, the text looks the same whoever opened the thinking.
    """
    opened = _OPENED.search(tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False))
    return opened.group() if opened else ""
