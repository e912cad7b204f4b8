"""Attempts that exist but are not in the status yet, or the other way round: the children are the truth."""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.classify import outcome, verdict
from nemo_rl_operator.turn import Need, Turn


def take_in_jobs(turn: Turn) -> bool:
    """Record attempts whose Job was made but whose beginning was never written; it may be gone already."""
    made = {*turn.seen.attempts, *([turn.seen.begun] if turn.seen.begun else [])}
    for number in sorted(made):
        attempt = turn.seen.attempts.get(number)
        if number < turn.number or (number == turn.number and turn.record):
            continue
        if turn.open:
            _close_superseded(turn)
        turn.begin(number, attempt.created if attempt and attempt.created else turn.time)
        turn.event(reasons.EVENT_STARTED, reasons.STARTING_MESSAGE.format(attempt=number), key=str(number))
    return False


def _close_superseded(turn: Turn) -> None:
    """A later attempt was started, so this one had ended; its end was decided but not written."""
    attempt = turn.attempt
    found = outcome(attempt, turn.pods, turn.spec.resources.nodes, True) if attempt else None
    if found is None or found.cause is None:
        turn.close(Cause.UNKNOWN, message="its end was not recorded")
    else:
        turn.close(found.cause, counted=verdict(found.cause) == "counted", message=found.message, found=found)


def miss_deleted_job(turn: Turn) -> bool:
    """The newest attempt's Job is gone although it had not ended: deleted by us to suspend, or by somebody else."""
    record = turn.record
    if record is None or not turn.open or turn.attempt is not None:
        return False
    if turn.seen.verified != turn.number:
        turn.needs.add(Need.ATTEMPT)
        return True
    if turn.live_pods():
        turn.phase(turn.status.phase or "Starting", reasons.ENDING, reasons.ENDING_MESSAGE.format(attempt=turn.number))
        return True
    cause = record.cause or (Cause.SUSPENDED if turn.spec.suspend else Cause.JOB_DELETED)
    turn.close(cause, message="" if cause == Cause.SUSPENDED else "its Job was deleted")
    return False
