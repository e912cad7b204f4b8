"""Turning stretches of text, each trained or not, into token ids with a loss mask.

This is the only place where text becomes tokens. A mask is right by construction: trained and untrained text are
tokenised apart where the tokenizer allows it, just as a prompt is tokenised without its completion in a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from nemo_rl.errors import DatasetError

Encoded = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Segment:
    """A stretch of text. `closes` puts an end token after it, unless the text ends with that token: `end`, or the
    tokenizer's EOS.
    """

    text: str
    trained: bool
    closes: bool = False
    end: int | None = None


@dataclass(frozen=True)
class Passage:
    """The segments of one example. `opens` puts the tokenizer's BOS first, where it has one and the text does not."""

    segments: tuple[Segment, ...]
    opens: bool


def encode_passages(tokenizer: Any, passages: Sequence[Passage]) -> list[Encoded]:
    """Token ids and mask (True: this token is to be predicted) of each passage.

    The first token is never trained, for nothing precedes it. Raises `DatasetError` if an EOS is needed and the
    tokenizer has none.
    """
    if any(segment.closes and segment.end is None for passage in passages for segment in passage.segments):
        eos_of(tokenizer)
    encode = _encode_apart if _joins_cleanly(tokenizer) or not tokenizer.is_fast else _encode_jointly
    encoded = encode(tokenizer, passages)
    opening = opening_ids(tokenizer)
    return [_opened(ids, mask, opening if p.opens else []) for p, (ids, mask) in zip(passages, encoded, strict=True)]


def eos_of(tokenizer: Any) -> int:
    """Id of the token that ends a completion."""
    if tokenizer.eos_token_id is None:
        raise DatasetError(
            "found a tokenizer without an EOS token "
            f"({getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}); "
            "expected one, for a model learns to stop from it; set tokenizer.eos_token and save the tokenizer with "
            "the model"
        )
    return int(tokenizer.eos_token_id)


def opening_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before a text: its BOS, or nothing."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def _opened(ids: list[int], mask: list[bool], opening: list[int]) -> Encoded:
    if opening and ids[: len(opening)] != opening:
        ids, mask = opening + ids, [False] * len(opening) + mask
    if mask:
        mask[0] = False
    return ids, mask


def _joins_cleanly(tokenizer: Any) -> bool:
    """Whether tokens of two texts, one after the other, are the tokens of a text that reads the same.

    True of byte-level tokenizers; false where the first word of every text gets a space of its own (SentencePiece).
    """
    for first, second in (("a", "b"), ("a b", "c"), ("a\n", "b c")):
        ids = [i for part in (first, second) for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != first + second:
            return False
    return True


def _encode_apart(tokenizer: Any, passages: Sequence[Passage]) -> list[Encoded]:
    """Each segment by itself; one call of the tokenizer for all of them, and each text once."""
    texts = list(dict.fromkeys(segment.text for passage in passages for segment in passage.segments))
    tokens = dict(
        zip(texts, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [], strict=True)
    )
    encoded = []
    for passage in passages:
        ids: list[int] = []
        mask: list[bool] = []
        for segment in passage.segments:
            part = list(tokens[segment.text])
            if segment.closes:
                _close(tokenizer, segment, part)
            ids += part
            mask += [segment.trained] * len(part)
        encoded.append((ids, mask))
    return encoded


def _encode_jointly(tokenizer: Any, passages: Sequence[Passage]) -> list[Encoded]:
    """Each run of segments up to an EOS as one text, cut by character offsets."""
    runs = [run for passage in passages for run in _runs(passage)]
    texts = ["".join(segment.text for segment in run) for run in runs]
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if texts else {}
    tokens = iter(zip(batch["input_ids"], batch["offset_mapping"], strict=True) if texts else [])
    encoded = []
    for passage in passages:
        ids: list[int] = []
        mask: list[bool] = []
        for run in _runs(passage):
            part_ids, part_mask = _cut(tokenizer, run, *next(tokens))
            if run and run[-1].closes:
                _close(tokenizer, run[-1], part_ids)
                part_mask += [run[-1].trained] * (len(part_ids) - len(part_mask))
            ids += part_ids
            mask += part_mask
        encoded.append((ids, mask))
    return encoded


def _close(tokenizer: Any, segment: Segment, ids: list[int]) -> None:
    end = eos_of(tokenizer) if segment.end is None else segment.end
    if not ids or ids[-1] not in (end, tokenizer.eos_token_id):
        ids.append(end)


def _runs(passage: Passage) -> list[list[Segment]]:
    runs: list[list[Segment]] = [[]]
    for segment in passage.segments:
        runs[-1].append(segment)
        if segment.closes:
            runs.append([])
    return [run for run in runs if run]


def _cut(tokenizer: Any, run: list[Segment], ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
    """Mask of the tokens of one run. If a token lies across a border that matters, the segments are tokenised apart."""
    ends = list(accumulate(len(segment.text) for segment in run))
    borders = [end for end, left, right in zip(ends, run, run[1:], strict=False) if left.trained != right.trained]
    if any(start < border < stop for border in borders for start, stop in offsets):
        apart = Passage(tuple(Segment(s.text, s.trained) for s in run), opens=False)
        return _encode_apart(tokenizer, [apart])[0]
    mask = []
    position = 0
    for start, _ in offsets:
        while position < len(run) - 1 and start >= ends[position]:
            position += 1
        mask.append(run[position].trained)
    return list(ids), mask
