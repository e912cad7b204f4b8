"""The clock of activeDeadlineSeconds."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rl.job.status import JobStatus
from nemo_rl_operator.decide import decide
from nemo_rl_operator.observe import Blocked, Resource
from unit.operator import make

LIVE = make.status(make.record())
HOUR = 3600


def test_it_starts_when_a_pod_has_a_node_and_wakes_at_its_end() -> None:
    decision = decide(make.seen(make.resource(activeDeadlineSeconds=100)), make.NOW)
    assert decision.status.active_since is None
    job = make.resource(decision.status, activeDeadlineSeconds=100)
    full = make.pod(scheduled=False, unschedulable="0/2 nodes are available: 2 Insufficient nvidia.com/gpu.")
    waits = decide(make.seen(job, [make.attempt()], [full], warning_event=""), make.later(50))
    assert waits.status.active_since is None, "it waits for a node"
    bound = make.pod(created=make.at(0), scheduled_at=make.at(90))
    runs = decide(make.seen(job, [make.attempt()], [bound], warning_event=""), make.later(100))
    assert runs.status.active_since == make.at(90)
    assert decide(make.seen(job, [make.attempt()], [make.running_pod()]), make.NOW).requeue_after == 100.1


@pytest.mark.parametrize("skew", [-HOUR, HOUR])
def test_a_wrong_clock_of_the_node_changes_nothing(skew: int) -> None:
    pod = make.running_pod(created=make.at(-10), scheduled_at=make.at(skew))
    decision = decide(make.seen(make.resource(LIVE, activeDeadlineSeconds=100), [make.attempt()], [pod]), make.NOW)
    assert decision.status.phase == "Running"
    assert decision.status.active_since in (make.at(-10), make.at(0))


def test_a_wait_in_a_queue_longer_than_the_deadline_is_not_counted_when_it_is_admitted() -> None:
    status = make.status(make.record(start_time=make.at(-5 * HOUR)), phase="Queued", start_time=make.at(-5 * HOUR))
    job = make.resource(status, queue="team", activeDeadlineSeconds=HOUR)
    made = make.attempt(created=make.at(-5 * HOUR))
    pod = make.running_pod(created=make.at(0), scheduled_at=make.at(1))
    admitted = decide(make.seen(job, [made], [pod]), make.later(2))
    assert (admitted.status.phase, admitted.status.active_since) == ("Running", make.at(1))
    later = make.resource(admitted.status, queue="team", activeDeadlineSeconds=HOUR)
    assert decide(make.seen(later, [made], [pod]), make.later(HOUR)).status.phase == "Running"
    assert decide(make.seen(later, [made], [pod]), make.later(HOUR + 1)).status.reason == "DeadlineExceeded"


def test_a_preemption_by_kueue_is_not_counted_and_what_ran_before_only_once() -> None:
    status = make.status(make.record(), phase="Running", active_since=make.at(-600))
    made = make.attempt(created=make.at(-600))
    held = make.attempt(created=make.at(-600), suspended=True)

    def job(found: JobStatus) -> Resource:
        return make.resource(found, queue="team", activeDeadlineSeconds=HOUR)

    taken = decide(make.seen(job(status), [held], [], held=""), make.NOW)
    assert (taken.status.phase, taken.status.active_seconds, taken.status.active_since) == ("Queued", 600, None)
    pod = make.running_pod(created=make.at(1800))
    back = decide(make.seen(job(taken.status), [made], [pod]), make.later(1800))
    assert (back.status.active_seconds, back.status.active_since) == (600, make.at(1800))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"blocked": Blocked("QuotaExceeded", "waiting for quota q", fatal=False)}, "QuotaExceeded"),
        ({"blocked": Blocked("Refused", "a policy denies Job x-2", fatal=False)}, "Refused"),
        ({"bundle_parts": frozenset()}, "WaitingForBundles"),
    ],
)
def test_it_stands_still_while_no_pod_may_be_made(what: dict[str, Any], reason: str) -> None:
    ended = make.status(make.record(1, "Disrupted", False), active_since=make.at(-24))
    bundles = [{"name": "code", "sha256": "0" * 64, "configMaps": ["b-0"]}]
    job = make.resource(ended, activeDeadlineSeconds=30, bundles=bundles, created=make.at(-60))
    first = decide(make.seen(job, [make.failed_attempt()], verified=1, **what), make.NOW)
    assert (first.status.reason, first.status.active_seconds, first.status.active_since) == (reason, 4, None)
    later = make.resource(first.status, activeDeadlineSeconds=30, bundles=bundles, created=make.at(-60))
    again = decide(make.seen(later, [make.failed_attempt()], verified=1, **what), make.later(400))
    assert (again.status.phase, again.status.active_seconds) == ("Pending", 4)


def test_it_stands_still_in_the_back_off_and_while_pods_are_refused() -> None:
    ended = make.status(make.record(1, "Error", True, end_time=make.at(-1)), active_since=make.at(-5))
    job = make.resource(ended, activeDeadlineSeconds=10)
    waits = decide(make.seen(job, [make.failed_attempt(ended=-1)], [make.ended_pod(1)]), make.NOW)
    assert (waits.status.reason, waits.status.active_seconds) == ("BackOff", 4)
    live = make.resource(make.status(make.record(), active_seconds=4), activeDeadlineSeconds=5)
    full = "FailedCreate: exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1"
    refused = decide(make.seen(live, [make.attempt()], [], warning_event=full), make.later(100))
    assert (refused.status.reason, refused.status.active_seconds, refused.status.active_since) == (
        "QuotaExceeded",
        4,
        None,
    )


def test_a_job_that_is_suspended_on_a_lost_node_does_not_fail_by_its_deadline() -> None:
    status = make.status(make.record(), phase="Running", active_since=make.at(-20))
    job = make.resource(status, activeDeadlineSeconds=30, suspend=True)
    silent = make.running_pod(deleting=True, gone_by=make.at(-31))
    decision = decide(make.seen(job, [make.attempt(deleting=True)], [silent]), make.later(1000))
    assert (decision.status.phase, decision.status.reason) == ("Running", "Stopping")


def test_it_stands_still_while_suspended() -> None:
    status = make.status(make.record(1, "Suspended", False), phase="Running", active_since=make.at(-40))
    held = decide(make.seen(make.resource(status, activeDeadlineSeconds=100, suspend=True)), make.NOW)
    assert (held.status.active_seconds, held.status.active_since, held.requeue_after) == (40, None, None)
    resumed = decide(make.seen(make.resource(held.status, activeDeadlineSeconds=100), verified=1), make.later(1000))
    live = make.resource(resumed.status, activeDeadlineSeconds=100)
    runs = decide(make.seen(live, [make.attempt(2)], [make.running_pod(2)]), make.later(1000))
    assert (runs.status.active_since, runs.requeue_after) == (make.at(1000), 60.1)
    live = make.resource(runs.status, activeDeadlineSeconds=100)
    over = decide(make.seen(live, [make.attempt(2)], [make.running_pod(2)]), make.later(1060))
    assert over.status.failure is not None
    assert over.status.failure.cause == "DeadlineExceeded"


def test_it_stands_still_while_kueue_holds_the_job() -> None:
    status = make.status(make.record(), phase="Running", active_since=make.at(-40))
    held = make.attempt(suspended=True)
    decision = decide(make.seen(make.resource(status, queue="q", activeDeadlineSeconds=41), [held], held=""), make.NOW)
    assert (decision.status.phase, decision.status.active_seconds) == ("Queued", 40)
    assert decision.status.active_since is None


def test_it_can_be_raised() -> None:
    status = make.status(make.record(), phase="Running", active_since=make.at(-100))
    job = make.resource(status, activeDeadlineSeconds=200)
    assert decide(make.seen(job, [make.attempt()], [make.running_pod()]), make.NOW).status.phase == "Running"
