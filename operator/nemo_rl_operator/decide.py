"""What to do about a job: a pure function of what is seen and of the time. This is the heart of the operator.

The checklist is gone through from the top until a step says that the matter is settled. All memory is in the status
and in the children, so the same sight gives the same decision, whoever asks and however often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from nemo_rl.job.status import JobStatus
from nemo_rl_operator.observe import Observed
from nemo_rl_operator.policies import (
    accept,
    adopt,
    deadline,
    ended,
    finished,
    follow,
    lost,
    retry,
    serve,
    start,
    suspend,
)
from nemo_rl_operator.turn import Action, Event, Need, Turn

CHECKLIST: tuple[Callable[[Turn], bool], ...] = (
    accept.refuse_invalid,
    adopt.take_in_jobs,
    ended.note_progress,
    ended.conclude,
    lost.give_up,
    adopt.miss_deleted_job,
    deadline.enforce,
    suspend.hold,
    follow.follow,
    start.wait_for_pods,
    accept.report_block,
    retry.wait_out,
    start.wait_for_bundles,
    start.confirm_end,
    start.start,
)


@dataclass(frozen=True)
class Decision:
    """What follows from a sight.

    `status` is right once `actions` are done, in their order; `events` are to be posted once it is written. With
    `needs`, the answer may change when those are read; `blocking` needs must be read before anything is done.
    """

    status: JobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    needs: frozenset[Need] = frozenset()


def decide(seen: Observed, now: datetime) -> Decision:
    """The decision about what is seen at `now`. Touches nothing, asks nobody."""
    if seen.resource.deleting:
        return Decision(seen.status)  # its children go with it
    turn = Turn(seen, now, seen.status.model_copy(deep=True))
    if seen.status.finished:
        finished.rest(turn)
    else:
        settled = any(step(turn) for step in CHECKLIST)
        assert settled, "the last step settles everything"
        if seen.spec is not None:
            deadline.wake(turn)
    serve.serve(turn)
    turn.status.observed_generation = seen.resource.generation
    return Decision(turn.status, tuple(turn.actions), tuple(turn.events), turn.wake, frozenset(turn.needs))
