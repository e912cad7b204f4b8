"""The loop over steps: trains, measures, tells and saves each one, so that a run that is cut off anywhere goes on exactly there."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_rl.data.prepare import Prepared, batches
from nemo_rl.display.trackers import State, Trackers, flat_settings, open_trackers
from nemo_rl.errors import TrainingInterrupted
from nemo_rl.run.checkpoint import Checkpoint, CheckpointStore
from nemo_rl.run.metrics import MetricsLog
from nemo_rl.run.signals import Interrupted

if TYPE_CHECKING:
    from nemo_rl.trainers.base import Trainer


@dataclass
class OpenStep:
    """A step whose weights have moved, but which is not finished. Plain values: a checkpoint may hold one."""

    metrics: dict[str, Any]
    samples: list[dict[str, Any]]
    metric: float | None = None
    """What checkpoints are compared by, once the validation data has been scored; higher is better."""
    measured: bool = False
    """Whether the validation data has been scored."""
    told: bool = False
    """Whether its line is written and callbacks have seen it. What may be left is the measurement of a stopped run."""


class Loop:
    """Takes a trainer from its current step to the last one.

    A signal can end a step before its weights move, and then the next run makes it anew; or after that, while the
    validation data is scored, and then the checkpoint holds the open step, which the next run finishes first.
    """

    def __init__(
        self,
        trainer: Trainer,
        store: CheckpointStore,
        data: Prepared,
        validation: Prepared | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        """`checkpoint` is the one that the trainer has loaded, None at the start of a run."""
        self.trainer, self.store, self.data, self.validation = trainer, store, data, validation
        state = checkpoint.state if checkpoint else {}
        self.metrics: dict[str, Any] = dict(state.get("metrics", {}))
        """Those of the last step that is finished."""
        self.open = OpenStep(**state["open_step"]) if state.get("open_step") else None
        self.steps_per_epoch = -(-len(data.examples) // trainer.training.batch_size)
        self.total_steps = trainer.total_steps
        self.metrics_log: MetricsLog | None = None
        self.trackers: Trackers | None = None
        self.ended: State = "failed"
        """How the run has ended, for the trackers."""
        if trainer.ranks.is_first:
            logged = trainer.current_step - 1 if self.open and not self.open.told else trainer.current_step
            wanted = trainer.training.report_to
            board = trainer.training.tensorboard or "tensorboard" in wanted
            settings = flat_settings(trainer.record({})) if board else None
            self.metrics_log = MetricsLog(
                trainer.run_dir, resume_step=logged, tensorboard=board, lease=trainer.lease, settings=settings
            )
            if others := [name for name in dict.fromkeys(wanted) if name != "tensorboard"]:
                self.trackers = open_trackers(others, trainer.run_dir, trainer.record({}), trainer.display.note)
        self._has_start = bool(self.metrics_log and self.metrics_log.has_start)
        if trainer.ranks.size > 1:
            self._has_start = trainer.ranks.first(lambda: self._has_start)
        self._orders: dict[int, list[list[int]]] = {}
        """The batches of epochs, as row numbers: of the one that is trained, and of those that rollouts have run ahead to."""
        trainer.batch_of = self.batch_of
        self._unsaved = False
        self._settled_callbacks: Any = None

    def close(self) -> None:
        if self.metrics_log is not None:
            self.metrics_log.close()
        if self.trackers is not None:
            self.trackers.close(self.ended)

    def run(self) -> None:
        """Returns after the last step, or after the one in which a callback asked to stop. Raises Interrupted."""
        trainer = self.trainer
        self._measure_the_start()
        while True:
            if self.open is None:
                if trainer.current_step >= self.total_steps or trainer.should_stop:
                    self.ended = "finished"
                    return
                self.open = self._train(trainer.current_step + 1)
            self._finish(self.open)

    # ------------------------------------------------------------------ one step

    def batch_of(self, step: int) -> tuple[int, list[Any]]:
        """Returns the epoch and the examples of any step from the current one on."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if epoch not in self._orders:
            training, now = self.trainer.training, max(0, self.trainer.current_step - 1) // self.steps_per_epoch
            self._orders = {known: order for known, order in self._orders.items() if known >= now}
            self._orders[epoch] = batches(
                len(self.data.examples), training.batch_size, training.seed, training.shuffle, epoch
            )
        return epoch, [self.data.examples[i] for i in self._orders[epoch][position]]

    def _train(self, step: int) -> OpenStep:
        trainer = self.trainer
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if position == 0:
            trainer.callbacks.on_epoch_begin(trainer, epoch)
        trainer.callbacks.on_step_begin(trainer, step)
        trainer.ranks.together(trainer.check_may_go_on)
        metrics = trainer.make_step(step, *self.batch_of(step))
        trainer.current_step = step
        self._unsaved = True
        return OpenStep(metrics, trainer.samples)

    def _finish(self, opened: OpenStep) -> None:
        trainer, training = self.trainer, self.trainer.training
        step = trainer.current_step
        scheduled = step == self.total_steps or _due(step, training.save_every)
        if not opened.told:
            if scheduled or _due(step, training.eval_every):
                self._measure(opened)
            self._tell(opened)
        if scheduled or trainer.should_stop:
            if (
                self.validation is not None and not opened.measured
            ):  # a callback stopped the run after its line was written
                self._measure(opened)
                if self.metrics_log is not None:
                    self.metrics_log.replace(opened.metrics)
                    if self.trackers is not None:
                        self.trackers.log(opened.metrics)
            if self.metrics_log is not None:
                self.metrics_log.sync()
            own_metric = trainer.take_checkpoint_metric()
            self._save(opened.metrics, opened.metric if self.validation is not None else own_metric)
        self.metrics, self.open = opened.metrics, None
        self._settled_callbacks = copy.deepcopy(trainer.callbacks.state_dict())

    def _measure_the_start(self) -> None:
        """Scores the validation data before the first step, as step 0: what training began from."""
        if self.validation is None or self.trainer.current_step > 0 or self._has_start:
            return
        found, _ = self.trainer.measure(self.validation)
        if self.metrics_log is not None:
            self._log({"step": 0, "epoch": 0, **found})
        self.trainer.display.note(f"before the first step: {_as_words(found)}")

    def _measure(self, opened: OpenStep) -> None:
        if self.validation is not None and not opened.measured:
            found, opened.metric = self.trainer.measure(self.validation)
            opened.measured = True
            opened.metrics |= found

    def _log(self, metrics: dict[str, Any]) -> None:
        assert self.metrics_log is not None
        self.metrics_log.log(metrics)
        if self.trackers is not None:
            self.trackers.log(metrics)

    def _tell(self, opened: OpenStep) -> None:
        trainer, step = self.trainer, self.trainer.current_step
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self.metrics_log is not None:
            self._log(opened.metrics)
            self.metrics_log.log_completions(step, opened.samples)
        trainer.display.step(opened.metrics, opened.samples)
        trainer.callbacks.on_step_end(trainer, step, opened.metrics)
        trainer.agree_to_stop()
        if position == self.steps_per_epoch - 1 or step == self.total_steps or trainer.should_stop:
            trainer.callbacks.on_epoch_end(trainer, epoch, opened.metrics)
            trainer.agree_to_stop()
        opened.told, self._unsaved = True, True

    # ------------------------------------------------------------------ checkpoints

    def _save(self, metrics: dict[str, Any], metric: float | None, **state: Any) -> None:
        trainer = self.trainer
        about = {"metrics": _numbers(metrics), "open_step": None, "should_stop": trainer.should_stop}
        trainer.save_to(self.store, {**trainer.state(), **about, **state}, metric)
        self._unsaved = False

    def interrupted(self, interrupted: Interrupted) -> BaseException:
        """Saves what was done, and returns what to raise. What was cut off is made anew by the next run.

        Such a checkpoint has no metric: an unbroken run would not have measured it, and chooses the same best one.
        """
        trainer = self.trainer
        self.ended = "stopped"
        trainer.agree_to_stop()
        if self._unsaved and self.open is not None:
            opened = dataclasses.replace(self.open, metrics=_numbers(self.open.metrics))
            self._save(self.metrics, None, open_step=dataclasses.asdict(opened))
        elif self._unsaved:  # what callbacks did since the last step they do again
            self._save(self.metrics, None, callbacks=self._settled_callbacks, should_stop=False)
        self.store.settle()
        latest = self.store.latest()
        if latest is not None and latest.step != trainer.current_step:
            latest = None  # with a store, where it went is known on the first node alone; others may have the one that they began with
        path = str(latest.path) if latest else None
        shown = self.store.shown(latest.path) if latest else None
        if path or trainer.current_step:
            where = f"saved step {trainer.current_step}" + (f" to {shown}" if shown else "")
        else:
            where = "before the first step; nothing to save"
        message = f"stopped by {interrupted.signal}; {where}. Run the same call again to go on"
        if interrupted.signal == "SIGINT":
            return KeyboardInterrupt(message)
        return TrainingInterrupted(message, path, trainer.current_step)


def _as_words(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if not name.endswith("_seconds"))


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with the number in place of a tensor or array of one element, such as a callback may have added."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
