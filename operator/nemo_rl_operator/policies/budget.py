"""spec.budget: the GPU seconds of a job's pods, and whether they are spent.

`status.gpuSeconds` is what was used until `status.gpuSecondsTime`; what has run since is read off the pods, each for itself:
its GPUs from when it had a node until it ended. Both are written along with other news and never alone, so that counting
costs the API server nothing. A pod that is about to vanish is such news: it is being deleted.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_rl_operator import reasons
from nemo_rl_operator.observe import PodView
from nemo_rl_operator.plan import Plan
from nemo_rl_operator.runtime import timestamps

HOUR = 3600
LATE_SECONDS = 1.0
"""How long after the budget is spent that is looked at: times have whole seconds."""


def used(plan: Plan) -> int:
    """GPU seconds of the job until now."""
    return (plan.snapshot.status.gpu_seconds or 0) + sum(gpus * _seconds(plan, pod) for pod, gpus in _pods(plan))


def spent(plan: Plan) -> bool:
    limit = _limit(plan)
    return limit is not None and used(plan) >= limit


def held(plan: Plan) -> bool:
    """Whether the job is to have no pods for now."""
    return plan.spec.suspend or spent(plan)


def stopping_message(plan: Plan) -> str:
    assert plan.spec.budget is not None
    return reasons.STOPPING_BUDGET_MESSAGE.format(limit=plan.spec.budget.gpu_hours)


def message(plan: Plan) -> str:
    assert plan.spec.budget is not None
    limit, hours = plan.spec.budget.gpu_hours, used(plan) / HOUR
    return reasons.BUDGET_MESSAGE.format(
        spent=hours, limit=limit, more=max(2 * limit, 2 * hours), name=plan.snapshot.resource.name
    )


def keep_account(plan: Plan) -> None:
    """Counts up to now where something else is to be written anyway, and looks again when the budget will be spent."""
    before = plan.snapshot.status
    if not plan.status.gpus and before.gpu_seconds is None:
        return
    total = used(plan)
    if plan.status != before and (total or before.gpu_seconds is not None):
        plan.status.gpu_seconds, plan.status.gpu_seconds_time = total, plan.time
    limit = _limit(plan)
    rate = sum(gpus for pod, gpus in _pods(plan) if _holds(plan, pod))
    if limit is not None and rate and total < limit and not plan.status.finished:
        plan.wake_in((limit - total) / rate + LATE_SECONDS)


def _limit(plan: Plan) -> float | None:
    return plan.spec.budget.gpu_hours * HOUR if plan.spec.budget is not None else None


def _pods(plan: Plan) -> Iterator[tuple[PodView, int]]:
    """Each pod of the job that has GPUs, and how many."""
    trainer, rollout = plan.spec.resources.gpus_per_node, plan.spec.rollout
    if trainer:
        for pods in plan.snapshot.pods.values():
            for pod in pods:
                yield pod, trainer
    if rollout is not None and rollout.replicas and rollout.gpus_per_replica:
        for pod in plan.snapshot.replicas:
            yield pod, rollout.gpus_per_replica


def _holds(plan: Plan, pod: PodView) -> bool:
    return pod.scheduled and not pod.terminal and not plan.overdue(pod)


def _seconds(plan: Plan, pod: PodView) -> int:
    """Whole seconds that a pod has held its GPUs since the last count. A node's clock is believed between that and now only."""
    now = timestamps.parse(plan.time)
    created, bound = timestamps.parse(pod.created), timestamps.parse(pod.scheduled_at)
    counted = timestamps.parse(plan.snapshot.status.gpu_seconds_time)
    begins = [time for time in (created, bound, counted) if time is not None]
    ended = timestamps.parse(pod.ended) if pod.terminal else now
    if now is None or ended is None or not begins or not pod.scheduled or (not pod.terminal and plan.overdue(pod)):
        return 0  # one that ended, nobody says when, has been counted until the last news of it
    return max(0, int((min(ended, now) - max(begins)).total_seconds()))
