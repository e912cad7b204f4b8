"""The clock of activeDeadlineSeconds."""

from __future__ import annotations

from nemo_rl_operator.decide import decide
from unit.operator import make


def test_it_starts_with_the_first_attempt_and_wakes_at_its_end() -> None:
    decision = decide(make.seen(make.resource(activeDeadlineSeconds=100)), make.NOW)
    assert decision.status.active_since == make.at(0)
    assert decision.requeue_after == 100.1


def test_it_stands_still_while_suspended() -> None:
    status = make.status(make.record(1, "Suspended", False), phase="Running", active_since=make.at(-40))
    held = decide(make.seen(make.resource(status, activeDeadlineSeconds=100, suspend=True)), make.NOW)
    assert (held.status.active_seconds, held.status.active_since, held.requeue_after) == (40, None, None)
    resumed = decide(make.seen(make.resource(held.status, activeDeadlineSeconds=100), verified=1), make.later(1000))
    assert resumed.status.active_since == make.at(1000)
    assert resumed.requeue_after == 60.1
    live = make.resource(resumed.status, activeDeadlineSeconds=100)
    over = decide(make.seen(live, [make.attempt(2)], [make.running_pod(2)]), make.later(1060))
    assert over.status.failure is not None
    assert over.status.failure.cause == "DeadlineExceeded"


def test_it_stands_still_while_kueue_holds_the_job() -> None:
    status = make.status(make.record(), phase="Running", active_since=make.at(-40))
    held = make.attempt(suspended=True)
    decision = decide(
        make.seen(make.resource(status, queue="q", activeDeadlineSeconds=41), [held], workload=""), make.NOW
    )
    assert (decision.status.phase, decision.status.active_seconds) == ("Queued", 40)
    assert decision.status.active_since is None


def test_it_can_be_raised() -> None:
    status = make.status(make.record(), phase="Running", active_since=make.at(-100))
    job = make.resource(status, activeDeadlineSeconds=200)
    assert decide(make.seen(job, [make.attempt()], [make.running_pod()]), make.NOW).status.phase == "Running"
