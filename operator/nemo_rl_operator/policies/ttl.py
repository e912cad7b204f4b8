"""ttlSecondsAfterFinished: a finished job deletes itself, but not while its output is still served."""

from __future__ import annotations

from nemo_rl_operator import timestamps
from nemo_rl_operator.turn import Delete, Kind, Turn


def expire(turn: Turn) -> None:
    spec, status = turn.seen.spec, turn.status
    if spec is None or spec.ttl_seconds_after_finished is None:
        return
    ended = timestamps.seconds_until(status.completion_time, turn.now)
    left = (ended or 0.0) + spec.ttl_seconds_after_finished
    served = timestamps.seconds_until(spec.output.serve_until, turn.now)
    left = max(left, served or 0.0)
    if left > 0:
        turn.wake_in(left)
    else:
        turn.actions.append(Delete(Kind.RESOURCE, turn.seen.resource.name, turn.seen.resource.uid))
