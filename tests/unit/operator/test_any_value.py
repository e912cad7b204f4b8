"""No value of any field, and no text where a time is expected, makes `decide` raise: one job's oddities stay its own."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl.job.status import JobStatus, Progress
from nemo_rl_operator.decide import Decision, decide
from nemo_rl_operator.observe import AttemptView, Blocked, PodView
from nemo_rl_operator.runtime import timestamps
from unit.operator import make

SCHEMA = RLTrainingJobSpec.model_json_schema(by_alias=True)
EDGES = ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"]
EDGES += [
    "2026-01-01t00:00:00z",
    "2026-01-01T00:00:00.123456789Z",
    "2026-01-01T23:59:60Z",
    "yesterday",
    "",
    "0",
    "\x00",
]
TIMES = st.sampled_from(EDGES) | st.datetimes().map(lambda t: t.isoformat() + "Z") | st.text(max_size=40)
ODD: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | TIMES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def value(schema: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that a JSON schema describes, or nearly."""
    if "$ref" in schema:
        return value(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], depth + 1)
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if "anyOf" in schema:
        return st.one_of([value(part, depth) for part in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema and depth < 6:
        required = set(schema.get("required", ()))
        parts = {name: value(part, depth + 1) for name, part in schema["properties"].items()}
        return st.fixed_dictionaries(
            {n: p for n, p in parts.items() if n in required},
            optional={n: p for n, p in parts.items() if n not in required},
        )
    if kind == "array":
        return st.lists(value(schema.get("items", {}), depth + 1), max_size=2)
    if kind == "integer":
        low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63)
        return st.integers(max(low, schema.get("exclusiveMinimum", low)), high)
    if kind == "number":
        return st.floats(allow_nan=False) | st.integers(0, 2)
    if kind == "boolean":
        return st.booleans()
    if kind == "string":
        if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True).map(
                lambda text: text[: schema.get("maxLength", 99)]
            )
        return st.text(min_size=schema.get("minLength", 0), max_size=12) | TIMES
    return ODD


def one_field() -> st.SearchStrategy[dict[str, Any]]:
    """A valid spec with a field or two of any value."""
    changes = [
        st.fixed_dictionaries({name: value(part) | ODD})
        for name, part in SCHEMA["properties"].items()
        if name != "model"
    ]
    return st.lists(st.one_of(changes), min_size=1, max_size=2).map(
        lambda found: {k: v for d in found for k, v in d.items()}
    )


def sights(job: Any, **snapshot: Any) -> list[Decision]:
    """Decisions at each stage of a life."""
    stages: list[tuple[list[AttemptView], list[PodView]]] = [
        ([], []),
        ([make.attempt()], [make.pod()]),
        ([make.attempt()], [make.running_pod()]),
        ([make.attempt(suspended=True)], []),
        ([make.failed_attempt()], [make.ended_pod(1)]),
        ([make.attempt(complete=True)], [make.ended_pod(0)]),
    ]
    reads = {"verified": 1, "warning_event": "", "workload": None, "workload_read": True, "bundle_parts": frozenset()}
    return [decide(make.seen(job, *stage, **(reads | snapshot)), make.NOW) for stage in stages]


@MANY
@given(one_field(), st.sampled_from([None, "Running", "Succeeded", "Failed", "Suspended"]))
def test_any_value_of_any_field_of_the_spec(spec: dict[str, Any], phase: Any) -> None:
    status = make.status(make.record(), phase=phase) if phase else None
    job = replace(make.resource(status), spec=json.dumps(make.spec(**spec)))
    for decision in sights(job):
        assert decision.status.phase
        JobStatus.model_validate(decision.status.dump())


@pytest.mark.parametrize("time", EDGES)
def test_any_time_until_which_the_output_is_served(time: str) -> None:
    for status in (None, make.status(make.record()), make.status(make.record(1, "Succeeded"), phase="Succeeded")):
        assert sights(make.resource(status, output={"serveUntil": time}, ttlSecondsAfterFinished=5))


@MANY
@given(TIMES, TIMES, TIMES, TIMES)
def test_any_text_where_the_status_has_a_time(one: str, two: str, three: str, four: str) -> None:
    status = {
        "phase": "Running",
        "attempt": 1,
        "attempts": [{"number": 1, "job": "x-1", "startTime": one, "endTime": two, "cause": "Error", "counted": True}],
        "activeSince": three,
        "startTime": four,
        "completionTime": four,
        "conditions": [{"type": "Running", "status": "False", "reason": "PodFailed", "lastTransitionTime": four}],
    }
    for change in ({}, {"phase": "Succeeded"}, {"attempts": [{"number": 1, "job": "x-1", "startTime": one}]}):
        text = json.dumps(status | change)
        job = replace(make.resource(), status=text, phase=str((status | change)["phase"]))
        assert sights(job)
        assert sights(replace(job, spec=json.dumps(make.spec(activeDeadlineSeconds=5, ttlSecondsAfterFinished=5))))
        assert sights(job, blocked=Blocked("QuotaExceeded", "full", fatal=False))


TEXTS = [f.name for f in fields(PodView) if f.type == "str"]
JOB_TEXTS = [f.name for f in fields(AttemptView) if f.type == "str"]


@MANY
@given(st.data())
def test_any_text_that_pods_and_jobs_say(data: st.DataObject) -> None:
    words = TIMES | st.sampled_from(["Failed", "Pending", "Evicted", "{}", '{"kind": "failure", "exitCode": 999}'])
    said = {name: data.draw(words) for name in data.draw(st.sets(st.sampled_from(TEXTS), min_size=1, max_size=3))}
    said.pop("controller", None)
    pod = make.pod(**({"phase": "Failed", "deleting": data.draw(st.booleans())} | said))
    told = {name: data.draw(words) for name in data.draw(st.sets(st.sampled_from(JOB_TEXTS), max_size=2))}
    job = replace(make.attempt(failed=data.draw(st.booleans())), **{n: t for n, t in told.items() if n != "owner"})
    code = data.draw(st.none() | st.integers(-(2**31), 2**31))
    for seconds in (0, 31, 10**6):
        status = make.status(make.record(), phase="Running")
        snapshot = make.seen(make.resource(status), [job], [replace(pod, exit_code=code)], warning_event="", verified=1)
        decision = decide(snapshot, make.NOW + timedelta(seconds=seconds))
        JobStatus.model_validate(decision.status.dump())


@MANY
@given(TIMES)
def test_any_text_is_read_as_a_time_or_as_none(text: str) -> None:
    found = timestamps.seconds_until(text, make.NOW)
    assert found is None or abs(found) < 1e12


@pytest.mark.parametrize(("text", "far"), [("9999-12-31T23:59:59-23:59", 1), ("0001-01-01T00:00:00+23:59", -1)])
def test_a_time_beyond_the_calendar_is_far_away(text: str, far: int) -> None:
    found = timestamps.seconds_until(text, make.NOW)
    assert found is not None
    assert found * far > 1e9


@MANY
@given(st.integers(0, 2**53 - 1), st.none() | st.integers(0, 2**53 - 1), TIMES)
def test_any_progress(step: int, total: int | None, time: str) -> None:
    progress = Progress(step=step, total_steps=total, time=time[:40])
    job = make.resource(make.status(make.record(), phase="Running"))
    decide(make.seen(job, [make.attempt()], [make.running_pod()], progress), make.NOW)
