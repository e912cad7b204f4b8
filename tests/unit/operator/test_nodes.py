"""Jobs of several nodes: starts that do not come about, hangs, and nodes that are lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_rl.job.status import Cause, Progress, TerminationMessage
from nemo_rl_operator.decide import Decision, decide
from nemo_rl_operator.plan import Create, Delete, Kind
from unit.operator import make

EIGHT: dict[str, Any] = {"resources": {"nodes": 8}}
STARTING = make.status(make.record(1), phase="Starting")
RUNNING = make.status(make.record(1, running_time=make.at(-20)), phase="Running")


def deleted(decision: Decision) -> list[str]:
    return [a.name for a in decision.actions if isinstance(a, Delete)]


def made(decision: Decision) -> list[str]:
    return [a.body["metadata"]["name"] for a in decision.actions if isinstance(a, Create) and a.kind is Kind.JOB]


def seven_and(late: Any) -> list[Any]:
    return [*(make.running_pod(1, index, scheduled_at=make.at(-25)) for index in range(7)), late]


# --- starts


def test_when_all_pods_ran_first_is_recorded_once() -> None:
    found = decide(make.seen(make.resource(STARTING), [make.attempt()], [make.running_pod()]), make.NOW)
    assert found.status.attempts[-1].running_time == make.at(0)
    again = decide(make.seen(make.resource(found.status), [make.attempt()], [make.running_pod()]), make.later(50))
    assert again.status.attempts[-1].running_time == make.at(0)


@pytest.mark.parametrize(
    "late",
    [make.pod(1, 7, waiting="ContainerCreating", scheduled_at=make.at(-25)), make.pod(1, 7, scheduled=False)],
    ids=["image", "no node"],
)
def test_a_late_pod_is_waited_for_until_the_time_is_over_and_then_costs_nothing(late: Any) -> None:
    resource = make.resource(STARTING, startupTimeoutSeconds=1000, backoffLimit=0, **EIGHT)
    waiting = decide(make.seen(resource, [make.attempt()], seven_and(late), warning_event=""), make.later(974))
    assert (waiting.status.phase, waiting.actions) == ("Starting", ())
    assert waiting.requeue_after is not None
    assert waiting.requeue_after <= 1.2
    over = decide(make.seen(resource, [make.attempt()], seven_and(late), warning_event=""), make.later(976))
    assert deleted(over) == ["x-1"]
    record = over.status.attempts[-1]
    assert (record.cause, record.counted) == ("StartupTimeout", False)
    assert late.name in (record.message or "")
    assert not over.status.finished


def test_starts_that_do_not_come_about_never_count_however_often() -> None:
    records = [make.record(n, "StartupTimeout", False) for n in range(1, 10)] + [make.record(10)]
    status = make.status(*records, phase="Starting")
    pods = [replace(p, attempt=10, controller="job-10", name=f"x-10-{p.index}") for p in seven_and(make.pod(1, 7))]
    found = decide(
        make.seen(make.resource(status, backoffLimit=0, **EIGHT), [make.attempt(10)], pods, warning_event=""),
        make.later(3600),
    )
    assert (found.status.attempts[-1].cause, found.status.finished) == ("StartupTimeout", False)
    assert not found.status.counted_failures


def test_a_job_that_holds_nothing_waits_for_its_nodes_as_long_as_it_takes() -> None:
    pods = [
        make.pod(1, index, scheduled=False, unschedulable="0/3 nodes are available: 3 Insufficient cpu.")
        for index in range(8)
    ]
    found = decide(make.seen(make.resource(STARTING, **EIGHT), [make.attempt()], pods), make.later(10**6))
    assert (found.status.phase, found.status.reason, found.actions) == ("Pending", "Unschedulable", ())


def test_the_time_does_not_run_in_a_queue_and_not_once_all_have_run() -> None:
    in_queue = make.seen(make.resource({}, queue="team", **EIGHT), workload=make.workload(), workload_read=True)
    queued = decide(in_queue, make.later(10**6))
    assert queued.status.phase == "Queued"
    assert Cause.STARTUP_TIMEOUT not in [attempt.cause for attempt in queued.status.attempts]
    missing = decide(
        make.seen(
            make.resource(RUNNING, **EIGHT), [make.attempt()], seven_and(make.pod(1, 7)), verified=1, warning_event=""
        ),
        make.later(10**6),
    )
    assert missing.status.attempts[-1].cause is None


def test_pods_that_gave_up_on_others_that_never_ran_are_no_error() -> None:
    status = STARTING
    for number in range(1, 6):  # four of these ended a job before
        pods = [make.ended_pod(1, number, index, started=make.at(-600)) for index in range(7)]
        status = make.status(*status.attempts[: number - 1], make.record(number), phase="Starting")
        seen = make.seen(
            make.resource(status, backoffLimit=0, **EIGHT), [make.failed_attempt(number)], pods, verified=number
        )
        status = decide(seen, make.NOW).status
        record = status.attempts[-1] if status.attempts[-1].number == number else status.attempts[-2]
        assert (record.cause, record.counted) == ("StartupTimeout", False), status
        assert "7 of 8 pods" in (record.message or "")
    assert not status.finished


@pytest.mark.parametrize(
    ("status", "pods", "cause"),
    [
        (RUNNING, [make.ended_pod(1, 1, index) for index in range(7)], "Error"),
        (STARTING, [make.ended_pod(40, 1, index) for index in range(7)], "UserError"),
        (STARTING, [make.ended_pod(137, 1, index, end_reason="OOMKilled") for index in range(7)], "OutOfMemory"),
        (STARTING, [make.ended_pod(1, 1, index) for index in range(8)], "Error"),
        (STARTING.model_copy(update={"progress": Progress(step=7)}), [make.ended_pod(1, 1, 0)], "Error"),
    ],
    ids=["ran before", "users", "memory", "all ran", "trained"],
)
def test_other_failures_stay_what_they_are(status: Any, pods: list[Any], cause: str) -> None:
    found = decide(make.seen(make.resource(status, **EIGHT), [make.failed_attempt()], pods), make.NOW).status
    assert found.attempts[0].cause == cause


# --- hangs


def stalled(rank: int, **fields: Any) -> Any:
    traceback = f"rank {rank}:\n" + "\n".join(f"  frame {n} of {rank}" for n in range(15))
    word = TerminationMessage(
        kind="failure", exit_code=1, cause="Stalled", message="no progress for 1800 s", traceback=traceback
    )
    return make.ended_pod(1, 1, rank, termination=word, **fields)


def test_a_hang_is_a_counted_failure_with_the_stacks_of_all_that_hung() -> None:
    followed = make.ended_pod(1, 1, 0, ended=make.at(-22), termination=TerminationMessage(
        kind="failure", exit_code=1, cause="RankFailed", message="another rank ended this run"))  # fmt: skip
    pods = [followed, stalled(1), stalled(2)]
    resource = make.resource(RUNNING, resources={"nodes": 3}, backoffLimit=0)
    status = decide(make.seen(resource, [make.failed_attempt()], pods), make.NOW).status
    assert status.attempts[0].cause == "Stalled"
    assert status.failure is not None
    assert (status.failure.cause, status.phase) == ("Stalled", "Failed")
    assert "no progress for 1800 s" in (status.failure.message or "")
    lines = (status.failure.traceback or "").splitlines()
    assert {"rank 1:", "rank 2:", "  frame 14 of 1", "  frame 14 of 2"} <= set(lines)
    assert len(lines) <= 20


# --- nodes that are lost


def lost_pod(index: int = 0) -> Any:
    return make.running_pod(1, index, deleting=True, gone_by=make.at(120))


def test_a_lost_node_is_waited_for_by_default() -> None:
    seen = make.seen(make.resource(RUNNING), [make.attempt()], [lost_pod()])
    found = decide(seen, make.later(10**6))
    assert (found.status.phase, found.status.reason, found.actions) == ("Pending", "PodLost", ())


def test_replace_starts_the_next_attempt_when_the_patience_is_over() -> None:
    resource = make.resource(RUNNING, onNodeLost="replace", backoffLimit=0)
    before = decide(make.seen(resource, [make.attempt()], [lost_pod()]), make.later(149))
    assert before.actions == ()
    assert before.requeue_after is not None
    after = decide(make.seen(resource, [make.attempt()], [lost_pod()], verified=1), make.later(151))
    assert deleted(after) == ["x-1"]
    assert made(after) == ["x-2"]
    assert (after.status.attempts[0].cause, after.status.attempts[0].counted) == ("NodeLost", False)
    assert "onNodeLost is replace" in (after.status.attempts[0].message or "")


def test_replace_waits_for_the_pods_of_the_other_nodes() -> None:
    resource = make.resource(RUNNING, onNodeLost="replace", resources={"nodes": 2})
    pods = [lost_pod(0), make.running_pod(1, 1)]
    found = decide(make.seen(resource, [make.attempt()], pods, verified=1), make.later(151))
    assert deleted(found) == ["x-1"]
    assert made(found) == []
    attempt = make.attempt(deleting=True)
    ending = [lost_pod(0), make.running_pod(1, 1, deleting=True, gone_by=make.at(300))]
    found = decide(
        make.seen(make.resource(found.status, onNodeLost="replace"), [attempt], ending, verified=1), make.later(160)
    )
    assert (found.status.phase, made(found)) == ("Starting", [])
    ended = [lost_pod(0), make.ended_pod(75, 1, 1, deleting=True)]
    found = decide(
        make.seen(make.resource(found.status, onNodeLost="replace"), [attempt], ended, verified=1), make.later(170)
    )
    assert made(found) == ["x-2"]


def test_a_job_that_is_suspended_on_a_lost_node_is_suspended_with_replace() -> None:
    status = make.status(make.record(1, running_time=make.at(-20)), phase="Running")
    resource = make.resource(status, onNodeLost="replace", suspend=True)
    first = decide(make.seen(resource, [make.attempt()], [make.running_pod()]), make.later(1))
    assert deleted(first) == ["x-1"]
    resource = make.resource(first.status, onNodeLost="replace", suspend=True)
    found = decide(make.seen(resource, [make.attempt(deleting=True)], [lost_pod()]), make.later(151))
    again = decide(
        make.seen(
            make.resource(found.status, onNodeLost="replace", suspend=True), [make.attempt(deleting=True)], [lost_pod()]
        ),
        make.later(152),
    )
    assert again.status.phase == "Suspended"
    assert again.status.attempts[0].cause == "Suspended"


# --- progress that cannot be read


def test_progress_that_cannot_be_read_is_said() -> None:
    seen = make.seen(make.resource(RUNNING), [make.attempt()], [make.running_pod()], unreadable="timed out")
    status = decide(seen, make.NOW).status
    assert status.phase == "Running"
    assert "progress cannot be read (timed out)" in (status.message or "")
    assert Cause.STARTUP_TIMEOUT == "StartupTimeout"
