"""What the page shows of jobs and runs, whatever their source: rows of the list, curves, samples, and what went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from nemo_rl.job.text import clean
from nemo_rl.run.metrics import LINE_ORDER

CURVE_POINTS = 400
"""Points of a curve that are sent; of a longer one each is the mean of several steps."""
SAMPLES = 40
"""Newest sample completions that are sent."""
TEXT_CHARACTERS = 4000
"""Of each text of a sample."""
LOG_LINES = 400
LINE_CHARACTERS = 2000
MAIN_METRICS = (
    "reward",
    "validation_reward",
    "preference_accuracy",
    "validation_accuracy",
    "reward_margin",
    "loss",
    "validation_loss",
    "kl",
    "completion_length",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
)
"""The curves that are seen first, in this order; the others follow by name."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Why a source shows less than it has, in words. `kind` is for the page's manners, not for its words.

    sign-in: the viewer is not known; forbidden: he has no right; unreachable: nobody answers, and it is tried again;
    absent: there is no such job.
    """

    kind: Literal["sign-in", "forbidden", "unreachable", "absent", "unusable"]
    text: str


class SourceError(Exception):
    """A source cannot answer; `problem` says why."""

    def __init__(self, kind: Any, text: str) -> None:
        super().__init__(text)
        self.problem = Problem(kind, text)


@dataclass(frozen=True)
class Row:
    """One job or run in the list. What is not known is None."""

    key: str
    name: str
    where: str
    """Namespace of a job, folder of a run."""
    phase: str
    local: bool = False
    algorithm: str | None = None
    model: str | None = None
    reason: str | None = None
    message: str | None = None
    """Why it is in this phase."""
    step: int | None = None
    total_steps: int | None = None
    percent: int | None = None
    eta: str | None = None
    score: str | None = None
    score_name: str | None = None
    bottleneck: str | None = None
    created: str | None = None
    finished: bool = False

    def dump(self) -> Json:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class Listing:
    """The list of one source at one moment."""

    title: str
    rows: list[Row]
    namespace: str | None = None
    """The namespace that was asked for; empty for all, None for a source that has none."""
    problem: Problem | None = None
    stale_since: str | None = None
    """Since when the rows are not renewed."""
    more: bool = False
    """Whether there are more than are listed."""

    def dump(self) -> Json:
        found = asdict(self)
        del found["rows"]
        return {**found, "count": len(self.rows)}


@dataclass
class Details:
    """All that the page shows of one job or run."""

    row: Row
    facts: list[tuple[str, str]] = field(default_factory=list)
    """Further facts, as (name, text)."""
    metrics: dict[str, str] = field(default_factory=dict)
    """The newest metrics, as text."""
    attempts: list[Json] = field(default_factory=list)
    conditions: list[Json] = field(default_factory=list)
    replicas: Json | None = None
    """Rollout replicas: how many, and the state of each member."""
    bottleneck: Json | None = None
    traceback: str | None = None
    curves: Json = field(default_factory=dict)
    samples: list[Json] = field(default_factory=list)
    log: list[str] | None = None
    """The newest lines; None where this kind of job has no log here."""
    notes: list[str] = field(default_factory=list)
    """What cannot be shown, and why."""

    def dump(self) -> Json:
        return {**asdict(self), "row": self.row.dump()}


class Source(Protocol):
    """Where jobs come from. Both methods may block for seconds; SourceError where they have nothing to show."""

    name: str
    """First part of its keys."""

    def list(self, token: str, namespace: str | None) -> Listing:
        """The jobs that this viewer may see."""

    def details(self, token: str, key: str) -> Details:
        """One job, by its key without the source's name."""


def curves(records: Iterable[Mapping[str, Any]], points: int = CURVE_POINTS) -> Json:
    """{"steps": [...], "metrics": {name: [value or None, ...]}, "mean_of": n} of records with a step each, in order.

    Of more than `points` records, n neighbours become one point: the mean of their values at the mean of their steps.
    """
    rows = list(records)
    group = max(1, -(-len(rows) // points))
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(name for name, value in row.items() if number(value) is not None)
    for name in ("step", "total_steps", "epoch"):
        names.pop(name, None)
    steps: list[float] = []
    found: dict[str, list[float | None]] = {name: [] for name in sorted(names, key=_order)}
    for begin in range(0, len(rows), group):
        part = rows[begin : begin + group]
        steps.append(_mean([row["step"] for row in part]))
        for name, values in found.items():
            known = [value for row in part if (value := number(row.get(name))) is not None]
            values.append(_mean(known) if known else None)
    return {"steps": steps, "metrics": found, "mean_of": group}


def _order(name: str) -> tuple[int, int, str]:
    main = MAIN_METRICS.index(name) if name in MAIN_METRICS else len(MAIN_METRICS)
    known = LINE_ORDER.index(name) if name in LINE_ORDER else len(LINE_ORDER)
    return main, known, name


def _mean(values: list[float]) -> float:
    return values[0] if len(values) == 1 else math.fsum(values) / len(values)


def number(value: Any) -> float | None:
    """A finite number, or None: also for True, which is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def sample(record: Mapping[str, Any]) -> Json:
    """A sample completion as it is sent: its texts clean and of bounded length, further columns as texts."""
    shown = {name: text(record.get(name)) for name in ("prompt", "completion")}
    found: Json = {"step": record.get("step"), "reward": number(record.get("reward")), **shown}
    others = {str(name): text(value, 200) for name, value in record.items() if name not in found and value is not None}
    return found | ({"others": dict(list(others.items())[:12])} if others else {})


def text(value: Any, characters: int = TEXT_CHARACTERS) -> str:
    """Any value as text that is fit to be shown, cut where it is longer."""
    if value is None:
        return ""
    words = clean(value if isinstance(value, str) else str(value))
    return words if len(words) <= characters else f"{words[: characters - 1]}…"
