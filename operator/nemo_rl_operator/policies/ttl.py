"""ttlSecondsAfterFinished: a finished job deletes itself, but not while its output is still served."""

from __future__ import annotations

from nemo_rl_operator.plan import Delete, Kind, Plan
from nemo_rl_operator.runtime import timestamps


def expire(plan: Plan) -> None:
    spec, status = plan.snapshot.spec, plan.status
    if spec.ttl_seconds_after_finished is None:
        return
    ended = timestamps.seconds_until(status.completion_time, plan.now)
    left = (ended or 0.0) + spec.ttl_seconds_after_finished
    served = timestamps.seconds_until(spec.output.serve_until, plan.now)
    left = max(left, served or 0.0)
    if left > 0:
        plan.wake_in(left)
    else:
        plan.actions.append(Delete(Kind.RESOURCE, plan.snapshot.resource.name, plan.snapshot.resource.uid))
