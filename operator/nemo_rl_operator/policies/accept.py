"""Whether the job can be run at all: the spec's validity, and what the API server or somebody else refuses."""

from __future__ import annotations

from nemo_rl.job import names
from nemo_rl.job.status import Cause
from nemo_rl_operator import children, reasons
from nemo_rl_operator.observe import Blocked
from nemo_rl_operator.plan import Delete, Kind, Plan
from nemo_rl_operator.runtime import timestamps

RETRY_SECONDS, LONGEST_RETRY_SECONDS = 10.0, 300.0
"""Between two tries of what is refused: the longer it lasts, the rarer."""
RETRY_SHARE = 0.5
"""Of the time that it has been refused for."""


def refuse_invalid(plan: Plan) -> bool:
    """The API server checks most of it; what slips past its schema ends here, for a spec cannot be corrected later.

    But a job that has started was valid for whoever started it: it trains on, whatever this version makes of it.
    """
    plan.status.gpus = plan.spec.resources.nodes * plan.spec.resources.gpus_per_node
    if plan.spec.rollout is not None and plan.spec.rollout.replicas:
        plan.status.gpus += plan.spec.rollout.replicas * plan.spec.rollout.gpus_per_replica
    problem, blocked = plan.snapshot.problem, plan.snapshot.blocked
    if problem:
        plan.condition("Accepted", False, Cause.INVALID_SPEC, problem)
        if _started(plan):
            return False
        plan.fail(Cause.INVALID_SPEC, problem)
        return True
    if plan.snapshot.changed:
        message = reasons.CHANGED_MESSAGE.format(changed=plan.snapshot.changed)
        plan.condition("Accepted", False, reasons.CHANGED, message)
        return False
    if blocked is None or not (blocked.conflict or blocked.fatal):
        plan.condition("Accepted", True, reasons.ACCEPTED, _accepted(plan.snapshot.unknown))
    return False


def _started(plan: Plan) -> bool:
    return bool(plan.number or plan.snapshot.begun or plan.snapshot.attempts)


def _accepted(unknown: tuple[str, ...]) -> str:
    if not unknown:
        return reasons.ACCEPTED_MESSAGE
    return reasons.UNKNOWN_MESSAGE.format(accepted=reasons.ACCEPTED_MESSAGE, fields=", ".join(unknown)[:800])


def hold_invalid(plan: Plan) -> bool:
    """Nothing is started from a spec that is understood in part only."""
    if not plan.snapshot.problem:
        return False
    plan.clock(False)
    message = reasons.HELD_INVALID_MESSAGE.format(problem=plan.snapshot.problem)
    plan.phase("Pending", Cause.INVALID_SPEC, message)
    return True


def report_block(plan: Plan) -> bool:
    """An object that could not be made: say why; it is tried again, rarer and rarer.

    Only what our own fields are to blame for ends a job, and only one that never ran.
    """
    blocked = plan.snapshot.blocked
    if blocked is None:
        return False
    if blocked.fatal:
        plan.condition("Accepted", False, Cause.INVALID_SPEC, blocked.message)
        if not _started(plan):
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
    _hold(plan, blocked)
    return True


def report_failure(plan: Plan) -> None:
    """A call about the job's objects fails: say so beside what is known of it."""
    blocked = plan.snapshot.blocked
    assert blocked is not None
    if plan.status.phase in (None, "Pending"):
        plan.phase("Pending", blocked.reason, blocked.message)
    else:
        plan.status.message = blocked.message[:1024]
    _hold(plan, blocked)


def _hold(plan: Plan, blocked: Blocked) -> None:
    plan.condition("Blocked", True, blocked.reason, blocked.message)
    plan.wake_in(next_try(plan, "Blocked"))


def next_try(plan: Plan, kind: str) -> float:
    """Seconds until what a condition says is tried again, by how long it has been so."""
    found = plan.status.condition(kind)
    lasted = -(timestamps.seconds_until(found.last_transition_time if found else None, plan.now) or 0.0)
    return min(LONGEST_RETRY_SECONDS, max(RETRY_SECONDS, lasted * RETRY_SHARE))
