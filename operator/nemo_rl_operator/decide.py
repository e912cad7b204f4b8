"""What to do about a job: a pure function of what was seen and of the time. This is the heart of the operator.

The checklist is gone through from the top until a step says that the matter is settled. All memory is in the status
and in the children, so the same sight gives the same decision, whoever asks and however often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from nemo_rl.job.status import JobStatus
from nemo_rl_operator.observe import Snapshot
from nemo_rl_operator.plan import Action, Event, Need, Plan
from nemo_rl_operator.policies import (
    accept,
    adopt,
    budget,
    deadline,
    finished,
    lost,
    outcome,
    queue,
    replicas,
    restored,
    retry,
    running,
    serve,
    sidecars,
    start,
    startup,
    suspend,
)

CHECKLIST: tuple[Callable[[Plan], bool], ...] = (
    accept.refuse_invalid,
    adopt.take_in_jobs,
    outcome.note_progress,
    restored.hold,  # before anything is made or called suspended
    deadline.keep_clock,  # before anything ends the job, which reads the clock
    outcome.conclude,
    lost.give_up,
    lost.replace,
    sidecars.release,  # once an attempt's end is recorded, and before the next one starts
    adopt.miss_deleted_job,
    suspend.suspend,  # before the deadline: what is being suspended is not failed for the time that it takes
    deadline.enforce,
    queue.give_way,
    startup.expire,
    running.report,
    start.wait_for_pods,
    queue.release,
    accept.report_block,
    retry.wait_out,
    accept.hold_invalid,
    start.wait_for_bundles,
    replicas.check,
    queue.wait_for_admission,
    start.confirm_end,
    start.start,
)


@dataclass(frozen=True)
class Decision:
    """What follows from a sight.

    `status` is right once `actions` are done, in their order; `events` are to be posted once it is written. With
    `needs`, the answer may change when those are read, so nothing is done before.
    """

    status: JobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    needs: frozenset[Need] = frozenset()


def report_failure(snapshot: Snapshot, now: datetime) -> Decision:
    """The decision where a call that it takes fails (`snapshot.blocked` says how): nothing is done but to say so."""
    plan = Plan(snapshot, now, snapshot.status.duplicate())
    accept.report_failure(plan)
    return Decision(plan.status, requeue_after=plan.wake)


def decide(snapshot: Snapshot, now: datetime) -> Decision:
    """The decision about what is seen at `now`. Touches nothing, asks nobody."""
    if snapshot.resource.deleting:
        return Decision(snapshot.status)  # its children go with it
    plan = Plan(snapshot, now, snapshot.status.duplicate())
    if snapshot.status.finished:
        finished.settle(plan)
    else:
        settled = any(step(plan) for step in CHECKLIST)
        assert settled, "the last step settles everything"
        if plan.status.finished:
            sidecars.release(plan)  # says when to look again; the end itself is no news that would come back
        deadline.wake(plan)
        queue.report_ready(plan)
    serve.serve(plan)
    replicas.keep(plan)
    budget.keep_account(plan)
    plan.status.observed_generation = snapshot.resource.generation
    return Decision(plan.status, tuple(plan.actions), tuple(plan.events), plan.wake, frozenset(plan.needs))
