"""What a trainer pod says is taken in carefully: cut to size, completed, and never trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

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
PATH = TEXT.map(lambda text: "run/" + text.replace("/", "-"))


@given(
    st.builds(
        TerminationMessage,
        kind=st.sampled_from(["result", "failure"]),
        message=TEXT,
        traceback=TEXT,
        cause=TEXT,
        metrics=st.dictionaries(TEXT, st.floats() | TEXT, max_size=70),
        checkpoint=st.builds(Checkpoint, latest=PATH, best=PATH),
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


NONSENSE = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(), max_size=2)
FORMATS = re.compile(r"\d{4}-\d\d-\d\d[Tt]([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


TIMES = st.text() | st.sampled_from(
    ["yesterday", "2026-02-30T00:00:00Z", "2026-01-01T25:00:00Z", "2026-01-01T00:00:60Z", "9999-12-31T23:59:59-23:59"]
)
CHECKPOINTS = NONSENSE | st.fixed_dictionaries(
    {}, optional={"latest": NONSENSE | st.sampled_from(["../../etc", "/etc", "a/../..", "x/1"]), "latestStep": NONSENSE}
)
SAID = st.fixed_dictionaries(
    {"step": st.integers(0, 9)},
    optional={
        "totalSteps": NONSENSE,
        "percent": NONSENSE,
        "secondsRemaining": NONSENSE,
        "eta": NONSENSE,
        "text": NONSENSE,
        "epoch": NONSENSE,
        "metrics": NONSENSE | st.dictionaries(st.text(), NONSENSE),
        "time": NONSENSE | TIMES,
        "checkpoint": CHECKPOINTS,
    },
)


@given(SAID)
def test_progress_with_nonsense_beside_the_step_still_tells_the_step(said: dict[str, Any]) -> None:
    progress = Progress.of_a_pod(said)
    assert progress.step == said["step"]
    status = JobStatus(progress=progress, checkpoint=progress.checkpoint).dump()
    told = status["progress"].get("time")
    assert told is None or FORMATS.fullmatch(told)
    assert not [text for text in texts(status) if UNFIT.search(text)]
    assert not any(".." in text or text.startswith("/") for text in texts(status.get("checkpoint")))
    json.dumps(status).encode()


@given(
    st.fixed_dictionaries(
        {"kind": st.just("result")},
        optional={
            "totalSteps": NONSENSE,
            "metrics": NONSENSE | st.dictionaries(st.text(), NONSENSE),
            "checkpoint": CHECKPOINTS,
            "exitCode": NONSENSE,
            "message": NONSENSE,
            "traceback": NONSENSE,
            "cause": NONSENSE,
        },
    )
)
def test_a_result_with_nonsense_in_it_is_a_result(said: dict[str, Any]) -> None:
    found = TerminationMessage.parse(json.dumps(said))
    assert found is not None
    assert found.kind == "result"
    assert not [text for text in texts(found.model_dump(mode="json")) if UNFIT.search(text)]


def test_a_text_of_a_pod_cannot_drive_a_terminal() -> None:
    said = "red \x1b[31malert\x1b[0m \x07 bell\r\n\u202eevil\x9b2J \x1b]0;title\x07 \ud800 end\x00"
    failure = TerminationMessage.parse(json.dumps({"kind": "failure", "message": said, "traceback": said}))
    assert failure is not None
    assert failure.message == "red alert  bell\nevil2J  \ufffd end"


def test_what_was_assigned_without_a_model_is_clean_when_it_is_written() -> None:
    status = JobStatus()
    status.message = "waiting \x1b[2J for \u202ea node"
    assert status.dump()["message"] == "waiting  for a node"
