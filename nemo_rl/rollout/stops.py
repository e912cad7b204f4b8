"""Texts at which a completion ends, as a user names them: tokens where they are the name of one, else looked for in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SLACK = 8
"""Tokens beside those that a text can take at most: some write nothing by themselves."""


class Stops:
    """`tokens`: ids of the texts that name an added token of the tokenizer; `texts`: the others."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        named = tokenizer.get_added_vocab() if stop else {}
        self.tokens: list[int] = [int(named[text]) for text in stop if text in named]
        self.texts = [text for text in stop if text not in named]
        self.window = max((len(text.encode()) for text in self.texts), default=0) + _SLACK

    def reached(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each of these ends of completions (token ids, `window` of them suffice) holds one of the texts."""
        written = self._tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=False)
        return [any(text in found for text in self.texts) for found in written]
