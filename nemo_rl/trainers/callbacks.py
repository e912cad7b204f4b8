"""Callbacks: the user's hooks into a training run, three ready-made ones, and the list that calls them."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_rl.run.metrics import plain, step_line

if TYPE_CHECKING:
    from nemo_rl.api.result import TrainResult
    from nemo_rl.trainers.base import Trainer

logger = logging.getLogger(__name__)

HOOKS = ("on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_epoch_end", "on_train_end")

FOREIGN_HOOKS = frozenset(
    [
        "on_init_end",
        "on_log",
        "on_evaluate",
        "on_predict",
        "on_save",
        "on_substep_end",
        "on_prediction_step",
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_push_begin",
        "on_fit_start",
        "on_fit_end",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_train_batch_start",
        "on_train_batch_begin",
        "on_train_batch_end",
        "on_batch_begin",
        "on_batch_end",
        "on_validation_start",
        "on_validation_end",
        "on_validation_epoch_end",
        "on_validation_batch_end",
        "on_test_begin",
        "on_test_end",
        "on_before_backward",
        "on_after_backward",
        "on_save_checkpoint",
        "on_load_checkpoint",
        "on_exception",
    ]
)
"""Hooks that callbacks of transformers, Lightning and Keras have and ours do not."""


class Callback:
    """Base of callbacks; override what you need. Steps count from 1, epochs from 0.

    `trainer.should_stop = True` ends the run after the current step. A callback with `state_dict()` (JSON-able) and
    `load_state_dict(state)` keeps its state across a resume.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Before the first step, also of a resumed run."""

    def on_epoch_begin(self, trainer: Trainer, epoch: int) -> None:
        """Before the first step of a pass over the data."""

    def on_step_begin(self, trainer: Trainer, step: int) -> None:
        """Before a step, its generation included."""

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """After the optimizer's step, with the metrics that go to metrics.jsonl."""

    def on_epoch_end(self, trainer: Trainer, epoch: int, metrics: dict[str, float]) -> None:
        """After the last step of an epoch, cut short or not."""

    def on_train_end(self, trainer: Trainer, result: TrainResult) -> None:
        """After the last step, with the TrainResult."""


class CheckpointCallback(Callback):
    """Saves the trainer's state to `path/step-00000100` every `every` steps, besides the run's own checkpoints.

    What it saves is never pruned. Saved for `trainer.load_checkpoint` and `AutoModelForCausalLM.from_pretrained`.
    """

    def __init__(self, every: int, path: str | Path) -> None:
        self.every = _at_least_one("every", every)
        self.path = Path(path)

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        if step % self.every == 0:
            trainer.save_checkpoint(self.path / f"step-{step:08d}")


class EarlyStoppingCallback(Callback):
    """Ends the run when `metric` has not improved by more than `min_delta` in `patience` readings in a row.

    A reading is a step whose metrics have the metric: validation metrics are read only where they were measured.
    A reading that is not finite is no improvement. `mode` is max or min; auto is min for metrics whose name ends in
    loss, else max.
    """

    def __init__(
        self,
        metric: str = "reward",
        patience: int = 10,
        min_delta: float = 0.0,
        mode: Literal["auto", "max", "min"] = "auto",
    ) -> None:
        if mode not in ("auto", "max", "min"):
            raise ValueError(f"found mode={mode!r}; use auto, max or min")
        if min_delta < 0:
            raise ValueError(f"found min_delta={min_delta}; it is a distance, zero or more")
        self.metric = metric
        self.patience = _at_least_one("patience", patience)
        self.min_delta = min_delta
        self._sign = -1.0 if mode == "min" or (mode == "auto" and metric.endswith("loss")) else 1.0
        self.best: float | None = None
        self.best_step: int | None = None
        self.readings_without_improvement = 0
        self._warned = False

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            near = difflib.get_close_matches(self.metric, metrics, n=1, cutoff=0.8)
            if near and not self._warned:
                self._warned = True
                warnings.warn(
                    f"EarlyStoppingCallback watches {self.metric!r}, which step {step} has not; did you mean {near[0]!r}?",
                    stacklevel=2,
                )
            return
        value = metrics[self.metric]
        finite = value is not None and math.isfinite(value)
        if finite and (self.best is None or self._sign * (value - self.best) > self.min_delta):
            self.best, self.best_step, self.readings_without_improvement = float(value), step, 0
            return
        self.readings_without_improvement += 1
        if self.readings_without_improvement >= self.patience:
            trainer.should_stop = True
            logger.info(
                "stopping early at step %d: %s has not improved since step %s (best %s)",
                step, self.metric, self.best_step, self.best,
            )  # fmt: skip

    def on_train_end(self, trainer: Trainer, result: TrainResult) -> None:
        if self.best is None and self.readings_without_improvement == 0:
            warnings.warn(
                f"EarlyStoppingCallback watched {self.metric!r}, which no step of this run had; "
                "choose one of the metrics in metrics.jsonl",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_step": self.best_step,
            "readings_without_improvement": self.readings_without_improvement,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = state["best"]
        self.best_step = state["best_step"]
        self.readings_without_improvement = state["readings_without_improvement"]


class LoggingCallback(Callback):
    """Logs one readable line of metrics every `every` steps, at level INFO, to `logger` (default: nemo_rl.train)."""

    def __init__(self, every: int = 1, logger: logging.Logger | None = None) -> None:
        self.every = _at_least_one("every", every)
        self.logger = logger or logging.getLogger("nemo_rl.train")

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        if step % self.every == 0:
            self.logger.info("%s", step_line({"step": step, **metrics}))


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"found {name}={value!r}; give a whole number of at least 1")
    return value


# --- the list -------------------------------------------------------------------------------------------------------


class CallbackList(Callback):
    """Calls every callback in order. An exception carries a note with the callback's name, and ends the run."""

    def __init__(self, callbacks: Sequence[Any] | None = None) -> None:
        """Raises TypeError, as `validate_callbacks`."""
        self.callbacks = validate_callbacks(callbacks)

    def on_train_begin(self, trainer: Trainer) -> None:
        self._call("on_train_begin", trainer)

    def on_epoch_begin(self, trainer: Trainer, epoch: int) -> None:
        self._call("on_epoch_begin", trainer, epoch)

    def on_step_begin(self, trainer: Trainer, step: int) -> None:
        self._call("on_step_begin", trainer, step)

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        self._call("on_step_end", trainer, step, metrics)
        for name, value in metrics.items():
            try:
                json.dumps(plain(value))
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(
                    f"found {type(value).__name__} as the metric {name!r} of step {step}, which a callback has put there; "
                    "expected a number (a tensor of one element, too), text or None; convert it, for example with float()"
                ) from None

    def on_epoch_end(self, trainer: Trainer, epoch: int, metrics: dict[str, float]) -> None:
        self._call("on_epoch_end", trainer, epoch, metrics)

    def on_train_end(self, trainer: Trainer, result: TrainResult) -> None:
        self._call("on_train_end", trainer, result)

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each callback that has one, by its place and class."""
        states = [
            {"place": place, "class": _name(callback), "state": self._named(callback, "state_dict")}
            for place, callback in enumerate(self.callbacks)
            if hasattr(callback, "state_dict")
        ]
        for entry in states:
            try:
                json.dumps(entry["state"])
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"found a state_dict() of {entry['class']} that cannot be saved as JSON ({error}); expected numbers, texts, "
                    "lists and dicts of them; convert what it holds"
                ) from None
        return states

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Give each callback its state back; one that is gone or has changed places begins anew, with a warning."""
        for entry in states:
            place = entry["place"]
            callback = self.callbacks[place] if place < len(self.callbacks) else None
            if callback is None or _name(callback) != entry["class"] or not hasattr(callback, "load_state_dict"):
                logger.warning(
                    "callback %d was %s when the run was saved; its state is not restored", place, entry["class"]
                )
                continue
            self._named(callback, "load_state_dict", entry["state"])

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            if hasattr(callback, hook):
                self._named(callback, hook, *arguments)

    @staticmethod
    def _named(callback: Any, method: str, *arguments: Any) -> Any:
        try:
            return getattr(callback, method)(*arguments)
        except Exception as error:
            error.add_note(f"in callback {_name(callback)}.{method}")
            raise


def validate_callbacks(callbacks: Sequence[Any] | None) -> list[Any]:
    """The callbacks as a list; TypeError for what is none, before any work starts.

    A callback is an instance with at least one of the hooks, whether or not it derives from `Callback`. A hook that
    cannot take its arguments, or is a coroutine, is refused; a name close to a hook's is warned about.
    """
    if callbacks is None:
        return []
    if not isinstance(callbacks, (list, tuple)):
        raise TypeError(f"callbacks is {_described(callbacks)}; give a list of callbacks")
    for place, callback in enumerate(callbacks):
        where = f"callbacks[{place}]"
        if isinstance(callback, type):
            raise TypeError(f"{where} is the class {callback.__name__}; give an instance: {callback.__name__}(...)")
        hooks = [name for name in HOOKS if callable(getattr(callback, name, None))]
        strays = _misspelled(callback)
        if not hooks:
            hint = f" (did you mean {strays[0][1]} instead of {strays[0][0]}?)" if strays else ""
            raise TypeError(
                f"{where} is {_described(callback)}, which has none of the hooks {', '.join(HOOKS)}{hint}; "
                "derive from nemo_rl.Callback"
            )
        for name in hooks:
            _check_hook(f"{where}: {_name(callback)}.{name}", callback, name)
        for found, meant in strays:
            warnings.warn(f"{where}: {_name(callback)}.{found} is never called; did you mean {meant}?", stacklevel=2)
        if foreign := sorted(_foreign_hooks(callback).difference(found for found, _ in strays)):
            warnings.warn(
                f"{where}: {_name(callback)} has {', '.join(foreign)}, which {'is' if len(foreign) == 1 else 'are'} never "
                f"called; the hooks are {', '.join(HOOKS)}. Metrics come with on_step_end(trainer, step, metrics)",
                stacklevel=2,
            )
    return list(callbacks)


def _check_hook(where: str, callback: Any, name: str) -> None:
    hook = getattr(callback, name)
    if inspect.iscoroutinefunction(hook):
        raise TypeError(f"{where} is async, and would never run; make it a plain method")
    expected = list(inspect.signature(getattr(Callback, name)).parameters)[1:]
    try:
        found = inspect.signature(hook)
    except ValueError:
        return  # a callable without a signature, written in C: only the call can tell
    try:
        found.bind(*expected)
    except TypeError:
        raise TypeError(
            f"{where}{found} cannot take its arguments; it is called as {name}({', '.join(expected)}): "
            "callbacks derive from nemo_rl.Callback, those of other trainers have other hooks"
        ) from None


def _misspelled(callback: Any) -> list[tuple[str, str]]:
    """Methods that are no hook but nearly have the name of one, each with that name."""
    strays = []
    for name in dir(callback):
        if name.startswith("_") or name in HOOKS or hasattr(Callback, name):
            continue
        close = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.85)
        if close and callable(getattr(callback, name, None)):
            strays.append((name, close[0]))
    return strays


def _foreign_hooks(callback: Any) -> set[str]:
    """Methods with the names of hooks of other libraries, which its author expects to be called."""
    return {name for name in FOREIGN_HOOKS if callable(getattr(callback, name, None))}


def _name(callback: Any) -> str:
    return type(callback).__qualname__


def _described(value: Any) -> str:
    if inspect.isfunction(value):
        return f"the function {value.__name__}"
    return f"an object of type {type(value).__name__}"
