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


class Decoder:
    """Makes texts of completions. `end_ids` end one, and are no part of it; what the user asked to stop at is."""

    def __init__(self, tokenizer: Any, end_ids: Collection[int], asked_stops: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = {*end_ids, tokenizer.pad_token_id}.difference(asked_stops)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special.difference(self._ends)

    def __call__(self, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Decoded:
        """The texts of completions (token ids) of one prompt. Each begins with the tag by which the prompt has opened the thinking."""
        texts = self._tokenizer.batch_decode([list(ids) for ids in completions], skip_special_tokens=True)
        kept = []
        for completion in completions:
            ids = list(completion)
            while ids and ids[-1] in self._ends:
                ids.pop()
            kept.append(ids)
        raw = self._tokenizer.batch_decode(kept, skip_special_tokens=False)
        hidden = {i for ids in kept for i in ids if i in self._special}
        opened = opening_tag(self._tokenizer, prompt)
        return Decoded([opened + text for text in texts], [opened + text for text in raw], hidden)


def opening_tag(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The tag that a prompt (token ids) ends with, as the templates of reasoning models write it; "" where there is none.

    A completion then holds the closing tag alone. Before it, the text looks the same whoever opened the thinking.
    """
    opened = _OPENED.search(tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False))
    return opened.group() if opened else ""
