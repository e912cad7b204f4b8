"""activeDeadlineSeconds: a clock that runs while the job could train, and stands while it is suspended or queued."""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.turn import Turn


def enforce(turn: Turn) -> bool:
    limit = turn.spec.active_deadline_seconds
    if limit is None or turn.active_seconds() < limit:
        return False
    turn.fail(Cause.DEADLINE, reasons.DEADLINE_MESSAGE.format(seconds=int(turn.active_seconds()), limit=limit))
    return True


def wake(turn: Turn) -> None:
    """Look again when the deadline comes."""
    limit = turn.spec.active_deadline_seconds
    if limit is not None and turn.status.active_since:
        turn.wake_in(limit - turn.active_seconds() + 0.1)
