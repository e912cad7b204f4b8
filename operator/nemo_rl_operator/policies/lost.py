"""Pods whose node no longer answers: their end is never reported, so somebody must say that they are gone."""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import reasons, timestamps
from nemo_rl_operator.observe import PodView
from nemo_rl_operator.turn import Delete, Kind, Turn

PATIENCE_SECONDS = 30.0
"""How long after its time a pod that is being deleted is still expected to be reported as ended."""


def give_up(turn: Turn) -> bool:
    """A pod was deleted by force, and no kubelet reports its end: the attempt was disrupted.

    Its Job would wait for that report for ever; `release` deletes it.
    """
    forced = [pod for pod in turn.pods if pod.forced and not pod.terminal]
    if not (forced and turn.open):
        return False
    if not any(overdue(turn, pod) for pod in forced):
        turn.wake_in(min(_left(turn, pod) for pod in forced))
        return False
    message = reasons.FORCED_MESSAGE.format(pod=forced[0].name)
    turn.close(Cause.DISRUPTED, message=message)
    turn.event(
        reasons.EVENT_ENDED, f"attempt {turn.number}: {Cause.DISRUPTED}: {message}", warning=True, key=str(turn.number)
    )
    return False


def release(turn: Turn) -> None:
    """Delete Jobs that hold on to such pods, when it is time; with their Jobs they go."""
    for attempt in turn.seen.attempts.values():
        pods = [pod for pod in turn.seen.pods.get(attempt.number, ()) if pod.forced and not pod.terminal]
        if attempt.deleting or not pods:
            continue
        if any(overdue(turn, pod) for pod in pods):
            turn.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))
        else:
            turn.wake_in(min(_left(turn, pod) for pod in pods))


def overdue(turn: Turn, pod: PodView) -> bool:
    return pod.deleting and _left(turn, pod) <= 0


def _left(turn: Turn, pod: PodView) -> float:
    return PATIENCE_SECONDS + (timestamps.seconds_until(pod.gone_by, turn.now) or 0.0)
