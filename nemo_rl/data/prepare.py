"""What a trainer calls: from any source of rows to token ids, with what was left out counted, in a fixed order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from nemo_rl.data.chat import encode_pairs, encode_prompts, encode_texts
from nemo_rl.data.formats import no_rows_left, to_preference_rows, to_prompt_rows, to_text_rows
from nemo_rl.data.loading import open_rows
from nemo_rl.data.rows import PromptRow, Report, Row
from nemo_rl.data.segments import opening_ids
from nemo_rl.data.templates import Template, with_template
from nemo_rl.errors import DatasetError
from nemo_rl.job.spec import DPOSpec, GRPOSpec, SFTSpec, TrainingSpec

Settings = GRPOSpec | DPOSpec | SFTSpec
T = TypeVar("T")

_SHOWN_CHARACTERS = 800


@dataclass(frozen=True)
class PromptExample:
    """A GRPO prompt. `index` is its place among the examples; `ids` end where the completion begins."""

    index: int
    ids: list[int]
    row: PromptRow


@dataclass(frozen=True)
class TextExample:
    """An SFT example. mask[i] is True where token i is to be predicted from those before it; never for i = 0."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class PairExample:
    """A DPO pair. The answers follow the same prompt and end with their end tokens."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


Example = PromptExample | TextExample | PairExample


@dataclass
class Prepared:
    """Examples, what became of the rows, and a SHA-256 that is equal for equal rows, in any process."""

    examples: list[Any]
    report: Report
    fingerprint: str


def prepare(
    algorithm: str,
    source: Any,
    tokenizer: Any,
    training: TrainingSpec,
    settings: Settings,
    *,
    needed: int | None = None,
) -> Prepared:
    """Read, recognise and tokenise a data set for one algorithm.

    `source` as in `load_rows`. A source that is read as a stream is read until `needed` examples are usable; any
    other is read whole. Raises `DatasetError` if the data cannot be read or used, or no row is left.
    """
    stream = open_rows(source)
    if not stream.lazy:
        needed = None
    elif needed is None and stream.unbounded:
        raise stream.without_limit()
    rows = stream.read(needed)
    if not rows:
        raise stream.empty()
    tokenizer = with_template(tokenizer, training.chat_template)
    while True:
        template = Template(tokenizer, training.chat_template_kwargs)
        examples, report = _examples(algorithm, rows, template, training, settings)
        report = replace(report, notes=dict(template.notes))
        if needed is None or len(examples) >= needed:
            break
        # Some rows were left out, so read as many again and a few more.
        more = stream.read(2 * (needed - len(examples)))
        if not more:
            break
        rows += more
    return Prepared(examples, report, _fingerprint(algorithm, rows))


def batches(n_rows: int, batch_size: int, seed: int, shuffle: bool, epoch: int) -> list[list[int]]:
    """The row numbers of each batch of an epoch: every row once, the last batch as small as it comes.

    Depends on nothing but the arguments, so a resumed run finds the same batches.
    """
    if batch_size < 1:
        raise ValueError(f"found batch_size {batch_size}; expected at least 1")
    order = np.random.default_rng([seed, epoch]).permutation(n_rows).tolist() if shuffle else list(range(n_rows))
    return [order[start : start + batch_size] for start in range(0, n_rows, batch_size)]


def describe_example(tokenizer: Any, example: Example) -> str:
    """One example as the model sees it, special tokens included, with the trained part in ⟦ ⟧."""

    def shown(ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        half = _SHOWN_CHARACTERS // 2
        return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"

    if isinstance(example, PromptExample):
        return f"prompt ({len(example.ids)} tokens): {shown(example.ids)}⟦completion⟧"
    if isinstance(example, PairExample):
        return (
            f"chosen ({len(example.prompt_ids)} + {len(example.chosen_ids)} tokens): "
            f"{shown(example.prompt_ids)}⟦{shown(example.chosen_ids)}⟧\n"
            f"rejected ({len(example.prompt_ids)} + {len(example.rejected_ids)} tokens): "
            f"⟦{shown(example.rejected_ids)}⟧"
        )
    parts, start = [], 0
    for stop in range(1, len(example.ids) + 1):
        if stop == len(example.ids) or example.mask[stop] != example.mask[start]:
            part = shown(example.ids[start:stop])
            parts.append(f"⟦{part}⟧" if example.mask[start] else part)
            start = stop
    return f"example ({len(example.ids)} tokens, {sum(example.mask)} trained): " + "".join(parts)


# --- one algorithm each


def _examples(
    algorithm: str, rows: Sequence[Row], template: Template, training: TrainingSpec, settings: Settings
) -> tuple[list[Any], Report]:
    if isinstance(settings, GRPOSpec) and algorithm == "grpo":
        return _prompt_examples(rows, template, training, settings)
    if isinstance(settings, SFTSpec) and algorithm == "sft":
        return _text_examples(rows, template, training, settings)
    if isinstance(settings, DPOSpec) and algorithm == "dpo":
        return _pair_examples(rows, template, training)
    raise ValueError(
        f"found algorithm {algorithm!r} with {type(settings).__name__}; expected grpo, sft or dpo with its own section"
    )


def _prompt_examples(
    rows: Sequence[Row], template: Template, training: TrainingSpec, settings: GRPOSpec
) -> tuple[list[PromptExample], Report]:
    room = training.max_sequence_length - settings.max_new_tokens
    if room < 1:
        raise DatasetError(
            f"found max_new_tokens {settings.max_new_tokens} and max_sequence_length {training.max_sequence_length}, "
            "which "
            "leaves no room for a prompt; expected max_new_tokens below max_sequence_length; raise "
            "max_sequence_length or lower max_new_tokens"
        )
    prompts, report = to_prompt_rows(rows)
    encoded = list(zip(encode_prompts(template.tokenizer, prompts, template), prompts, strict=True))
    opening = opening_ids(template.tokenizer)

    def without_beginning(item: tuple[list[int], PromptRow]) -> tuple[list[int], PromptRow]:
        ids, row = item
        kept = opening if opening and len(opening) < room and ids[: len(opening)] == opening else []
        return kept + ids[len(ids) - (room - len(kept)) :], row

    fitted, report = _fit(
        encoded,
        report,
        training,
        length=lambda item: len(item[0]),
        room=room,
        bound=f"max_sequence_length ({training.max_sequence_length}) less max_new_tokens ({settings.max_new_tokens})",
        shortened=without_beginning,
        usable=lambda item: bool(item[0]),
        unusable="without a token in the prompt",
    )
    return [PromptExample(index, ids, row) for index, (ids, row) in enumerate(fitted)], report


def _text_examples(
    rows: Sequence[Row], template: Template, training: TrainingSpec, settings: SFTSpec
) -> tuple[list[TextExample], Report]:
    texts, report = to_text_rows(rows)
    found, counts = encode_texts(template.tokenizer, texts, settings.train_on_prompt, template)
    encoded = [TextExample(ids, mask) for ids, mask in found]
    report = replace(report, split=len(found) - len(counts))
    room = training.max_sequence_length
    return _fit(
        encoded,
        report,
        training,
        length=lambda example: len(example.ids),
        room=room,
        bound=f"max_sequence_length ({room})",
        shortened=lambda example: TextExample(example.ids[:room], example.mask[:room]),
        usable=lambda example: any(example.mask),
        unusable="without a trained token within max_sequence_length (an all-zero loss mask)",
    )


def _pair_examples(rows: Sequence[Row], template: Template, training: TrainingSpec) -> tuple[list[PairExample], Report]:
    pairs, report = to_preference_rows(rows)
    encoded = [PairExample(*ids) for ids in encode_pairs(template.tokenizer, pairs, template)]
    room = training.max_sequence_length

    def without_end(pair: PairExample) -> PairExample:
        left = max(room - len(pair.prompt_ids), 0)
        return PairExample(pair.prompt_ids, pair.chosen_ids[:left], pair.rejected_ids[:left])

    return _fit(
        encoded,
        report,
        training,
        length=lambda pair: len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)),
        room=room,
        bound=f"max_sequence_length ({room})",
        shortened=without_end,
        usable=lambda pair: (
            bool(pair.prompt_ids and pair.chosen_ids and pair.rejected_ids) and pair.chosen_ids != pair.rejected_ids
        ),
        unusable="without two different answers within max_sequence_length",
    )


def _fit(
    items: list[T],
    report: Report,
    training: TrainingSpec,
    *,
    length: Callable[[T], int],
    room: int,
    bound: str,
    shortened: Callable[[T], T],
    usable: Callable[[T], bool],
    unusable: str,
) -> tuple[list[T], Report]:
    """Apply overlong_rows, then leave out what cannot be trained on; both counted in the report."""
    kept: list[T] = []
    dropped: Counter[str] = Counter(report.dropped)
    truncated = 0
    for number, item in enumerate(items):
        fitted = item
        if length(item) > room:
            if training.overlong_rows == "error":
                raise DatasetError(
                    f"found {length(item):,} tokens in usable row {number}; expected at most {room:,}, from {bound}; "
                    "raise "
                    "max_sequence_length, or set overlong_rows to drop or truncate"
                )
            if training.overlong_rows == "drop":
                dropped["longer than max_sequence_length allows"] += 1
                continue
            fitted = shortened(item)
        if not usable(fitted):
            dropped[unusable] += 1
            continue
        truncated += fitted is not item
        kept.append(fitted)
    report = replace(report, used=len(kept), dropped=dict(dropped), truncated=truncated)
    if not kept:
        raise no_rows_left(report)
    return kept, report


# --- fingerprint


def _fingerprint(algorithm: str, rows: Sequence[Row]) -> str:
    """SHA-256 over the rows as they were read: how a template writes them, today's date included, does not count."""
    digest = hashlib.sha256(algorithm.encode())
    for row in rows:
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=_stable)
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text.encode())
    return digest.hexdigest()


def _stable(value: Any) -> Any:
    """Something equal in every process for a value that JSON does not know; never an address in memory."""
    if isinstance(value, (bytes, bytearray)):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return f"{type(value).__module__}.{type(value).__qualname__}"
