"""Pods whose node no longer answers: their end is never reported, so somebody must say that they are gone."""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.classify import Outcome
from nemo_rl_operator.plan import Delete, Kind, Plan
from nemo_rl_operator.policies import retry


def give_up(plan: Plan) -> bool:
    """A pod was deleted by force, and no kubelet reports its end: the attempt was disrupted.

    Its Job would wait for that report for ever; `release` deletes it.
    """
    forced = [pod for pod in plan.pods if pod.forced and not pod.terminal]
    if not (forced and plan.open):
        return False
    if not any(plan.overdue(pod) for pod in forced):
        plan.wake_in(min(plan.patience_left(pod) for pod in forced))
        return False
    found = Outcome(Cause.DISRUPTED, reasons.FORCED_MESSAGE.format(pod=forced[0].name), pod=forced[0].name)
    return retry.judge(plan, found)


def replace(plan: Plan) -> bool:
    """With `onNodeLost: replace`, the attempt of a pod on a silent node ends, and the next one does not wait for that pod.

    The pods of other nodes are stopped first. What a pod on the silent node still writes, its lease keeps out.
    """
    attempt, record = plan.attempt, plan.record
    gone = [pod for pod in plan.pods if plan.given_up(pod)]
    if attempt is None or record is None or not (gone and plan.open):
        return False
    if record.cause == Cause.SUSPENDED:
        if not plan.live_pods():
            plan.close(Cause.SUSPENDED)
        return False
    if not attempt.deleting:
        plan.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))
    message = reasons.NODE_LOST_MESSAGE.format(pod=gone[0].name, time=gone[0].gone_by)
    return retry.judge(plan, Outcome(Cause.NODE_LOST, message, pod=gone[0].name))


def release(plan: Plan) -> None:
    """Delete Jobs that hold on to such pods, when it is time; with their Jobs they go."""
    for attempt in plan.snapshot.attempts.values():
        pods = [pod for pod in plan.snapshot.pods.get(attempt.number, ()) if pod.forced and not pod.terminal]
        if attempt.deleting or not pods:
            continue
        if any(plan.overdue(pod) for pod in pods):
            plan.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))
        else:
            plan.wake_in(min(plan.patience_left(pod) for pod in pods))
