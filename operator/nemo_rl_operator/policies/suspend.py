"""spec.suspend, or a budget that is spent: stop the pods, which save on SIGTERM, and hold the job until that is over."""

from __future__ import annotations

from nemo_rl.job import names
from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.plan import Delete, Kind, Plan
from nemo_rl_operator.policies import budget, lost, queue


def suspend(plan: Plan) -> bool:
    if not budget.held(plan):
        return False
    stopping_message = reasons.STOPPING_MESSAGE if plan.spec.suspend else budget.stopping_message(plan)
    attempt, record = plan.attempt, plan.record
    stopping = attempt is not None and plan.open
    if stopping or plan.live_pods():
        if attempt and not attempt.deleting and not attempt.finished:
            plan.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))
        else:
            lost.release(plan)
        if record and record.end_time is None:
            record.cause, record.counted = Cause.SUSPENDED, False
        plan.phase(plan.status.phase or "Starting", reasons.STOPPING, stopping_message)
        return True
    if running := [stray for stray in plan.snapshot.strays if not stray.finished]:
        # made before an operator ended, and the job was changed since: it would train on
        plan.actions += [Delete(Kind.JOB, s.name, s.uid, foreground=True) for s in running if not s.deleting]
        plan.phase("Starting", reasons.STOPPING, stopping_message)
        return True
    if replicas := plan.live_replicas():
        plan.phase(
            plan.status.phase or "Starting",
            reasons.STOPPING,
            reasons.REPLICAS_ENDING_MESSAGE.format(pod=replicas[0].name),
        )
        late = [left for pod in replicas if pod.deleting and (left := plan.patience_left(pod)) > 0]
        if late:
            plan.wake_in(min(late) + 0.1)
        return True
    queue.leave(plan)
    reason, message, key = reasons.SUSPENDED, reasons.SUSPENDED_MESSAGE, str(plan.snapshot.resource.generation)
    if not plan.spec.suspend:
        reason, message, key = names.BUDGET_SPENT, budget.message(plan), f"budget {plan.snapshot.resource.generation}"
    if plan.status.phase != "Suspended" or plan.status.reason != reason:
        plan.event(reasons.EVENT_SUSPENDED, message, key=key)
    plan.phase("Suspended", reason, message)
    return True
