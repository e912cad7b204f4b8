"""spec.budget: what the pods of a job have used, and what happens once that is spent."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rl.job.status import JobStatus
from nemo_rl_operator.decide import Decision, decide
from nemo_rl_operator.observe import AttemptView, PodView
from nemo_rl_operator.plan import Create, Delete, Kind
from unit.operator import make

LIVE = make.status(make.record(), phase="Running")
ROLLOUT = {"engine": "vllm", "replicas": 2, "gpusPerReplica": 3}
HOUR = 3600


def seen(
    status: JobStatus, seconds: float, pods: list[PodView], jobs: list[AttemptView] | None = None, **spec: Any
) -> Decision:
    return decide(
        make.seen(make.resource(status, **spec), [make.attempt()] if jobs is None else jobs, pods, verified=1),
        make.later(seconds),
    )


def trainer(**more: Any) -> PodView:
    return make.pod(
        **{"phase": "Running", "ip": "10.0.0.1", "created": make.at(0), "scheduled_at": make.at(10), **more}
    )


def test_each_pod_counts_from_its_node_to_its_end_and_once() -> None:
    resources = {"nodes": 2, "gpusPerNode": 4}
    pods = [trainer(), trainer(index=1, scheduled_at=make.at(20), uid="p2", name="x-1-1-b")]
    first = seen(LIVE, 100, pods, resources=resources).status
    assert (first.gpu_seconds, first.gpu_seconds_time) == (4 * (90 + 80), make.at(100))
    ended = [trainer(phase="Failed", ended=make.at(130), exit_code=1), pods[1]]
    second = seen(first, 150, ended, resources=resources).status
    assert second.gpu_seconds == 4 * (90 + 80) + 4 * (30 + 50)
    assert seen(second, 500, [ended[0]], resources=resources).status.gpu_seconds == second.gpu_seconds


def test_replicas_count_with_the_gpus_that_each_has() -> None:
    replicas = [
        make.pod(0, n, name=f"x-rollout-{n}", controller="set", replica=True, phase="Running", created=make.at(0))
        for n in (0, 1)
    ]
    found = seen(LIVE, 100, [trainer(), *replicas], rollout=ROLLOUT, resources={"gpusPerNode": 1}).status
    assert found.gpu_seconds == 90 + 2 * 3 * 100


@pytest.mark.parametrize("skew", [-HOUR, HOUR])
def test_the_clock_of_a_node_counts_nothing_twice_and_nothing_that_has_not_been(skew: float) -> None:
    first = seen(LIVE, 100, [trainer(scheduled_at="")]).status
    assert first.gpu_seconds == 100
    ended = trainer(scheduled_at="", phase="Failed", exit_code=1, ended=make.at(120 + skew))
    assert seen(first, 130, [ended]).status.gpu_seconds in (100, 130)


def test_a_pod_that_waits_for_a_node_and_a_job_without_gpus_count_nothing() -> None:
    waits = make.pod(created=make.at(0), scheduled=False, unschedulable="0/1 nodes are available")
    assert seen(LIVE, 100, [waits]).status.gpu_seconds is None
    free = seen(LIVE, 100, [trainer()], resources={"gpusPerNode": 0}).status
    assert (free.gpu_seconds, free.gpu_seconds_time) == (None, None)


def test_counting_alone_is_no_news() -> None:
    first = seen(LIVE, 100, [trainer()]).status
    again = seen(first, 900, [trainer()])
    assert again.status.dump() == first.dump()
    told = seen(first, 900, [trainer(deleting=True, gone_by=make.at(1000))]).status
    assert told.gpu_seconds == 890


def test_a_spent_budget_suspends_with_its_reason_and_a_raised_one_goes_on() -> None:
    budget = {"gpuHours": 0.5}
    first = seen(LIVE, 100, [trainer()], budget=budget)
    assert first.status.phase == "Running"
    assert first.requeue_after == pytest.approx(HOUR / 2 - 90 + 1)
    spent = seen(first.status, HOUR / 2 + 10, [trainer()], budget=budget)
    assert spent.status.reason == "Stopping" and "budget of 0.5 GPU hours is spent" in (spent.status.message or "")
    assert [a.kind for a in spent.actions if isinstance(a, Delete)] == [Kind.JOB]
    ended = trainer(phase="Failed", exit_code=75, ended=make.at(HOUR / 2 + 30))
    held = seen(spent.status, HOUR / 2 + 31, [ended], [], budget=budget)
    status = held.status
    assert (status.phase, status.reason) == ("Suspended", "BudgetSpent")
    assert "0.5056 GPU hours are used, and budget.gpuHours is 0.5" in (status.message or "")
    assert "kubectl patch rlj x" in (status.message or "")
    assert [e.reason for e in held.events] == ["Suspended"]
    assert status.gpu_seconds == HOUR // 2 + 20
    later = seen(status, 10 * HOUR, [], [], budget=budget)
    assert later.status.dump() == status.dump() and not later.actions and not later.events
    for raised in ({"gpuHours": 1}, None):
        more = seen(status, 10 * HOUR, [], [], budget=raised)
        assert any(isinstance(a, Create) and a.kind is Kind.JOB for a in more.actions), "it goes on"
        assert more.status.gpu_seconds == status.gpu_seconds
