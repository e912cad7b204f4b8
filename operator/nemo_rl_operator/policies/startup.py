"""startupTimeoutSeconds: an attempt whose pods do not all come to run gives its nodes back and is repeated. It never counts."""

from __future__ import annotations

from dataclasses import replace

from nemo_rl.job.status import Cause
from nemo_rl_operator import pending, reasons
from nemo_rl_operator.classify import Outcome
from nemo_rl_operator.observe import newest
from nemo_rl_operator.plan import Delete, Kind, Plan
from nemo_rl_operator.policies import retry
from nemo_rl_operator.runtime import timestamps

GAVE_UP = (Cause.ERROR, Cause.UNKNOWN)
"""How pods end that waited in vain for others. What a pod knows of itself, such as its memory, stays its cause."""


def expire(plan: Plan) -> bool:
    """The time runs while one of the pods has a node. Before, nothing is held, and waiting keeps the place of the others."""
    attempt, record = plan.attempt, plan.record
    if attempt is None or record is None or not plan.open or record.running_time:
        return False
    if attempt.finished or attempt.deleting or attempt.suspended:
        return False
    pods = newest(plan.pods)
    held = [pod.scheduled_at or pod.created for pod in pods if pod.scheduled and not pod.terminal]
    if not held or any(pod.phase == "Failed" or pod.deleting for pod in pods) or _all_run(plan):
        return False
    limit = plan.spec.startup_timeout_seconds
    waited = -(timestamps.seconds_until(min(held), plan.now) or 0.0)
    if waited < limit:
        plan.wake_in(limit - waited + 0.1)
        return False
    late = pending.late_pods(pods, plan.spec.resources.nodes)
    message = reasons.STARTUP_MESSAGE.format(limit=limit, late=late)
    plan.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))
    return retry.judge(plan, Outcome(Cause.STARTUP_TIMEOUT, message))


def never_ran(plan: Plan, found: Outcome) -> Outcome:
    """The failure as it is, or a start that did not come about: some of the pods gave up, for others never ran."""
    nodes, record = plan.spec.resources.nodes, plan.record
    if found.cause not in GAVE_UP or nodes == 1 or record is None or record.running_time:
        return found
    if plan.status.progress and plan.status.progress.step > (record.from_step or 0):
        return found
    pods = newest(plan.pods)
    ran = {pod.index for pod in pods if pod.phase == "Running" or pod.exit_code is not None or pod.started}
    if len(ran) >= nodes:
        return found
    late = pending.late_pods(tuple(pod for pod in pods if pod.index in ran), nodes)
    message = reasons.NEVER_RAN_MESSAGE.format(ran=len(ran), nodes=nodes, late=late, message=found.message)
    return replace(found, cause=Cause.STARTUP_TIMEOUT, message=message)


def _all_run(plan: Plan) -> bool:
    running = {pod.index for pod in newest(plan.pods) if pod.phase in ("Running", "Succeeded")}
    return len(running) == plan.spec.resources.nodes
