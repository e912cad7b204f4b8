"""activeDeadlineSeconds: a clock that runs only while pods of the job may run.

That is while one of them is there, has not ended, and is not known to find no node.
"""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.observe import PodView
from nemo_rl_operator.plan import Plan
from nemo_rl_operator.policies import budget
from nemo_rl_operator.runtime import timestamps


def keep_clock(plan: Plan) -> bool:
    """Not in a queue, in a back-off, without quota, without bundles, refused by others or suspended: no pod runs then."""
    there = [pod for pods in plan.snapshot.pods.values() for pod in pods if _may_run(plan, pod)]
    if budget.held(plan) or not there:
        attempt = plan.attempt
        plan.clock(False, at=attempt.ended if attempt and attempt.finished else None)
    else:
        plan.clock(True, at=min(_since(plan, pod) for pod in there))
    return False


def _may_run(plan: Plan, pod: PodView) -> bool:
    return not pod.terminal and (pod.scheduled or not pod.unschedulable) and not plan.overdue(pod)


def _since(plan: Plan, pod: PodView) -> str:
    """When the pod got its node, or now. Kubelets may write that time again: it is not believed before the pod was made."""
    created, bound = timestamps.parse(pod.created), timestamps.parse(pod.scheduled_at)
    if not bound or bound > plan.now:
        return plan.time
    return timestamps.write(max(bound, created) if created else bound)


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
