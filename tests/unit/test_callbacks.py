"""Callbacks: which objects are accepted, in which order they are called, and the ready-made ones."""

from __future__ import annotations

import io
import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.display.logs import log_lines
from nemo_rl.display.terminal import NullDisplay
from nemo_rl.trainers.callbacks import (
    HOOKS,
    Callback,
    CallbackList,
    CheckpointCallback,
    EarlyStoppingCallback,
    LoggingCallback,
    validate_callbacks,
)


class Recorder(Callback):
    def __init__(self, name: str, calls: list) -> None:
        for hook in HOOKS:
            setattr(self, hook, lambda *arguments, hook=hook: calls.append((name, hook, arguments)))


class OnlyStepEnd:
    """A callback by its shape alone."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, trainer, step, metrics) -> None:
        self.steps.append(step)


def test_all_are_called_in_order_with_their_arguments():
    calls: list = []
    both = CallbackList([Recorder("a", calls), Recorder("b", calls)])
    both.on_train_begin("trainer")
    both.on_epoch_begin("trainer", 0)
    both.on_step_begin("trainer", 1)
    both.on_step_end("trainer", 1, {"loss": 1})
    both.on_epoch_end("trainer", 0, {"loss": 1})
    both.on_train_end("trainer", "result")
    expected = [
        ("on_train_begin", ("trainer",)),
        ("on_epoch_begin", ("trainer", 0)),
        ("on_step_begin", ("trainer", 1)),
        ("on_step_end", ("trainer", 1, {"loss": 1})),
        ("on_epoch_end", ("trainer", 0, {"loss": 1})),
        ("on_train_end", ("trainer", "result")),
    ]
    assert calls == [(name, hook, arguments) for hook, arguments in expected for name in "ab"]


def test_hooks_that_are_absent_are_not_called():
    callback = OnlyStepEnd()
    callbacks = CallbackList([callback])
    callbacks.on_train_begin(None)
    callbacks.on_step_end(None, 4, {})
    callbacks.on_train_end(None, None)
    assert callback.steps == [4]


def test_exception_keeps_its_type_and_names_the_callback():
    class Broken(Callback):
        def on_step_end(self, trainer, step, metrics):
            raise KeyError("reward")

    with pytest.raises(KeyError) as caught:
        CallbackList([Callback(), Broken()]).on_step_end(None, 1, {})
    assert caught.value.__notes__ == [
        "in callback test_exception_keeps_its_type_and_names_the_callback.<locals>.Broken.on_step_end"
    ]


class Misspelled:
    def on_step_ended(self, trainer, step, metrics): ...


class TooFewArguments:
    def on_step_end(self, trainer, step): ...


class TooManyArguments:
    def on_train_begin(self, trainer, arguments, state): ...


class Coroutine:
    async def on_train_end(self, trainer, result): ...


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (Callback(), r"callbacks is an object of type Callback; give a list"),
        ("on_step_end", r"type str; give a list"),
        ([Callback(), 3], r"callbacks\[1\] is an object of type int, which has none of the hooks on_train_begin"),
        ([Callback], r"callbacks\[0\] is the class Callback; give an instance: Callback\(\.\.\.\)"),
        ([print], r"has none of the hooks"),
        ([lambda trainer: None], r"the function <lambda>"),
        ([None], r"type NoneType"),
        ([Misspelled()], r"did you mean on_step_end instead of on_step_ended"),
        ([TooFewArguments()], r"on_step_end\(trainer, step\) cannot .* on_step_end\(trainer, step, metrics\)"),
        ([TooManyArguments()], r"on_train_begin\(trainer\)"),
        ([Coroutine()], r"Coroutine\.on_train_end is async"),
    ],
)
def test_what_is_no_callback_is_refused_early(callbacks, message):
    with pytest.raises(TypeError, match=message):
        validate_callbacks(callbacks)
    with pytest.raises(TypeError, match=message):
        CallbackList(callbacks)


def test_what_is_a_callback_is_accepted_without_a_warning():
    class Flexible:
        def on_step_end(self, *arguments): ...

    class Helper(Callback):
        def on_reset(self): ...

    callbacks = (Callback(), OnlyStepEnd(), Flexible(), Helper(), SimpleNamespace(on_train_end=lambda *a: None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert validate_callbacks(callbacks) == list(callbacks)
        assert validate_callbacks(None) == validate_callbacks([]) == []


def test_misspelled_hook_beside_a_right_one_is_warned_about():
    class Nearly(Callback):
        def on_steps_end(self, trainer, step, metrics): ...

    with pytest.warns(UserWarning, match="on_steps_end is never called; did you mean on_step_end"):
        validate_callbacks([Nearly()])


# --- ready-made -----------------------------------------------------------------------------------------------------


def test_checkpoint_callback_saves_every_so_many_steps(tmp_path):
    saved: list = []
    trainer = SimpleNamespace(save_checkpoint=saved.append)
    callback = CheckpointCallback(every=2, path=str(tmp_path))
    for step in range(1, 6):
        callback.on_step_end(trainer, step, {})
    assert saved == [tmp_path / "step-00000002", tmp_path / "step-00000004"]


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
@pytest.mark.parametrize(
    "make", [lambda v: CheckpointCallback(v, "x"), LoggingCallback, lambda v: EarlyStoppingCallback(patience=v)]
)
def test_counts_below_one_are_refused(make, value):
    with pytest.raises(ValueError, match="at least 1"):
        make(value)


def test_logging_callback_writes_step_lines(caplog):
    own = logging.getLogger("test.own")
    with caplog.at_level(logging.INFO):
        for callback in (LoggingCallback(every=2), LoggingCallback(every=4, logger=own)):
            for step in range(1, 5):
                callback.on_step_end(None, step, {"step": step, "loss": 0.5})
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("nemo_rl.train", "step=2 loss=0.5"),
        ("nemo_rl.train", "step=4 loss=0.5"),
        ("test.own", "step=4 loss=0.5"),
    ]


def stop_step(callback: EarlyStoppingCallback, values: list, start: int = 1) -> int | None:
    trainer = SimpleNamespace(should_stop=False)
    for step, value in enumerate(values, start=start):
        callback.on_step_end(trainer, step, {} if value is None else {callback.metric: value})
        if trainer.should_stop:
            return step
    return None


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"patience": 2}, [1, 2, 3, 4], None),
        ({"patience": 2}, [1, 2, 2, 2], 4),
        ({"patience": 2}, [3, 1, 4, 1, 1], 5),
        ({"patience": 2}, [1, None, None, None, 0, None, 0], 7),  # only readings count
        ({"patience": 1, "min_delta": 0.5}, [1, 1.5], 2),
        ({"patience": 1, "min_delta": 0.5}, [1, 1.75, 2.5], None),
        ({"patience": 2}, [1, math.nan, math.inf], 3),
        ({"patience": 1, "metric": "validation/loss"}, [3, 2, 1, 1], 4),
        ({"patience": 1, "metric": "loss", "mode": "max"}, [1, 2, 1], 3),
        ({"patience": 1, "metric": "kl", "mode": "min"}, [3, 2, 3], 3),
    ],
)
def test_early_stopping(options, values, expected):
    assert stop_step(EarlyStoppingCallback(**options), values) == expected


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan, None]), max_size=12),
    st.integers(0, 12),
    st.integers(1, 4),
    st.sampled_from(["max", "min"]),
)
def test_early_stopping_is_the_same_after_a_resume(values, cut, patience, mode):
    whole = stop_step(EarlyStoppingCallback(patience=patience, mode=mode), values)
    first = EarlyStoppingCallback(patience=patience, mode=mode)
    stopped = stop_step(first, values[:cut])
    if stopped is None:
        second = EarlyStoppingCallback(patience=patience, mode=mode)
        CallbackList([second]).load_state_dict(json.loads(json.dumps(CallbackList([first]).state_dict())))
        stopped = stop_step(second, values[cut:], start=1 + len(values[:cut]))
    assert stopped == whole


def test_early_stopping_warns_when_its_metric_never_came():
    callback = EarlyStoppingCallback(metric="rewards")
    stop_step(callback, [None, None])
    with pytest.warns(UserWarning, match="'rewards', which no step of this run had"):
        callback.on_train_end(None, None)


def test_early_stopping_says_at_once_that_its_metric_is_misspelt():
    callback = EarlyStoppingCallback(metric="rewrd")
    metrics = {"loss": 1.0, "reward": 0.0, "reward_std": 0.0}
    with pytest.warns(UserWarning, match="'rewrd', which step 1 has not; did you mean 'reward'"):
        callback.on_step_end(SimpleNamespace(), 1, metrics)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_step_end(SimpleNamespace(), 2, metrics)


@pytest.mark.filterwarnings("error")
def test_early_stopping_waits_for_a_metric_of_validation_without_a_word():
    callback = EarlyStoppingCallback(metric="validation_reward")
    callback.on_step_end(SimpleNamespace(), 1, {"loss": 1.0, "reward": 0.0, "reward_std": 0.0})


@pytest.mark.parametrize("options", [{"mode": "most"}, {"min_delta": -1}])
def test_early_stopping_refuses_what_makes_no_sense(options):
    with pytest.raises(ValueError, match="found"):
        EarlyStoppingCallback(**options)


def test_state_goes_to_the_callback_that_it_came_from(caplog):
    first = EarlyStoppingCallback(patience=3)
    stop_step(first, [1.0])
    states = CallbackList([OnlyStepEnd(), first]).state_dict()
    second = EarlyStoppingCallback(patience=3)
    CallbackList([OnlyStepEnd(), second]).load_state_dict(states)
    assert (second.best, second.best_step) == (1.0, 1)
    assert caplog.text == ""
    for others in ([], [OnlyStepEnd(), OnlyStepEnd()]):
        CallbackList(others).load_state_dict(states)
        assert "callback 1 was EarlyStoppingCallback" in caplog.text
        caplog.clear()


class Puts(Callback):
    def __init__(self, value) -> None:
        self.value = value

    def on_step_end(self, trainer, step, metrics) -> None:
        metrics["mine"] = self.value


@pytest.mark.parametrize("value", [1, 0.5, float("nan"), "text", None, torch.tensor(2.0), numpy.float32(3), [1, 2]])
def test_what_a_callback_puts_into_the_metrics_may_be_what_a_log_can_hold(value):
    CallbackList([Puts(value)]).on_step_end(None, 1, {"step": 1})


@pytest.mark.parametrize(
    "value", [object(), {1}, b"bytes", torch.zeros(2), numpy.zeros(2)], ids=lambda v: type(v).__name__
)
def test_what_a_log_cannot_hold_is_refused_with_its_name(value):
    with pytest.raises(TypeError, match=f"found {type(value).__name__} as the metric 'mine' of step 3, .* convert it"):
        CallbackList([Puts(value)]).on_step_end(None, 3, {"step": 3})


# --- said while a run trains ----------------------------------------------------------------------------------------


class Lines(NullDisplay):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@contextmanager
def unconfigured() -> Iterator[logging.Logger]:
    """The library's logger as in a program that has configured nothing; pytest adds its handlers when a test begins."""
    root, library = logging.getLogger(), logging.getLogger("nemo_rl")
    handlers, root.handlers = root.handlers, []
    try:
        yield library
    finally:
        root.handlers = handlers
        assert library.handlers == []
        assert library.level == logging.NOTSET


def test_callbacks_and_early_stopping_speak_in_the_display_of_a_run():
    shown = Lines()
    early = EarlyStoppingCallback(metric="loss", patience=1)
    with unconfigured() as library, log_lines("info", shown.note):
        LoggingCallback().on_step_end(None, 1, {"loss": 0.5})
        assert stop_step(early, [1.0, 1.0]) == 2
        library.debug("not at this level")
        library.warning("the disk is nearly full")
    assert shown.notes == [
        "step=1 loss=0.5",
        "stopping early at step 2: loss has not improved since step 1 (best 1.0)",
        "warning: the disk is nearly full",
    ]


def test_debug_says_more_and_the_quiet_levels_leave_warnings_to_python(capsys):
    shown = Lines()
    with unconfigured(), log_lines("debug", shown.note):
        logging.getLogger("nemo_rl.model.policy").debug("a way of computing")
    assert shown.notes == ["debug: a way of computing"]
    for level, say in (("warning", shown.note), ("info", None)):
        with unconfigured() as library, log_lines(level, say):
            library.info("nothing of importance")
            library.warning("seen")
    assert len(shown.notes) == 1
    assert capsys.readouterr().err == "seen\nseen\n"


def test_a_program_that_has_configured_logging_gets_the_records_itself():
    shown, stream = Lines(), io.StringIO()
    with unconfigured() as library:
        logging.getLogger().addHandler(logging.StreamHandler(stream))
        with log_lines("info", shown.note):
            library.info("for the program")
        library.setLevel(logging.ERROR)
        with log_lines("debug", shown.note):
            library.warning("its own level stays")
        library.setLevel(logging.NOTSET)
    assert stream.getvalue() == "for the program\n"
    assert shown.notes == []
