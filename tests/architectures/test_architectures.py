"""Each causal type of the installed transformers trains and rolls out as its plain model does, or is refused in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from architectures.checks import check
from architectures.tiny_models import all_types

MECHANISMS = {
    "llama": "packed tokens",
    "gemma2": "sliding windows, soft caps",
    "gemma4": "a composite whose cap stands in its text configuration, head sizes by layer",
    "mixtral": "experts, router jitter",
    "qwen3_5_text": "linear attention between full attention",
    "falcon_h1": "attention and state space in one layer, a scaled output layer",
    "lfm2": "convolutions",
    "mamba2": "a state that padding would enter",
    "recurrent_gemma": "a recurrence and a soft cap of another name",
    "minimax": "a cache that cannot be used",
    "openai-gpt": "no cache, no activation checkpointing",
    "zamba2": "nested checkpointed layers",
    "seed_oss": "dropout in its own configuration",
    "bert": "an encoder",
    "cpmant": "not causal",
    "mllama": "a part whose checkpoints nothing opens",
}
"""Types that `make test` checks, and what each stands for."""

NOT_CAUSAL = {"cpmant"}
"""Decoders by name whose plain model looks ahead."""

NOT_LOADED_AGAIN = {"emu3", "mllama"}
"""Composites of which AutoModelForCausalLM opens a text part, but not what is saved of it."""


def types() -> list[str]:
    return all_types() if "NEMO_RL_ARCHITECTURES" in os.environ else list(MECHANISMS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model_type", types())
def test_trains_and_rolls_out_as_the_plain_model_does(model_type: str, write_report):
    report = check(model_type)
    write_report(report)
    if report.not_built:
        pytest.skip(f"transformers itself cannot make or run it: {report.not_built}")
    assert not report.failures, report.failures
    if report.refusal:
        assert "not a causal" in report.refusal, report.refusal
    refused = model_type in NOT_CAUSAL | NOT_LOADED_AGAIN or is_part(model_type)
    assert bool(report.refusal) == refused, report.refusal


def is_part(model_type: str) -> bool:
    from nemo_rl.model.kinds import kind_of

    return kind_of(model_type) is not None


def test_the_page_of_the_documentation_has_every_type():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    assert [t for t in all_types() if f"| `{t}` |" not in page] == []
