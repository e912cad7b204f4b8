"""A finished job stays as it is; only what is left of it is cleaned up."""

from __future__ import annotations

from nemo_rl_operator.plan import Plan
from nemo_rl_operator.policies import queue, sidecars, ttl
from nemo_rl_operator.runtime import timestamps

LINGER_SECONDS = 300.0
"""How long the other pods of a job may take to end after index 0 succeeded."""


def settle(plan: Plan) -> None:
    live = plan.live_pods() or any(not a.finished for a in plan.snapshot.attempts.values())
    if live and plan.status.phase == "Failed":
        plan.stop_live()
    elif live:
        left = LINGER_SECONDS + (timestamps.seconds_until(plan.status.completion_time, plan.now) or 0.0)
        if left > 0:
            plan.wake_in(left)
        else:
            plan.stop_live()
    sidecars.release(plan)
    queue.finish(plan)
    ttl.expire(plan)
