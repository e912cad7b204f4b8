"""A finished job stays as it is; only what is left of it is cleaned up."""

from __future__ import annotations

from nemo_rl_operator import timestamps
from nemo_rl_operator.policies import ttl
from nemo_rl_operator.turn import Turn

LINGER_SECONDS = 300.0
"""How long the other pods of a job may take to end after index 0 succeeded."""


def rest(turn: Turn) -> None:
    live = turn.live_pods() or any(not a.finished for a in turn.seen.attempts.values())
    if live and turn.status.phase == "Failed":
        turn.stop_live()
    elif live:
        left = LINGER_SECONDS + (timestamps.seconds_until(turn.status.completion_time, turn.now) or 0.0)
        if left > 0:
            turn.wake_in(left)
        else:
            turn.stop_live()
    ttl.expire(turn)
