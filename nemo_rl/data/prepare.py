"""What a trainer calls: from any source of rows to token ids, with what was left out counted, in a fixed order."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nemo_rl.data.encode import Encoded, Encoder, Settings, prompt_room
from nemo_rl.data.examples import Example, Examples, PairExample, PromptExample, TextExample
from nemo_rl.data.formats import no_rows_left, to_preference_rows, to_prompt_rows, to_text_rows
from nemo_rl.data.loading import open_rows
from nemo_rl.data.pool import encode_all
from nemo_rl.data.rows import Report, Row
from nemo_rl.data.templates import with_template
from nemo_rl.data.token_cache import CACHED_ROWS, cache_key, cached, join
from nemo_rl.job.spec import DPOSpec, GRPOSpec, SFTSpec, TrainingSpec

log = logging.getLogger("nemo_rl")

__all__ = [
    "PairExample",
    "Prepared",
    "PromptExample",
    "TextExample",
    "batches",
    "describe_example",
    "parts_of",
    "prepare",
]

_CONVERT = {"grpo": to_prompt_rows, "sft": to_text_rows, "dpo": to_preference_rows}
_SECTIONS = {"grpo": GRPOSpec, "sft": SFTSpec, "dpo": DPOSpec}
_SHOWN_CHARACTERS = 800


@dataclass
class Prepared:
    """Examples, what became of the rows, and a SHA-256 that is equal for equal rows, in any process."""

    examples: Examples
    report: Report
    fingerprint: str
    streamed: int | None = None
    """Rows that were read of a stream, which has more; None where all rows were read."""


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
    other is read whole. Many rows are tokenised in several processes, and their tokens kept on disk, where the other
    ranks of the machine and later runs find them. Raises `DatasetError` if the data cannot be read or used, or no row
    is left.
    """
    if not isinstance(settings, _SECTIONS.get(algorithm, ())):
        raise ValueError(
            f"found algorithm {algorithm!r} with {type(settings).__name__}; expected grpo, sft or dpo with its own section"
        )
    if isinstance(settings, GRPOSpec):
        prompt_room(training, settings)
    stream = open_rows(source)
    if not stream.lazy:
        needed = None
    elif needed is None and stream.unbounded:
        raise stream.without_limit()
    rows = stream.read(needed)
    if not rows:
        raise stream.empty()
    encoder = Encoder(algorithm, with_template(tokenizer, training.chat_template), training, settings)
    while True:
        prepared = _prepared(encoder, rows)
        if needed is None:
            return prepared
        if len(prepared.examples) >= needed:
            return prepared if stream.ended() else replace(prepared, streamed=len(rows))
        # Some rows were left out, so read as many again and a few more.
        more = stream.read(2 * (needed - len(prepared.examples)))
        if not more:
            return prepared
        rows.extend(more)


def _prepared(encoder: Encoder, rows: Sequence[Row]) -> Prepared:
    fingerprint = _fingerprint(encoder.algorithm, rows)
    converted, report = _CONVERT[encoder.algorithm](rows)
    encoded = _encoded(encoder, converted, fingerprint)
    dropped = Counter(report.dropped) + encoded.dropped
    report = replace(
        report,
        used=len(encoded.arrays.lengths),
        dropped=dict(dropped),
        truncated=encoded.truncated,
        split=encoded.split,
        notes=dict(encoded.notes),
    )
    if not report.used:
        raise no_rows_left(report)
    prompts: Sequence[Any] = converted if encoder.algorithm == "grpo" else ()
    return Prepared(Examples(encoder.algorithm, encoded.arrays, prompts), report, fingerprint)


def _encoded(encoder: Encoder, rows: Sequence[Any], fingerprint: str) -> Encoded:
    key = cache_key(encoder, fingerprint) if len(rows) >= CACHED_ROWS else None
    if key is not None:
        try:
            return cached(key, lambda: encode_all(encoder, rows))
        except OSError as error:
            log.warning("tokens are kept in memory, for they cannot be kept on disk: %s", error)
    return join(encode_all(encoder, rows))


def batches(n_rows: int, batch_size: int, seed: int, shuffle: bool, epoch: int) -> list[list[int]]:
    """The row numbers of each batch of an epoch: every row once, the last batch as small as it comes.

    Depends on nothing but the arguments, so a resumed run finds the same batches.
    """
    if batch_size < 1:
        raise ValueError(f"found batch_size {batch_size}; expected at least 1")
    order = np.random.default_rng([seed, epoch]).permutation(n_rows).tolist() if shuffle else list(range(n_rows))
    return [order[start : start + batch_size] for start in range(0, n_rows, batch_size)]


@dataclass(frozen=True)
class Part:
    """A stretch of an example: its text with special tokens, its number of tokens, and whether these are trained.

    `name` is that of a pair's answer, chosen or rejected, else "". The completion of a prompt is "", of 0 tokens.
    """

    text: str
    tokens: int
    trained: bool
    name: str = ""


def parts_of(tokenizer: Any, example: Example) -> list[Part]:
    """An example as the model sees it, cut where trained and untrained tokens meet."""

    def part(ids: Sequence[int], trained: bool, name: str = "") -> Part:
        text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Part(text, len(ids), trained, name)

    if isinstance(example, PromptExample):
        return [part(example.ids, False), Part("", 0, True)]
    if isinstance(example, PairExample):
        answers = [part(example.chosen_ids, True, "chosen"), part(example.rejected_ids, True, "rejected")]
        return [part(example.prompt_ids, False), *answers]
    parts, start = [], 0
    for stop in range(1, len(example.ids) + 1):
        if stop == len(example.ids) or example.mask[stop] != example.mask[start]:
            parts.append(part(example.ids[start:stop], bool(example.mask[start])))
            start = stop
    return parts


def describe_example(tokenizer: Any, example: Example) -> str:
    """One example as the model sees it, special tokens included, with the trained part in ⟦ ⟧."""

    def shown(text: str) -> str:
        half = _SHOWN_CHARACTERS // 2
        return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"

    parts = parts_of(tokenizer, example)
    if isinstance(example, PromptExample):
        return f"prompt ({parts[0].tokens} tokens): {shown(parts[0].text)}⟦completion⟧"
    if isinstance(example, PairExample):
        prompt, chosen, rejected = parts
        return (
            f"chosen ({prompt.tokens} + {chosen.tokens} tokens): {shown(prompt.text)}⟦{shown(chosen.text)}⟧\n"
            f"rejected ({prompt.tokens} + {rejected.tokens} tokens): ⟦{shown(rejected.text)}⟧"
        )
    text = "".join(f"⟦{shown(part.text)}⟧" if part.trained else shown(part.text) for part in parts)
    return f"example ({len(example.ids)} tokens, {sum(example.mask)} trained): {text}"


# --- fingerprint


def _fingerprint(algorithm: str, rows: Sequence[Row]) -> str:
    """SHA-256 over the rows as they were read: how a template writes them, today's date included, does not count."""
    digest = hashlib.sha256(algorithm.encode())
    for row in rows:
        try:
            text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=_stable)
        except TypeError:  # names that are no text, or not of one kind
            text = json.dumps(_with_names(row), sort_keys=True, separators=(",", ":"), default=_stable)
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text.encode())
    return digest.hexdigest()


def _with_names(value: Any) -> Any:
    """A copy whose mappings have text as keys, which tells 1 from "1"."""
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else f"{type(k).__name__} {k!r}": _with_names(v) for k, v in value.items()}
    return [_with_names(item) for item in value] if isinstance(value, (list, tuple)) else value


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
