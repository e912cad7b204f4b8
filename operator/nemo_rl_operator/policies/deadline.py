"""activeDeadlineSeconds: a clock that runs while the job could train, and stands while it is suspended or queued."""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.plan import Plan


def enforce(plan: Plan) -> bool:
    limit = plan.spec.active_deadline_seconds
    if limit is None or plan.active_seconds() < limit:
        return False
    plan.fail(Cause.DEADLINE, reasons.DEADLINE_MESSAGE.format(seconds=int(plan.active_seconds()), limit=limit))
    return True


def wake(plan: Plan) -> None:
    """Look again when the deadline comes."""
    limit = plan.spec.active_deadline_seconds
    if limit is not None and plan.status.active_since:
        plan.wake_in(limit - plan.active_seconds() + 0.1)
