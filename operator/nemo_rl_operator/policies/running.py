"""The newest attempt is live: what its Job and pods say about the phase."""

from __future__ import annotations

from nemo_rl.job import names
from nemo_rl.job.status import Cause
from nemo_rl_operator import pending, reasons
from nemo_rl_operator.classify import pod_failure
from nemo_rl_operator.observe import AttemptView, PodView, newest
from nemo_rl_operator.plan import Need, Plan
from nemo_rl_operator.policies import queue, sidecars
from nemo_rl_operator.runtime import timestamps

QUIET_SECONDS = 10.0
"""A start that says nothing for this long is looked into: its Events are read."""
ORDINARY = (reasons.PODS_PENDING, reasons.STARTING, reasons.UNBOUND_CLAIM)
"""What every start goes through for a moment; a new claim is bound while its pod waits."""
LOOK_SECONDS, LONGEST_LOOK_SECONDS = 10.0, 300.0
LOOK_SHARE = 0.25
"""Of the time that it has been waited for: what has waited long is looked at seldom."""


def report(plan: Plan) -> bool:
    attempt = plan.attempt
    if attempt is None or not plan.open or attempt.finished:
        return False
    if attempt.deleting:
        plan.phase(plan.status.phase or "Starting", reasons.ENDING, plan.waits_for())
    elif attempt.suspended:
        queue.report_held(plan, attempt)
    else:
        _started(plan, attempt)
    return True


def _ending(plan: Plan, pods: list[PodView]) -> None:
    """Somebody deletes the pods. They may save first, but with their node they may also be gone without a word."""
    late = [pod for pod in pods if plan.overdue(pod)]
    if late:
        plan.phase("Pending", reasons.LOST, reasons.LOST_MESSAGE.format(pod=late[0].name, time=late[0].gone_by))
        return
    plan.wake_in(max(plan.patience_left(pod) for pod in pods))
    message = reasons.DELETED_MESSAGE.format(
        pod=pods[0].name, reason=f" ({pods[0].disruption})" if pods[0].disruption else ""
    )
    plan.phase(plan.status.phase or "Starting", reasons.ENDING, message)


def _failed(plan: Plan, failed: tuple[PodView, ...], pods: tuple[PodView, ...]) -> None:
    """The attempt is over; its Job says in a moment how it ended, or when the other pods have ended too."""
    found, left = pod_failure(failed, pods), sum(not pod.terminal for pod in pods)
    message = reasons.POD_FAILED_MESSAGE.format(pod=found.pod, why=found.message)
    if left:
        message += reasons.POD_FAILED_WAIT_MESSAGE.format(left=left, nodes=plan.spec.resources.nodes)
    plan.phase(plan.status.phase or "Starting", reasons.POD_FAILED, message, training=False)
    if any(pod.lingers for pod in failed):
        plan.wake_in(sidecars.PATIENCE_SECONDS)


def _started(plan: Plan, attempt: AttemptView) -> None:
    nodes, pods = plan.spec.resources.nodes, newest(plan.pods)
    if failed := tuple(pod for pod in pods if pod.phase == "Failed"):
        _failed(plan, failed, pods)
        return
    if ending := [pod for pod in pods if pod.deleting and not pod.terminal]:
        _ending(plan, ending)
        return
    if len({pod.index for pod in pods if pod.phase in ("Running", "Succeeded")}) == nodes:
        if plan.record and not plan.record.running_time:
            plan.record.running_time = plan.time
        where = "1 pod" if nodes == 1 else f"{nodes} pods"
        message = reasons.RUNNING_MESSAGE.format(attempt=plan.number, pods=where)
        if plan.snapshot.unreadable:
            message += reasons.UNREADABLE_MESSAGE.format(why=plan.snapshot.unreadable, port=names.TRAINER_PORT)
        plan.phase("Running", reasons.RUNNING, message)
        return
    if plan.status.phase == "Running" and len(pods) < nodes and plan.snapshot.verified != plan.number:
        plan.needs.add(Need.ATTEMPT)  # a list that is not in yet must not take back that it runs
        return
    image = plan.spec.image or plan.snapshot.image
    found = pending.waiting(pods, plan.spec, image, plan.snapshot.warning_event or "")
    if found.fatal:
        plan.fail(Cause.INVALID_IMAGE, found.message)
        return
    quiet = QUIET_SECONDS + (timestamps.seconds_until(attempt.created, plan.now) or 0.0)
    if found.reason == reasons.PODS_PENDING and quiet > 0:  # as was said when it was started
        plan.phase("Starting", reasons.STARTING, reasons.STARTING_MESSAGE.format(attempt=plan.number))
    else:
        plan.phase(found.phase, found.reason, found.message)
    if found.reason not in ORDINARY and not plan.snapshot.warning_event:
        return
    if quiet > 0:
        plan.wake_in(quiet)
        return
    plan.wake_in(min(LONGEST_LOOK_SECONDS, max(LOOK_SECONDS, (QUIET_SECONDS - quiet) * LOOK_SHARE)))
    if plan.snapshot.warning_event is None:
        plan.needs.add(Need.WARNING_EVENT)
