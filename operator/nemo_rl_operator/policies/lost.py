"""Pods whose node no longer answers: their end is never reported, so somebody must say that they are gone."""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.classify import Outcome
from nemo_rl_operator.observe import PodView
from nemo_rl_operator.plan import Delete, Kind, Plan
from nemo_rl_operator.policies import retry
from nemo_rl_operator.runtime import timestamps

PATIENCE_SECONDS = 30.0
"""How long after its time a pod that is being deleted is still expected to be reported as ended."""


def give_up(plan: Plan) -> bool:
    """A pod was deleted by force, and no kubelet reports its end: the attempt was disrupted.

    Its Job would wait for that report for ever; `release` deletes it.
    """
    forced = [pod for pod in plan.pods if pod.forced and not pod.terminal]
    if not (forced and plan.open):
        return False
    if not any(overdue(plan, pod) for pod in forced):
        plan.wake_in(min(_left(plan, pod) for pod in forced))
        return False
    found = Outcome(Cause.DISRUPTED, reasons.FORCED_MESSAGE.format(pod=forced[0].name), pod=forced[0].name)
    return retry.judge(plan, found)


def release(plan: Plan) -> None:
    """Delete Jobs that hold on to such pods, when it is time; with their Jobs they go."""
    for attempt in plan.snapshot.attempts.values():
        pods = [pod for pod in plan.snapshot.pods.get(attempt.number, ()) if pod.forced and not pod.terminal]
        if attempt.deleting or not pods:
            continue
        if any(overdue(plan, pod) for pod in pods):
            plan.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))
        else:
            plan.wake_in(min(_left(plan, pod) for pod in pods))


def overdue(plan: Plan, pod: PodView) -> bool:
    return pod.deleting and _left(plan, pod) <= 0


def _left(plan: Plan, pod: PodView) -> float:
    return PATIENCE_SECONDS + (timestamps.seconds_until(pod.gone_by, plan.now) or 0.0)
