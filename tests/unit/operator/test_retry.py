"""When the next attempt starts."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rl.job.status import Checkpoint, JobStatus
from nemo_rl_operator.decide import decide
from nemo_rl_operator.policies.retry import MOST_FRUITLESS, delay_after
from unit.operator import make


@pytest.mark.parametrize(("failures", "delay"), [(1, 10), (2, 20), (3, 40), (6, 300), (900, 300)])
def test_counted_failures_wait_longer_and_longer(failures: int, delay: float) -> None:
    assert delay_after([make.record(1, "Error", True)], failures) == delay


@pytest.mark.parametrize(("rejections", "delay"), [(1, 5), (2, 10), (9, 300)])
def test_a_node_that_refuses_pods_is_not_asked_again_at_once(rejections: int, delay: float) -> None:
    assert delay_after([make.record(n, "NodeRejected", False) for n in range(1, rejections + 1)], 0) == delay


@pytest.mark.parametrize(("disruptions", "delay"), [(1, 0), (2, 5), (3, 10), (9, 300)])
def test_disruptions_in_a_row_without_progress_wait_too(disruptions: int, delay: float) -> None:
    attempts = [make.record(n, "Disrupted", False) for n in range(1, disruptions + 1)]
    assert delay_after(attempts, 0) == delay


def test_an_attempt_that_made_progress_breaks_the_row() -> None:
    attempts = [make.record(1, "Disrupted", False), make.record(2, "Disrupted", False, to_step=30)]
    attempts.append(make.record(3, "Disrupted", False))
    assert delay_after(attempts, 0) == 0


def test_so_does_one_that_lived_long() -> None:
    attempts = [make.record(n, "Disrupted", False, start_time=make.at(-500)) for n in range(1, 5)]
    assert delay_after(attempts, 0) == 0


def test_a_resumed_job_starts_at_once() -> None:
    assert delay_after([make.record(1, "Error", True), make.record(2, "Suspended", False)], 1) == 0


@pytest.mark.parametrize("skew", [-3600, -60, 0, 300, 3600])
def test_the_delay_is_counted_on_our_clock_whatever_the_node_thinks(skew: int) -> None:
    job, pod = make.resource(make.status(make.record(), phase="Running")), make.ended_pod(1, ended=make.at(skew))
    by_job = decide(make.seen(job, [make.failed_attempt(ended=-1)], [pod]), make.NOW)
    assert (by_job.status.reason, by_job.requeue_after) == ("BackOff", 9.0)
    by_pod = decide(make.seen(job, [make.attempt()], [pod]), make.NOW)
    assert (by_pod.status.reason, by_pod.requeue_after) == ("BackOff", 10.0)
    ended = make.ended_pod(0, ended=make.at(skew))
    assert decide(make.seen(job, [make.attempt()], [ended]), make.NOW).status.completion_time == make.at(0)


def test_a_time_in_the_future_that_version_1_took_from_a_node_is_not_waited_for() -> None:
    status = make.status(make.record(1, "Error", True, end_time=make.at(3600)), phase="Pending")
    decision = decide(make.seen(make.resource(status), [make.failed_attempt()], verified=1), make.NOW)
    assert (decision.requeue_after, decision.status.attempts[0].end_time) == (10.0, make.at(0))


def life(attempts: int, checkpoint_every: int | None, **pod: Any) -> JobStatus:
    """The status after so many disrupted attempts of a job with backoffLimit 0, each of five minutes."""
    status = make.status(make.record())
    for number in range(1, attempts + 1):
        if checkpoint_every and number % checkpoint_every == 0:
            status.checkpoint = Checkpoint(latest=f"x/{number}", latest_step=number)
        ended = make.ended_pod(143, number, **({"disruption": "EvictionByEvictionAPI: drained"} | pod))
        job = make.failed_attempt(number, ended=300 * number)
        snapshot = make.seen(make.resource(status, backoffLimit=0), [job], [ended], verified=number)
        status = decide(snapshot, make.later(300 * number + 1)).status
        if status.finished:
            break
        if status.attempt == number:  # it waits
            snapshot = make.seen(make.resource(status, backoffLimit=0), [job], [ended], verified=number)
            status = decide(snapshot, make.later(300 * number + 302)).status
    return status


def test_disruptions_without_any_new_checkpoint_count_in_the_end() -> None:
    status = life(300, None)
    assert status.phase == "Failed"
    assert status.attempt == MOST_FRUITLESS + 1
    assert status.failure is not None
    assert status.failure.cause == "Disrupted"
    assert "9th attempt in a row that ended without a new checkpoint" in (status.failure.message or "")


def test_disruptions_that_leave_new_checkpoints_never_count() -> None:
    status = life(40, MOST_FRUITLESS)
    assert (status.phase, status.attempt, status.counted_failures) == ("Starting", 41, None)


def test_a_node_that_refuses_pods_never_ends_the_job() -> None:
    status = life(40, None, exit_code=None, disruption="", reason="UnexpectedAdmissionError", message="unhealthy GPU")
    assert (status.phase, status.counted_failures) == ("Starting", None)
    assert "the node refused the pod: UnexpectedAdmissionError: unhealthy GPU" in (status.attempts[-2].message or "")
