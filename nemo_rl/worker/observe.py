"""Watches a trainer from inside: the callback that reports steps, and the parts of a run that have no hook of their own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nemo_rl.run.metrics import SHOWN_SAMPLES, sample_line
from nemo_rl.trainers.base import Trainer
from nemo_rl.trainers.callbacks import Callback
from nemo_rl.worker import report as phases
from nemo_rl.worker.grace import Grace
from nemo_rl.worker.prometheus import TrainMetrics
from nemo_rl.worker.report import Report, published_checkpoints, read_checkpoints

SAMPLES_SECONDS = 10.0
"""Sample completions are said at the first and the last step, and no more often than this between: logs shall be short."""


class Observer(Callback):
    """Keeps `report` and `metrics` up to date, and says once how long the start took and whether a save will fit."""

    def __init__(self, report: Report, metrics: TrainMetrics, *, claim: Path, grace: Grace | None) -> None:
        """`claim` is the root of the output claim; `grace` is None where another process looks after the pod."""
        self._report, self._metrics = report, metrics
        self._claim, self._grace = claim, grace
        self._first = True
        self._sampled_at: float | None = None

    def on_train_begin(self, trainer: Any) -> None:
        self._report.begin(trainer.current_step, trainer.total_steps)
        self._metrics.begin(trainer.current_step, trainer.total_steps)
        self.saved(trainer)
        if self._grace is not None:
            self._say(trainer, self._grace.before(checkpoint_bytes(trainer.model), trainer.run_dir))

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        self._report.step_ended(step, metrics)
        self._report.bottleneck(getattr(trainer, "bottleneck", None))
        self._metrics.step_ended(step, metrics)
        if self._first:
            self._first = False
            self._say(trainer, startup_line(self._report.seconds, metrics["step_seconds"]))
        self._say_samples(trainer, step)
        if trainer.stored is not None and trainer.stored.checkpoints.take_news():
            self.saved(trainer)

    def on_train_end(self, trainer: Any, result: Any) -> None:
        if trainer.stored is not None:
            self.saved(trainer)
        self._report.enter(phases.FINISHED)

    def saved(self, trainer: Any, seconds: float | None = None) -> None:
        """Reads the checkpoints anew. `seconds`: how long the save took that was just made."""
        if trainer.stored is not None:
            checkpoint = published_checkpoints(trainer.stored.checkpoints, trainer.algorithm)
        else:
            checkpoint = read_checkpoints(trainer.run_dir, self._claim, trainer.algorithm)
        self._report.saved(checkpoint)
        if checkpoint is not None and checkpoint.latest_step is not None:
            self._metrics.saved(checkpoint.latest_step)
        if seconds is not None and self._grace is not None:
            self._say(trainer, self._grace.after(seconds))

    def _say_samples(self, trainer: Any, step: int) -> None:
        now = time.monotonic()
        if self._sampled_at is not None and now - self._sampled_at < SAMPLES_SECONDS and step < trainer.total_steps:
            return
        self._sampled_at = now
        for sample in trainer.samples[:SHOWN_SAMPLES]:
            self._say(trainer, sample_line(step, sample))

    @staticmethod
    def _say(trainer: Any, line: str | None) -> None:
        if line is not None:
            trainer.display.note(line)


def startup_line(seconds: dict[str, float], first_step: float) -> str:
    """`phase imports=… data=… model=… start=… first_step=…`: seconds from the process's begin to its first step."""
    parts = {
        "imports": seconds.get(phases.IMPORTING, 0.0),
        "data": seconds.get(phases.PREPARING_DATA, 0.0),
        "model": seconds.get(phases.LOADING_MODEL, 0.0),
        "start": seconds.get(phases.STARTING, 0.0),
        "first_step": first_step,
    }
    return "phase " + " ".join(f"{name}={value:.2f}" for name, value in parts.items())


def checkpoint_bytes(model: Any) -> int:
    """What a checkpoint of the model takes: all weights as they are, and two fp32 moments of each trained one."""
    parameters = list(model.parameters())
    weights: int = sum(p.numel() * p.element_size() for p in parameters)
    moments: int = sum(8 * p.numel() for p in parameters if p.requires_grad)
    return weights + moments


def observed(trainer: type[Trainer], report: Report, observer: Observer) -> type[Trainer]:
    """The trainer class, with the phases of its run and its signs of life on record. It trains as before."""

    class Observed(trainer):  # type: ignore[misc,valid-type]
        runs_inside = True  # all that a job writes lies below the folder with its name

        def _prepare(self, *args: Any, **kwargs: Any) -> Any:
            report.tell_ranks = self.ranks.announce_end
            with report.during(phases.PREPARING_DATA):
                return super()._prepare(*args, **kwargs)

        def _load(self, *args: Any, **kwargs: Any) -> Any:
            with report.during(phases.LOADING_MODEL):
                return super()._load(*args, **kwargs)

        def _start(self, *args: Any, **kwargs: Any) -> Any:
            with report.during(phases.STARTING):
                return super()._start(*args, **kwargs)

        def measure(self, *args: Any, **kwargs: Any) -> Any:
            with report.during(phases.EVALUATING):
                return super().measure(*args, **kwargs)

        def save_to(self, *args: Any, **kwargs: Any) -> Any:
            before = report.seconds.get(phases.SAVING, 0.0)
            with report.during(phases.SAVING):
                path = super().save_to(*args, **kwargs)
            observer.saved(self, report.seconds[phases.SAVING] - before)
            return path

        def note_servers(self, servers: list[dict[str, Any]]) -> None:
            super().note_servers(servers)
            report.servers(servers)

        def poll(self) -> None:
            report.beat()
            super().poll()

        def stop_requested(self) -> str | None:
            report.alive_at(self.ranks.heard_at)  # waiting for others is no progress, but theirs is
            return super().stop_requested()

    Observed.__name__ = trainer.__name__
    Observed.__qualname__ = trainer.__qualname__
    return Observed
