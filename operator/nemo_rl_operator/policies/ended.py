"""The newest attempt ended: success ends the job, failure is left to the retry policy."""

from __future__ import annotations

from nemo_rl.job.status import Checkpoint, Progress, Result, TerminationMessage
from nemo_rl_operator import reasons, timestamps
from nemo_rl_operator.classify import Outcome, outcome
from nemo_rl_operator.policies import retry
from nemo_rl_operator.turn import Turn

SETTLE_SECONDS = 5.0
"""How long after a Job failed news about its pods may still be on the way."""


def note_progress(turn: Turn) -> bool:
    """Copy what the trainer last reported."""
    progress = turn.seen.progress
    if progress is None or not turn.open:
        return False
    turn.status.progress = progress
    if progress.checkpoint:
        old = turn.status.checkpoint.latest_step if turn.status.checkpoint else None
        turn.status.checkpoint = progress.checkpoint
        step = progress.checkpoint.latest_step
        if step is not None and step != old:
            turn.event(reasons.EVENT_CHECKPOINT, f"checkpoint at step {step}", key=str(step))
    return False


def conclude(turn: Turn) -> bool:
    """What the end of the newest attempt means, once it is known."""
    attempt = turn.attempt
    if attempt is None or not turn.open:
        return False
    since = timestamps.seconds_until(attempt.ended, turn.now)
    settled = since is not None and since <= -SETTLE_SECONDS
    found = outcome(attempt, turn.pods, turn.spec.resources.nodes, settled)
    if found is None:
        if attempt.failed:
            turn.wake_in(SETTLE_SECONDS if since is None else SETTLE_SECONDS + since + 0.1)
            return True
        return False
    if found.word and found.word.checkpoint:
        newer = found.word.checkpoint.model_dump(exclude_none=True)
        turn.status.checkpoint = (turn.status.checkpoint or Checkpoint()).model_copy(update=newer)
    if found.cause is None:
        _succeed(turn, found)
        return True
    return retry.judge(turn, found)


def _succeed(turn: Turn, found: Outcome) -> None:
    status = turn.status
    word = found.word or TerminationMessage(kind="result")
    old = status.progress
    steps = word.total_steps if word.total_steps is not None else (old.step if old else 0)
    metrics = word.metrics or (old.metrics if old else {})
    status.result = Result(total_steps=steps, metrics=metrics, checkpoint=status.checkpoint)
    status.progress = Progress(
        step=steps, total_steps=steps, metrics=metrics, percent=100, time=old.time if old else None
    )
    turn.close("Succeeded", found=found)
    turn.clock(False)
    status.completion_time = found.ended or turn.time
    message = reasons.SUCCEEDED_MESSAGE.format(steps=steps)
    turn.phase("Succeeded", reasons.SUCCEEDED, message)
    turn.event(reasons.EVENT_SUCCEEDED, message)
