"""What a trainer pod says about itself while it runs: progress, health and how long its start took.

The training thread writes, the server's threads read. Every attribute is replaced as a whole, so no lock is needed and a
reader never holds training up.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rl.job.status import Bottleneck, Checkpoint, Progress, ServerReport
from nemo_rl.run.checkpoint import best_of, find_checkpoints
from nemo_rl.run.metrics import LINE_ORDER
from nemo_rl.run.stored.checkpoints import PublishedCheckpoints
from nemo_rl.run.stored.head import best_entry

IMPORTING = "importing"
PREPARING_DATA = "preparing data"
LOADING_MODEL = "loading model"
STARTING = "starting"
TRAINING = "training"
EVALUATING = "evaluating"
SAVING = "saving"
UPLOADING = "uploading"
FINISHED = "finished"

SPEAKING = frozenset({TRAINING, EVALUATING})
"""In these the loops report at every decoded token and every micro-batch. The others say nothing while they work: imports,
downloads, loading and saving."""
PACE_STEPS = 20
"""Steps whose pace the estimate of the time left follows."""


class Report:
    """The state of this process."""

    def __init__(self, *, started: float | None = None) -> None:
        """`started`: when the process began, on the clock of time.monotonic."""
        self.started = time.monotonic() if started is None else started
        self.seconds: dict[str, float] = {}
        """How long each phase of the start took."""
        self.reward_seconds = 0.0
        """How long one reward may take without a word."""
        self.stall_seconds = math.inf
        """Seconds without a sign of life after which a phase that speaks counts as stuck (spec.stallTimeoutSeconds)."""
        self.silent_seconds = math.inf
        """The same for phases that say nothing while they work: the longer of that and spec.startupTimeoutSeconds."""
        self.tell_ranks: Callable[[str], None] | None = None
        """Tells the ranks that wait for this one that it ends; None before they have met."""
        self._phase = IMPORTING
        self._alive_at = time.monotonic()
        self._step = 0
        self._total_steps: int | None = None
        self._epoch: int | None = None
        self._metrics: dict[str, Any] = {}
        self._step_time: str | None = None
        self._checkpoint: Checkpoint | None = None
        self._ends: deque[float] = deque(maxlen=PACE_STEPS + 1)
        self._pace: float | None = None
        self._servers: list[ServerReport] | None = None
        self._bottleneck: Bottleneck | None = None

    # --- written by the training thread

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The phase while the block runs; its seconds are kept. Afterwards it is the phase before."""
        before, begin = self._phase, time.monotonic()
        self.enter(phase)
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begin
            self.enter(before)

    def enter(self, phase: str) -> None:
        self._phase = phase
        self.beat()

    def beat(self) -> None:
        """A sign of life. Costs a reading of the clock: called in the innermost loops."""
        self._alive_at = time.monotonic()

    def alive_at(self, moment: float) -> None:
        """A sign of life of a rank that this one waits for, at that time of time.monotonic."""
        self._alive_at = max(self._alive_at, moment)

    def begin(self, step: int, total_steps: int) -> None:
        """Training begins, after `step` steps of earlier attempts."""
        self._step, self._total_steps = step, total_steps
        self._ends.append(time.monotonic())
        self.enter(TRAINING)

    def expect(self, step: int) -> None:
        """The run will go on after this step, as far as the files tell before anything is loaded."""
        self._step = step

    def step_ended(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._ends.append(time.monotonic())
        self._pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else None
        self._epoch = metrics.get("epoch")
        self._metrics = dict(metrics)
        self._step_time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._step = step
        self.beat()

    def saved(self, checkpoint: Checkpoint | None) -> None:
        self._checkpoint = checkpoint

    def servers(self, servers: Sequence[Mapping[str, Any]]) -> None:
        """What is known of each rollout server."""
        self._servers = [ServerReport.model_validate(one) for one in servers]

    def bottleneck(self, verdict: Any) -> None:
        """What takes most of a step; None where that is not known."""
        if verdict is not None:
            share = f"{verdict.share:.2f}"
            self._bottleneck = Bottleneck(phase=verdict.phase, share=share, advice=verdict.advice)

    # --- read by anyone

    @property
    def phase(self) -> str:
        return self._phase

    @property
    def step(self) -> int:
        return self._step

    @property
    def checkpoint(self) -> Checkpoint | None:
        return self._checkpoint

    def progress(self) -> Progress:
        """What /progress serves. Before training its text is the phase; then it is the step."""
        remaining = None
        if self._pace is not None and self._total_steps is not None:
            remaining = self._pace * max(0, self._total_steps - self._step)
        return Progress(
            step=self._step,
            total_steps=self._total_steps,
            text=self._phase if self._total_steps is None else None,
            seconds_remaining=remaining,
            epoch=self._epoch,
            metrics=shown_metrics(self._metrics),
            time=self._step_time,
            checkpoint=self._checkpoint,
            rollout=self._servers,
            bottleneck=self._bottleneck,
        )

    def quiet(self) -> tuple[float, float]:
        """Seconds since the last sign of life, and how many of them the phase may take."""
        phase, quiet = self._phase, time.monotonic() - self._alive_at
        limit = self.stall_seconds if phase in SPEAKING else self.silent_seconds
        return quiet, limit + 2 * self.reward_seconds

    def health(self) -> tuple[bool, str]:
        """Whether this process gets on, and a sentence about it.

        It does not when its phase has given no sign of life for longer than that phase may be quiet.
        """
        quiet, limit = self.quiet()
        word = "ok" if quiet <= limit else "stuck"
        bound = f" (limit {limit:.0f})" if math.isfinite(limit) else ""
        return quiet <= limit, f"{word}: {self._phase}, step {self._step}, last sign of life {quiet:.0f} s ago{bound}"


def shown_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a step for /progress: the main ones first, for only so many are kept; without clocks."""
    known = [name for name in LINE_ORDER if name in metrics]
    others = sorted(name for name in metrics if name not in LINE_ORDER and not name.endswith("_seconds"))
    return {name: _number(metrics[name]) for name in known + others if name not in ("step", "epoch")}


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def read_checkpoints(run_dir: Path, claim: Path, algorithm: str) -> Checkpoint | None:
    """The checkpoints of the run in `run_dir`, as paths from the claim's root; None if there is none."""
    found = find_checkpoints(run_dir)
    best = best_of(found)
    if best is None:
        return None
    latest = found[-1]
    return Checkpoint(
        latest=str(latest.path.relative_to(claim)),
        latest_step=latest.step,
        best=str(best.path.relative_to(claim)),
        best_step=best.step,
        best_metric=_best_metric(best.state.get("metrics", {}), best.metric, algorithm),
    )


def published_checkpoints(published: PublishedCheckpoints, algorithm: str) -> Checkpoint | None:
    """The complete checkpoints of a run in a store, by their addresses; None if there is none.

    None too of other ranks than the first: they know those that were there when they began, which the job has long left behind.
    """
    entries = published.entries() if published.rank == 0 else []
    best = best_entry(entries)
    if best is None:
        return None
    latest = entries[-1]
    return Checkpoint(
        latest=published.checkpoint_uri(latest["name"]),
        latest_step=latest["step"],
        best=published.checkpoint_uri(best["name"]),
        best_step=best["step"],
        best_metric=_best_metric(best.get("metrics") or {}, best["metric"], algorithm),
    )


def _best_metric(metrics: Mapping[str, Any], metric: float | None, algorithm: str) -> str | None:
    """What made a checkpoint the best, by its own name: losses are compared with the sign turned."""
    if metric is None:
        return None
    for name, sign in (("validation_reward", 1.0), ("validation_loss", -1.0)):
        if metrics.get(name) == sign * metric:
            return f"{name}={sign * metric:.4g}"
    return f"{'reward' if algorithm == 'grpo' else 'metric'}={metric:.4g}"
