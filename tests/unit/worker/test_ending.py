"""How errors become exit codes and last words."""

from __future__ import annotations

import errno
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.errors import DatasetError, NonFiniteTraining, RewardError, StorageError, TrainingInterrupted
from nemo_rl.job import names
from nemo_rl.job.status import TRACEBACK_LINES, Checkpoint, TerminationMessage
from nemo_rl.storage.errors import Missing, Unavailable
from nemo_rl.worker import ending
from nemo_rl.worker.bundles import BundleDigestMismatch, BundleError


def noted(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def of_the_hub(status: int) -> Exception:
    """The error of the hub's client for an answer with this status. Its HTTP library has had several names."""
    library = importlib.import_module(HfHubHTTPError.__mro__[1].__module__)
    answer = library.Response(status, request=library.Request("GET", "http://hub.invalid/model"))
    return HfHubHTTPError("no", response=answer)


def torch_memory() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        (RewardError("broken"), 40, "UserError"),
        (TypeError("reward takes 1"), 40, "UserError"),
        (ValueError("lr"), 40, "UserError"),
        (ImportError("peft"), 40, "UserError"),
        (BundleError("unsafe"), 40, "UserError"),
        (BundleDigestMismatch("other"), 40, "UserError"),
        (noted(KeyError("x"), "in callback Mine.on_step_end"), 40, "UserError"),
        (noted(KeyError("x"), "a note of somebody else"), 1, "KeyError"),
        (noted(OSError("server away"), "in callback Mine.on_step_end"), 1, "OSError"),
        (StorageError("there is no such bucket"), 40, "UserError"),
        (Missing("no such object"), 40, "UserError"),
        (Unavailable("the store was not reached"), 1, "Unavailable"),
        (DatasetError("columns"), 41, "BadData"),
        (NonFiniteTraining("nan"), 42, "NonFiniteTraining"),
        (TrainingInterrupted("saved", None, 3), 75, "Preempted"),
        (KeyboardInterrupt("saved"), 75, "Preempted"),
        (MemoryError(), 1, "OutOfMemory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "OutOfMemory"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "StorageExceeded"),
        (RuntimeError("write failed: No space left on device"), 1, "StorageExceeded"),
        (caused(ValueError("Cannot load the model"), ConnectionError("refused")), 1, "ValueError"),
        (caused(DatasetError("cannot be read"), TimeoutError()), 1, "DatasetError"),
        (caused(ValueError("Cannot load the model"), OfflineModeIsEnabled("offline")), 40, "UserError"),
        (RuntimeError("somewhere in torch"), 1, "RuntimeError"),
        (SystemExit(3), 1, "SystemExit"),
    ],
    ids=lambda value: repr(value) if isinstance(value, BaseException) else None,
)
def test_an_error_means_an_exit_code_and_a_cause(error: BaseException, code: int, cause: str):
    assert ending.meaning(error) == (code, cause)


def test_memory_of_a_gpu_means_out_of_memory():
    assert ending.meaning(torch_memory()) == (1, "OutOfMemory")


@pytest.mark.parametrize(("status", "code"), [(404, 40), (401, 40), (429, 1), (503, 1)])
def test_a_hub_that_says_no_is_final_and_one_that_is_away_is_not(status: int, code: int):
    assert ending.meaning(caused(ValueError("Cannot load the model"), of_the_hub(status)))[0] == code


def test_a_cause_that_the_error_hides_is_not_looked_at():
    def fail() -> None:
        try:
            raise ConnectionError
        except ConnectionError:
            raise ValueError("plain") from None

    with pytest.raises(ValueError, match="plain") as caught:
        fail()
    assert ending.meaning(caught.value)[0] == 40


def test_what_users_code_raises_while_it_is_loaded_is_theirs():
    with pytest.raises(ZeroDivisionError) as caught, ending.user_code("loading the reward"):
        raise ZeroDivisionError
    assert ending.meaning(caught.value) == (40, "UserError")


# --- tracebacks


def _deep(levels: int) -> None:
    if levels:
        _deeper(levels - 1)
    else:
        import json

        json.loads("{")  # raises far below, in a library


def _deeper(levels: int) -> None:
    _deep(levels)


def _traced(levels: int) -> BaseException:
    try:
        _deep(levels)
    except ValueError as error:
        return error
    raise AssertionError


def test_a_short_traceback_is_kept_as_it_is():
    lines = ending.traceback_of(_traced(1)).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any('json.loads("{")' in line for line in lines)
    assert lines[-1].startswith("json.decoder.JSONDecodeError")


def test_a_long_traceback_keeps_the_users_last_line_and_the_place_that_raised():
    text = ending.traceback_of(_traced(60))
    assert len(text.splitlines()) <= TRACEBACK_LINES
    assert 'json.loads("{")' in text
    assert "raw_decode" in text
    assert "  …" in text
    assert text.splitlines()[-1].startswith("json.decoder.JSONDecodeError")


def test_the_frames_of_this_package_above_the_users_are_left_out():
    def users() -> None:
        raise ZeroDivisionError("theirs")

    from nemo_rl.trainers.callbacks import Callback, CallbackList

    class Mine(Callback):
        def on_train_begin(self, trainer: object) -> None:
            users()

    try:
        CallbackList([Mine()]).on_train_begin(None)
    except ZeroDivisionError as error:
        error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
        text = ending.traceback_of(error)
    assert "callbacks.py" not in text
    assert "in on_train_begin" in text
    assert "ZeroDivisionError: theirs" in text


def test_a_rewards_own_traceback_is_the_one_that_is_told():
    error = RewardError(
        "reward raised KeyError", 'Traceback (most recent call last):\n  File "<r>", line 3\nKeyError: 1'
    )
    assert ending.traceback_of(error).splitlines()[-1] == "KeyError: 1"


@given(st.text(max_size=3000))
def test_any_text_becomes_a_traceback_that_fits(text: str):
    assert len(ending.shortened(text).splitlines()) <= TRACEBACK_LINES + 1  # exotic line ends count in Python alone


@given(st.text(max_size=6000), st.integers(0, 80))
def test_any_failure_fits_into_the_termination_log(text: str, levels: int):
    error = _traced(levels)
    error.args = (text,)
    word = ending.failure(error, step=3, checkpoint=Checkpoint(latest="a" * 500, best="b" * 500))
    encoded = word.encode()
    assert len(encoded.encode()) <= names.TERMINATION_LIMIT
    parsed = TerminationMessage.parse(encoded)
    assert parsed is not None
    assert parsed.cause == "UserError"


# --- the log


def test_the_first_word_stays(tmp_path: Path):
    log = tmp_path / "termination-log"
    log.touch()
    first = ending.failure(ValueError("first"), step=1, checkpoint=None)
    ending.write(first, log)
    ending.write(ending.failure(ValueError("second, and longer"), step=1, checkpoint=None), log)
    assert TerminationMessage.parse(log.read_text()) == first


def test_what_is_no_word_is_written_over(tmp_path: Path):
    log = tmp_path / "termination-log"
    log.write_text("bye! " * 1000)
    word = TerminationMessage(kind="result", total_steps=5)
    ending.write(word, log)
    assert TerminationMessage.parse(log.read_text()) == word


def test_of_many_processes_exactly_one_word_is_left_whole(tmp_path: Path):
    log = tmp_path / "termination-log"
    log.touch()
    code = (
        "import sys, pathlib; from nemo_rl.worker import ending\n"
        "word = ending.failure(ValueError(sys.argv[2] * 500), step=1, checkpoint=None)\n"
        "sys.stdin.read(); ending.write(word, pathlib.Path(sys.argv[1]))"
    )
    many = [
        subprocess.Popen([sys.executable, "-c", code, str(log), letter], stdin=subprocess.PIPE) for letter in "abcd"
    ]
    for process in many:
        process.communicate(timeout=60)
        assert process.returncode == 0
    word = TerminationMessage.parse(log.read_text())
    assert word is not None
    assert word.message in {letter * 500 for letter in "abcd"}


def test_a_log_that_cannot_be_written_does_not_change_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ending.write(TerminationMessage(kind="result"), tmp_path / "no" / "such" / "folder")
    assert "cannot write" in capsys.readouterr().err


def test_the_pods_log_has_the_whole_traceback_of_an_unexpected_error():
    error = _traced(30)
    told = ending.for_the_log(error, ending.failure(error, step=0, checkpoint=None))
    assert told.count("in _deeper") == 30
    assert told.splitlines()[-1].startswith("nemo-rl: Expecting")
