"""spec.suspend: stop the pods, which save on SIGTERM, and hold the job until it is false again."""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.policies import lost
from nemo_rl_operator.turn import Delete, Kind, Turn


def hold(turn: Turn) -> bool:
    if not turn.spec.suspend:
        return False
    attempt, record = turn.attempt, turn.record
    stopping = attempt is not None and turn.open
    if stopping or turn.live_pods():
        if attempt and not attempt.deleting and not attempt.finished:
            turn.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))
        else:
            lost.release(turn)
        if record and record.end_time is None:
            record.cause, record.counted = Cause.SUSPENDED, False
        turn.phase(turn.status.phase or "Starting", reasons.STOPPING, reasons.STOPPING_MESSAGE)
        return True
    turn.clock(False)
    if turn.status.phase != "Suspended":
        turn.event(reasons.EVENT_SUSPENDED, reasons.SUSPENDED_MESSAGE, key=str(turn.seen.resource.generation))
    turn.phase("Suspended", reasons.SUSPENDED, reasons.SUSPENDED_MESSAGE)
    return True
