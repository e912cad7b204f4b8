"""What a trainer pod says is taken in carefully: cut to size, completed, and never trusted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nemo_rl.job import names
from nemo_rl.job.status import Checkpoint, Condition, Failure, JobStatus, Progress, TerminationMessage, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45.4, "45s"), (60, "1m"), (840, "14m"), (7500, "2h5m"), (7200, "2h"), (273600, "3d4h"), (-3, "0s")],
)
def test_durations_are_written_as_people_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_is_completed_from_what_is_given() -> None:
    found = Progress.model_validate_json('{"step": 120, "totalSteps": 500, "secondsRemaining": 840.7}')
    assert (found.text, found.percent, found.eta, found.seconds_remaining) == ("120/500", 24, "14m", 840)
    assert Progress(step=7).text == "7"


def test_what_the_trainer_gives_is_kept() -> None:
    found = Progress.model_validate({"step": 1, "totalSteps": 2, "text": "half", "percent": 49.9, "eta": "soon"})
    assert (found.text, found.percent, found.eta) == ("half", 49, "soon")


def test_metrics_become_short_texts_and_are_limited() -> None:
    found = Progress.model_validate(
        {"step": 1, "metrics": {"a": 0.123456789, "b": 3, "c": "x" * 99, "d": [1], "e": True}}
    )
    assert found.metrics == {"a": "0.123457", "b": "3", "c": "x" * 64}
    assert len(Progress.model_validate({"step": 1, "metrics": {str(i): i for i in range(1000)}}).metrics) == 64


@pytest.mark.parametrize(
    "lie",
    [
        {},
        {"step": -1},
        {"step": "many"},
        {"step": 1, "percent": 101},
        {"step": 2**60},
        {"step": 1, "metrics": "reward"},
        {"step": 1, "checkpoint": {"latestStep": -5}},
        {"step": 1.5},
        [],
    ],
)
def test_nonsense_is_refused(lie: object) -> None:
    with pytest.raises(ValidationError):
        Progress.model_validate_json(json.dumps(lie))


def test_unknown_fields_are_ignored() -> None:
    assert Progress.model_validate({"step": 1, "from": "a newer trainer"}).step == 1


def test_overlong_texts_are_cut_not_refused() -> None:
    failure = Failure(
        cause="c" * 100, message="m" * 5000, traceback="\n".join(f"line {i} " + "x" * 300 for i in range(40))
    )
    assert len(failure.cause) == 64
    assert failure.message is not None
    assert len(failure.message) == 1024
    assert failure.traceback is not None
    assert failure.traceback.splitlines()[-1].startswith("line 39 ")
    assert len(failure.traceback.splitlines()) <= 20
    assert len(failure.traceback) <= 4096


TEXT = st.text(max_size=3000)


@given(
    st.builds(
        TerminationMessage,
        kind=st.sampled_from(["result", "failure"]),
        message=TEXT,
        traceback=TEXT,
        cause=TEXT,
        metrics=st.dictionaries(TEXT, st.floats() | TEXT, max_size=70),
        checkpoint=st.builds(Checkpoint, latest=TEXT, best=TEXT),
        exit_code=st.none() | st.integers(0, 255),
    )
)
def test_a_termination_message_always_fits_and_keeps_what_matters(message: TerminationMessage) -> None:
    text = message.encode()
    assert len(text.encode()) <= names.TERMINATION_LIMIT
    found = TerminationMessage.parse(text)
    assert found is not None
    assert (found.kind, found.exit_code, found.cause) == (message.kind, message.exit_code, message.cause)


def test_a_short_message_is_not_changed() -> None:
    message = TerminationMessage(kind="failure", message="no", traceback="a\nb", exit_code=40, metrics={"r": "1"})
    assert TerminationMessage.parse(message.encode()) == message


@pytest.mark.parametrize("text", [None, "", "Killed", "[1]", '{"kind": "boast"}', "[" * 100_000, '{"kind":'])
def test_what_is_no_message_is_none(text: str | None) -> None:
    assert TerminationMessage.parse(text) is None


def test_a_status_survives_its_way_through_the_api() -> None:
    condition = Condition(
        type="Finished", status="False", reason="Starting", last_transition_time="2026-01-01T00:00:00Z"
    )
    status = JobStatus(phase="Running", attempt=1, conditions=[condition], progress=Progress(step=1))
    assert JobStatus.load(status.dump()) == status
    assert "attempts" not in status.dump(), "empty lists are not written"


def test_a_broken_field_of_a_status_does_not_hide_the_others() -> None:
    found = JobStatus.load({"phase": "Dancing", "attempt": 2, "conditions": "none", "attempts": [{"number": 0}]})
    assert (found.phase, found.attempt, found.conditions, found.attempts) == (None, 2, [], [])


def test_the_largest_status_is_small() -> None:
    long = "é" * 5000
    checkpoint = Checkpoint(latest=long, best=long, best_metric=long)
    metrics = {f"{i:064d}": "x" * 64 for i in range(64)}
    attempts = [{"number": n, "job": "j" * 63, "cause": long, "message": long} for n in range(1, 11)]
    status = JobStatus.model_validate(
        {
            "phase": "Failed",
            "message": long,
            "progress": {"step": 1, "metrics": metrics, "text": long, "eta": long},
            "checkpoint": checkpoint,
            "result": {"metrics": metrics, "checkpoint": checkpoint},
            "failure": {"cause": long, "message": long, "traceback": long},
            "attempts": attempts,
        }
    )
    assert len(json.dumps(status.dump(), ensure_ascii=False).encode()) < 64_000
