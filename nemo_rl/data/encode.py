"""Rows to arrays of tokens, a chunk at a time: what a process of the tokenising pool does, and a small data set at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from nemo_rl.data.chat import encode_pairs, encode_prompts, encode_texts
from nemo_rl.data.examples import PARTS, TokenArrays
from nemo_rl.data.segments import opening_ids
from nemo_rl.data.templates import Template
from nemo_rl.errors import DatasetError
from nemo_rl.job.spec import DPOSpec, GRPOSpec, SFTSpec, TrainingSpec

Settings = GRPOSpec | DPOSpec | SFTSpec
T = TypeVar("T")


@dataclass
class Encoded:
    """The usable examples of some rows, and what became of the others."""

    arrays: TokenArrays
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    split: int = 0
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Encoder:
    """Tokenises rows of one algorithm. Travels to other processes as a pickle."""

    algorithm: str
    tokenizer: Any
    training: TrainingSpec
    settings: Settings

    def __call__(self, rows: Sequence[Any], first: int = 0) -> Encoded:
        """`rows` are PromptRows, TextRows or PreferenceRows; `first` is the number of the first of them."""
        template = Template(self.tokenizer, self.training.chat_template_kwargs)
        counts = [1] * len(rows)
        masks = None
        if self.algorithm == "grpo":
            items: list[Any] = [[ids] for ids in encode_prompts(self.tokenizer, rows, template)]
            fit = self._fit_prompts()
        elif self.algorithm == "sft":
            assert isinstance(self.settings, SFTSpec)
            items, counts = encode_texts(self.tokenizer, rows, self.settings.train_on_prompt, template)
            fit = self._fit_texts()
        else:
            items = encode_pairs(self.tokenizer, rows, template)
            fit = self._fit_pairs()
        sources = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
        kept, places, dropped, truncated = fit(items, first)
        if self.algorithm == "sft":
            masks, kept = [mask for _, mask in kept], [[ids] for ids, _ in kept]
        arrays = TokenArrays.pack(kept, masks, PARTS[self.algorithm])
        arrays.kept = sources[places] + first
        return Encoded(arrays, dropped, truncated, len(items) - len(rows), template.notes)

    # --- over-long rows, one algorithm each

    def _fit_prompts(self) -> Callable[..., Any]:
        training, settings = self.training, self.settings
        assert isinstance(settings, GRPOSpec)
        room = prompt_room(training, settings)
        opening = opening_ids(self.tokenizer)

        def without_beginning(item: list[list[int]]) -> list[list[int]]:
            (ids,) = item
            kept = opening if opening and len(opening) < room and ids[: len(opening)] == opening else []
            return [kept + ids[len(ids) - (room - len(kept)) :]]

        bound = f"max_sequence_length ({training.max_sequence_length}) less max_new_tokens ({settings.max_new_tokens})"
        return lambda items, first: self._fit(
            items,
            first,
            length=lambda item: len(item[0]),
            room=room,
            bound=bound,
            shortened=without_beginning,
            usable=lambda item: bool(item[0]),
            unusable="without a token in the prompt",
        )

    def _fit_texts(self) -> Callable[..., Any]:
        room = self.training.max_sequence_length
        return lambda items, first: self._fit(
            items,
            first,
            length=lambda item: len(item[0]),
            room=room,
            bound=f"max_sequence_length ({room})",
            shortened=lambda item: (item[0][:room], item[1][:room]),
            usable=lambda item: any(item[1]),
            unusable="without a trained token within max_sequence_length (an all-zero loss mask)",
        )

    def _fit_pairs(self) -> Callable[..., Any]:
        room = self.training.max_sequence_length

        def without_end(pair: Any) -> Any:
            prompt, chosen, rejected = pair
            left = max(room - len(prompt), 0)
            return prompt, chosen[:left], rejected[:left]

        return lambda items, first: self._fit(
            items,
            first,
            length=lambda pair: len(pair[0]) + max(len(pair[1]), len(pair[2])),
            room=room,
            bound=f"max_sequence_length ({room})",
            shortened=without_end,
            usable=lambda pair: all(pair) and pair[1] != pair[2],
            unusable="without two different answers within max_sequence_length",
        )

    def _fit(
        self,
        items: Sequence[T],
        first: int,
        *,
        length: Callable[[T], int],
        room: int,
        bound: str,
        shortened: Callable[[T], T],
        usable: Callable[[T], bool],
        unusable: str,
    ) -> tuple[list[T], list[int], Counter[str], int]:
        """Applies overlong_rows, then leaves out what cannot be trained on; both are counted."""
        kept: list[T] = []
        places: list[int] = []
        dropped: Counter[str] = Counter()
        truncated = 0
        for number, item in enumerate(items):
            fitted = item
            if length(item) > room:
                if self.training.overlong_rows == "error":
                    raise DatasetError(
                        f"found {length(item):,} tokens in usable row {first + number}; expected at most {room:,}, from "
                        f"{bound}; raise max_sequence_length, or set overlong_rows to drop or truncate"
                    )
                if self.training.overlong_rows == "drop":
                    dropped["longer than max_sequence_length allows"] += 1
                    continue
                fitted = shortened(item)
            if not usable(fitted):
                dropped[unusable] += 1
                continue
            truncated += fitted is not item
            kept.append(fitted)
            places.append(number)
        return kept, places, dropped, truncated


def prompt_room(training: TrainingSpec, settings: GRPOSpec) -> int:
    """Tokens that a prompt may take. Raises `DatasetError` where there are none."""
    room = training.max_sequence_length - settings.max_new_tokens
    if room < 1:
        raise DatasetError(
            f"found max_new_tokens {settings.max_new_tokens} and max_sequence_length {training.max_sequence_length}, "
            "which leaves no room for a prompt; expected max_new_tokens below max_sequence_length; raise "
            "max_sequence_length or lower max_new_tokens"
        )
    return room
