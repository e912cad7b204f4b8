"""The gate: whether what samples has the weights that are trained, measured on a fixed probe after each update."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

LENGTHS = (2, 3, 5, 8, 13, 21, 34, 55)
"""Tokens of the probe's prompts, cut to what the model takes: ragged, so that a wrong position or mask shows."""
NEW_TOKENS = 12
LIMITS = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
"""Mean |difference| of log-probabilities in nats a token, by what the server computes in."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found at one server. `difference` is None where nothing was measured, and `failure` says why."""

    server: str
    difference: float | None
    limit: float
    failure: str = ""

    @property
    def good(self) -> bool:
        return not self.failure and self.difference is not None and self.difference <= self.limit


def probe_prompts(vocabulary: int, longest: int) -> list[list[int]]:
    """Eight prompts of token ids, the same in every run of a model; `longest` is what a server takes of prompt and completion."""
    draw = random.Random(20260719)
    longest = max(2, longest - NEW_TOKENS)
    return [[draw.randrange(vocabulary) for _ in range(min(length, longest))] for length in LENGTHS]


def mean_difference(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> float:
    """The mean |log-probability - log-probability| over all tokens; infinite where one is no number."""
    total, count = 0.0, 0
    for their, our in zip(theirs, ours, strict=True):
        for a, b in zip(their, our, strict=True):
            total += abs(a - b)
            count += 1
    mean = total / max(count, 1)
    return mean if mean == mean else float("inf")


def mismatch(version: int, verdicts: Sequence[Verdict], *, tied: bool, dtype: str, trained: str) -> str:
    """Says that no server has the weights of a version, what was measured and expected, and what may be the cause."""
    lines = []
    for verdict in verdicts:
        if verdict.failure:
            lines.append(f"{verdict.server}: {verdict.failure}")
        else:
            lines.append(
                f"{verdict.server}: log-probabilities differ by {verdict.difference:.3g} nats a token on average, "
                f"allowed are {verdict.limit:.3g}"
            )
    causes = []
    worst = max((v.difference for v in verdicts if v.difference is not None), default=0.0)
    if tied:
        causes.append("vLLM's reload of tied embeddings, which some builds do wrong without an error")
    if dtype != trained:
        causes.append(f"the server computes in {dtype}, the trainer in {trained}")
    if worst > 0.5:
        causes.append("the server holds another model, or the weights of another version")
    elif worst > 0:
        causes.append("the weights of another version")
    causes.append("a quantised server")
    return (
        f"no rollout server samples with version {version} of the weights: {'; '.join(lines)}. Nothing was trained on their "
        f"tokens. Likely causes: {'; '.join(causes)}. rollout's mismatch_limit raises what is allowed; engine in_process needs "
        "no server"
    )
