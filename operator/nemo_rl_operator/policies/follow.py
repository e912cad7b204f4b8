"""The newest attempt is live: what its Job and pods say about the phase."""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import pending, reasons, timestamps
from nemo_rl_operator.observe import AttemptView, PodView, newest
from nemo_rl_operator.policies import lost
from nemo_rl_operator.turn import Need, Turn

QUIET_SECONDS = 10.0
"""A start that says nothing for this long is looked into: its Events are read. Before, it is not worth a word."""
ORDINARY = (reasons.PODS_PENDING, reasons.STARTING, reasons.UNBOUND_CLAIM)
"""What every start goes through for a moment; a new claim is bound while its pod waits."""
LOOK_SECONDS = 10.0
PATIENCE_PER_JOB, LONGEST_PATIENCE = 0.1, 60.0
"""Seconds of patience that each job which starts beside it adds, and their limit: a thousand at once take a minute."""
QUEUE_SECONDS = 30.0


def patience(beside: int) -> float:
    """How much longer than alone, in seconds, a start may take beside so many others."""
    return min(beside * PATIENCE_PER_JOB, LONGEST_PATIENCE)


def follow(turn: Turn) -> bool:
    attempt = turn.attempt
    if attempt is None or not turn.open or attempt.finished:
        return False
    if attempt.deleting:
        turn.phase(turn.status.phase or "Starting", reasons.ENDING, reasons.ENDING_MESSAGE.format(attempt=turn.number))
    elif attempt.suspended:
        _queued(turn, attempt)
    else:
        turn.clock(True, since=attempt.created or None)
        _started(turn, attempt)
    return True


def _queued(turn: Turn, attempt: AttemptView) -> None:
    """Its Job is suspended: by us for Kueue to start it, or by Kueue to make room. It is not ours to resume."""
    turn.clock(False)
    queue = turn.seen.resource.queue
    if not queue:
        turn.phase("Queued", reasons.QUEUED, reasons.HELD_MESSAGE.format(job=attempt.name))
        return
    message = reasons.QUEUED_MESSAGE.format(queue=queue)
    if turn.seen.workload is None:
        turn.needs.add(Need.WORKLOAD)
    elif turn.seen.workload:
        message = f"{message}: {turn.seen.workload}"
    turn.wake_in(QUEUE_SECONDS)
    turn.phase("Queued", reasons.QUEUED, message)


def _ending(turn: Turn, pods: list[PodView]) -> None:
    """Somebody deletes the pods. They may save first, but with their node they may also be gone without a word."""
    late = [pod for pod in pods if lost.overdue(turn, pod)]
    if late:
        turn.phase("Pending", reasons.LOST, reasons.LOST_MESSAGE.format(pod=late[0].name, time=late[0].gone_by))
        return
    turn.wake_in(max(timestamps.seconds_until(pod.gone_by, turn.now) or 0.0 for pod in pods) + lost.PATIENCE_SECONDS)
    message = reasons.DELETED_MESSAGE.format(
        pod=pods[0].name, reason=f" ({pods[0].disruption})" if pods[0].disruption else ""
    )
    turn.phase(turn.status.phase or "Starting", reasons.ENDING, message)


def _started(turn: Turn, attempt: AttemptView) -> None:
    nodes, pods = turn.spec.resources.nodes, newest(turn.pods)
    if any(pod.phase == "Failed" for pod in pods):
        return  # the Job says in a moment how it ended
    if ending := [pod for pod in pods if pod.deleting and not pod.terminal]:
        _ending(turn, ending)
        return
    if len({pod.index for pod in pods if pod.phase in ("Running", "Succeeded")}) == nodes:
        where = "1 pod" if nodes == 1 else f"{nodes} pods"
        turn.phase("Running", reasons.RUNNING, reasons.RUNNING_MESSAGE.format(attempt=turn.number, pods=where))
        return
    if turn.status.phase == "Running" and len(pods) < nodes and turn.seen.verified != turn.number:
        turn.needs.add(Need.ATTEMPT)  # a list that is not in yet must not take back that it runs
        return
    image = turn.spec.image or turn.seen.image
    found = pending.waiting(pods, turn.spec, image, turn.seen.incident or "")
    if found.fatal:
        turn.fail(Cause.INVALID_IMAGE, found.message)
        return
    if found.reason not in ORDINARY and not turn.seen.incident:
        turn.phase(found.phase, found.reason, found.message)
        return
    quiet = QUIET_SECONDS + (timestamps.seconds_until(attempt.created, turn.now) or 0.0)
    if quiet > 0:
        turn.wake_in(quiet)
        turn.phase("Starting", reasons.STARTING, reasons.STARTING_MESSAGE.format(attempt=turn.number))
        return
    turn.wake_in(LOOK_SECONDS + patience(turn.seen.beside))
    if turn.seen.incident is None:
        turn.needs.add(Need.INCIDENT)
    turn.phase(found.phase, found.reason, found.message)
