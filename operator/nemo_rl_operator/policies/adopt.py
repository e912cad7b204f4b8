"""Attempts that exist but are not in the status yet, or the other way round: the children are the truth."""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.classify import Outcome, outcome, verdict
from nemo_rl_operator.plan import Need, Plan
from nemo_rl_operator.policies import budget, retry


def take_in_jobs(plan: Plan) -> bool:
    """Record attempts whose Job was made but whose beginning was never written; it may be gone already."""
    made = {*plan.snapshot.attempts, *([plan.snapshot.begun] if plan.snapshot.begun else [])}
    for number in sorted(made):
        attempt = plan.snapshot.attempts.get(number)
        if number < plan.number or (number == plan.number and plan.record):
            continue
        if plan.open:
            _close_superseded(plan)
        plan.begin(number, attempt.created if attempt and attempt.created else plan.time)
        plan.event(reasons.EVENT_STARTED, reasons.STARTING_MESSAGE.format(attempt=number), key=str(number))
    return False


def _close_superseded(plan: Plan) -> None:
    """A later attempt was started, so this one had ended; its end was decided but not written."""
    attempt = plan.attempt
    found = outcome(attempt, plan.pods, plan.spec.resources.nodes, True) if attempt else None
    if found is None or found.cause is None:
        plan.close(Cause.UNKNOWN, message="its end was not recorded")
    else:
        plan.close(found.cause, counted=verdict(found.cause) == "counted", message=found.message, found=found)


def miss_deleted_job(plan: Plan) -> bool:
    """The newest attempt's Job is gone although it had not ended: deleted by us to suspend, or by somebody else."""
    record = plan.record
    if record is None or not plan.open or plan.attempt is not None:
        return False
    if plan.snapshot.verified != plan.number:
        plan.needs.add(Need.ATTEMPT)
        return True
    if plan.live_pods():
        plan.phase(plan.status.phase or "Starting", reasons.ENDING, plan.waits_for())
        return True
    if record.cause == Cause.SUSPENDED or budget.held(plan):
        plan.close(Cause.SUSPENDED)
        return False
    if record.cause == Cause.PREEMPTED:
        plan.close(Cause.PREEMPTED, message=record.message or "")
        return False
    return retry.judge(plan, Outcome(Cause.JOB_DELETED, "its Job was deleted"))
