"""Whether the job can be run at all: the spec's validity, and names that somebody else has taken."""

from __future__ import annotations

from nemo_rl.job import names
from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons, timestamps
from nemo_rl_operator.turn import Turn

RETRY_SECONDS = 10.0


def refuse_invalid(turn: Turn) -> bool:
    """The API server checks most of it; what slips past its schema ends here, for a spec cannot be corrected later."""
    if turn.seen.spec is not None:
        turn.status.gpus = turn.spec.resources.nodes * turn.spec.resources.gpus_per_node
        if turn.seen.blocked is None or not (turn.seen.blocked.conflict or turn.seen.blocked.fatal):
            turn.condition("Accepted", True, reasons.ACCEPTED, reasons.ACCEPTED_MESSAGE)
        return False
    turn.condition("Accepted", False, Cause.INVALID_SPEC, turn.seen.problem)
    turn.fail(Cause.INVALID_SPEC, turn.seen.problem)
    return True


def report_block(turn: Turn) -> bool:
    """An object that could not be made: say why; the next turn tries again."""
    blocked = turn.seen.blocked
    if blocked is None:
        return False
    if blocked.fatal:
        turn.condition("Accepted", False, Cause.INVALID_SPEC, blocked.message)
        turn.fail(Cause.INVALID_SPEC, blocked.message)
        return True
    if blocked.conflict:
        turn.condition("Accepted", False, Cause.NAME_CONFLICT, blocked.message)
        since = turn.status.condition("Accepted")
        waited = -(timestamps.seconds_until(since.last_transition_time if since else None, turn.now) or 0.0)
        if waited >= names.BUNDLE_WAIT_SECONDS:
            minutes = names.BUNDLE_WAIT_SECONDS // 60
            message = reasons.CONFLICT_MESSAGE.format(message=blocked.message, minutes=minutes)
            turn.fail(Cause.NAME_CONFLICT, message)
            return True
    turn.phase("Pending", blocked.reason, blocked.message)
    turn.wake_in(RETRY_SECONDS)
    return True
