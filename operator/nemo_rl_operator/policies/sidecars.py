"""Containers that others added, and that keep a pod after its trainer has ended: they do not hold the job."""

from __future__ import annotations

from nemo_rl_operator.observe import AttemptView
from nemo_rl_operator.plan import Delete, Kind, Plan
from nemo_rl_operator.runtime import timestamps

PATIENCE_SECONDS = 30.0
"""How long after the trainer the others may go on: many end by themselves, and then the pod and its log stay."""


def release(plan: Plan) -> bool:
    """Delete Jobs of attempts that have ended, but whose pods do not: nothing else frees their GPUs."""
    for attempt in plan.snapshot.attempts.values():
        if attempt.finished or attempt.deleting or (attempt.number == plan.number and plan.open):
            continue
        pods = plan.snapshot.pods.get(attempt.number, ())
        if not any(pod.lingers for pod in pods) or plan.deletes(attempt.uid):
            continue
        if all(pod.terminal for pod in pods):
            left = PATIENCE_SECONDS + (timestamps.seconds_until(_ended(plan, attempt), plan.now) or 0.0)
        elif plan.status.finished:
            continue  # those that still train after index 0 succeeded have a patience of their own
        else:
            left = 0.0  # the others train on for nothing, and are told by nobody else
        if left > 0:
            plan.wake_in(left)
        else:
            plan.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))
    return False


def _ended(plan: Plan, attempt: AttemptView) -> str | None:
    return next((record.end_time for record in plan.status.attempts if record.number == attempt.number), None)
