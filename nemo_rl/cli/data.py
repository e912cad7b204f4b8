"""`nemo-rl data`: what would be trained of a data set, before anything is."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.api.evaluation import data_source
from nemo_rl.api.models import find_model
from nemo_rl.cli.jobs import print_json
from nemo_rl.extras import explained
from nemo_rl.job.manifest import ManifestError, load_manifest, parse_manifest
from nemo_rl.job.spec import ALGORITHMS, RLTrainingJobSpec
from nemo_rl.job.text import dotted

if TYPE_CHECKING:
    from nemo_rl.data.prepare import Part, Prepared

_REQUIRED = {"grpo": "\n  reward: {builtin: length}", "sft": "", "dpo": ""}
"""What a job of an algorithm must have, and what its prompts do not depend on."""
_CHARACTERS = 2000
"""Of a part that is shown."""


def show_data(
    source: str,
    *,
    algorithm: str | None,
    model: str | None,
    overrides: Sequence[str],
    rows: int,
    max_rows: int,
    as_json: bool,
) -> int:
    """Prints the examples that a job, or a model with a data set, would train on; returns the exit code.

    Raises ManifestError for a wrong job or option, DatasetError for data that cannot be used, ValueError without a tokenizer.
    """
    spec = _spec(source, algorithm, model, overrides)
    with explained("nemo-rl data"):
        from nemo_rl.data.prepare import parts_of, prepare
        from nemo_rl.model.load import load_tokenizer
    tokenizer = load_tokenizer(find_model(spec.model), spec.training.trust_remote_code)
    found = prepare(spec.algorithm, spec.dataset, tokenizer, spec.training, spec.settings, needed=max_rows)
    shown = [parts_of(_templated(tokenizer, spec), found.examples[i]) for i in range(min(rows, len(found.examples)))]
    if as_json:
        print_json(
            {
                "algorithm": spec.algorithm,
                "model": spec.model,
                "rows": asdict(found.report),
                "tokens": _counts(spec.algorithm, found),
                "examples": [[asdict(part) for part in parts] for parts in shown],
            }
        )
        return 0
    print(found.report)
    for name, counts in _counts(spec.algorithm, found).items():
        print(f"{name}: " + ", ".join(f"{what} {count:,}" for what, count in counts.items()))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number, parts in enumerate(shown):
        _print_example(number, parts, colour)
    if shown:
        print(f"\n{'green' if colour else '⟦ ⟧'}: {_MEANING[spec.algorithm]}")
    return 0


_MEANING = {
    "grpo": "where completions are sampled; the reward also reads the other columns of a row",
    "sft": "tokens that are trained; the others are read only",
    "dpo": "the two answers that are compared; the prompt is read only",
}


def _spec(source: str, algorithm: str | None, model: str | None, overrides: Sequence[str]) -> RLTrainingJobSpec:
    if source.endswith((".yaml", ".yml")):
        if algorithm is not None or model is not None:
            raise ManifestError(
                f"found {source} with --{'algorithm' if algorithm else 'model'}; a job says these itself: change them with "
                "--set, like --set model=FOLDER"
            )
        return load_manifest(Path(source), overrides).spec
    if model is None or algorithm is None:
        raise ManifestError(
            f"found {source!r} without --{'model' if model is None else 'algorithm'}; expected both, for they decide how rows "
            "become tokens: nemo-rl data PATH --algorithm sft --model FOLDER; or give a job's YAML file"
        )
    if algorithm.lower() not in ALGORITHMS:
        raise ManifestError(f"found --algorithm {algorithm}; expected one of {', '.join(ALGORITHMS)}")
    text = (
        "apiVersion: nemo-rl.io/v1alpha1\nkind: RLTrainingJob\nmetadata: {name: data}\nspec:\n"
        f"  algorithm: {algorithm.lower()}\n  dataset: {{name: any}}\n  model: any{_REQUIRED[algorithm.lower()]}\n"
    )
    spec = parse_manifest(text, source="--algorithm", overrides=overrides).spec
    return spec.model_copy(update={"model": model, "dataset": data_source(source)})


def _templated(tokenizer: Any, spec: RLTrainingJobSpec) -> Any:
    from nemo_rl.data.templates import with_template

    return with_template(tokenizer, spec.training.chat_template)


def _counts(algorithm: str, found: Prepared) -> dict[str, dict[str, int]]:
    """Tokens of the examples: the least, the middle one, the 95th of 100, the most, and all together."""
    import numpy as np

    arrays = found.examples.arrays
    named = {
        "grpo": ("prompt tokens",),
        "sft": ("tokens",),
        "dpo": ("prompt tokens", "chosen tokens", "rejected tokens"),
    }
    columns = dict(zip(named[algorithm], np.asarray(arrays.lengths).T, strict=True))
    if arrays.mask is not None:
        ends = np.cumsum(np.asarray(arrays.lengths)[:, 0])
        sums = np.concatenate([[0], np.cumsum(np.asarray(arrays.mask), dtype=np.int64)])
        columns["trained tokens"] = np.diff(np.concatenate([[0], sums[ends]]))
    return {
        name: {
            "least": int(values.min()),
            "median": int(np.median(values)),
            "95 %": int(np.percentile(values, 95)),
            "most": int(values.max()),
            "all": int(values.sum()),
        }
        for name, values in columns.items()
    }


def _print_example(number: int, parts: list[Part], colour: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    tokens, trained = sum(part.tokens for part in parts), sum(part.tokens for part in parts if part.trained)
    about = f", {trained} trained" if trained else ""
    text = Text(f"\nexample {number} ({tokens} tokens{about})\n", style="bold" if colour else "")
    for part in parts:
        if part.name:
            text.append(f"\n{part.name} ({part.tokens} tokens): ", style="bold" if colour else "")
        shown = _printable(part.text) or ("completion" if part.trained else "")
        if colour:
            text.append(shown, style="not bold green" if part.trained else "not bold dim")
        else:
            text.append(f"⟦{shown}⟧" if part.trained else shown)
    Console(force_terminal=colour, color_system="auto" if colour else None).print(text, soft_wrap=True, highlight=False)


def _printable(text: str) -> str:
    """A text whose lines stay lines; what else is not printable becomes a dot, so that data never drives the terminal."""
    shown = dotted(text, keep="\n")
    half = _CHARACTERS // 2
    return shown if len(shown) <= _CHARACTERS else f"{shown[:half]} … {shown[-half:]}"
