"""Whether the job can be run at all: the spec's validity, and names that somebody else has taken."""

from __future__ import annotations

from nemo_rl.job import names
from nemo_rl.job.status import Cause
from nemo_rl_operator import children, reasons
from nemo_rl_operator.plan import Delete, Kind, Plan
from nemo_rl_operator.runtime import timestamps

RETRY_SECONDS = 10.0


def refuse_invalid(plan: Plan) -> bool:
    """The API server checks most of it; what slips past its schema ends here, for a spec cannot be corrected later."""
    if plan.snapshot.spec is not None:
        plan.status.gpus = plan.spec.resources.nodes * plan.spec.resources.gpus_per_node
        if plan.snapshot.blocked is None or not (plan.snapshot.blocked.conflict or plan.snapshot.blocked.fatal):
            plan.condition("Accepted", True, reasons.ACCEPTED, reasons.ACCEPTED_MESSAGE)
        return False
    plan.condition("Accepted", False, Cause.INVALID_SPEC, plan.snapshot.problem)
    plan.fail(Cause.INVALID_SPEC, plan.snapshot.problem)
    return True


def report_block(plan: Plan) -> bool:
    """An object that could not be made: say why; the next plan tries again."""
    blocked = plan.snapshot.blocked
    if blocked is None:
        return False
    if blocked.fatal:
        plan.condition("Accepted", False, Cause.INVALID_SPEC, blocked.message)
        plan.fail(Cause.INVALID_SPEC, blocked.message)
        return True
    if blocked.conflict:
        plan.condition("Accepted", False, Cause.NAME_CONFLICT, blocked.message)
        since = plan.status.condition("Accepted")
        waited = -(timestamps.seconds_until(since.last_transition_time if since else None, plan.now) or 0.0)
        if blocked.stray and waited >= children.STRAY_SECONDS:
            plan.actions.append(Delete(Kind.JOB, *blocked.stray, foreground=True))
        if waited >= names.BUNDLE_WAIT_SECONDS:
            minutes = names.BUNDLE_WAIT_SECONDS // 60
            message = reasons.CONFLICT_MESSAGE.format(message=blocked.message, minutes=minutes)
            plan.fail(Cause.NAME_CONFLICT, message)
            return True
    plan.phase("Pending", blocked.reason, blocked.message)
    plan.wake_in(RETRY_SECONDS)
    return True
