"""The newest attempt ended: success ends the job, failure is left to the retry policy."""

from __future__ import annotations

from nemo_rl.job.status import Checkpoint, Progress, Result, TerminationMessage
from nemo_rl_operator import reasons, timestamps
from nemo_rl_operator.classify import Outcome, outcome
from nemo_rl_operator.observe import newest
from nemo_rl_operator.policies import retry
from nemo_rl_operator.turn import Turn

SETTLE_SECONDS = 5.0
"""How long after a Job ended news about its pods may still be on the way."""


def note_progress(turn: Turn) -> bool:
    """Copy what the trainer last reported; when its pod has ended, that is its last word."""
    if not turn.open:
        return False
    progress = turn.seen.progress
    if progress is not None:
        turn.status.progress = progress
        if progress.checkpoint:
            _note_checkpoint(turn, progress.checkpoint)
    word = _last_word(turn)
    if word is not None and word.checkpoint:
        _note_checkpoint(turn, word.checkpoint)
    old = turn.status.progress
    if word is not None and word.total_steps is not None and old is not None and word.total_steps > old.step:
        turn.status.progress = Progress(
            step=word.total_steps, total_steps=old.total_steps, metrics=old.metrics, time=old.time
        )
    return False


def _last_word(turn: Turn) -> TerminationMessage | None:
    """What the pod with index 0 left when it ended."""
    first = next((pod for pod in newest(turn.pods) if pod.index == 0 and pod.terminal), None)
    return TerminationMessage.parse(first.termination) if first else None


def _note_checkpoint(turn: Turn, found: Checkpoint) -> None:
    old = turn.status.checkpoint or Checkpoint()
    turn.status.checkpoint = old.model_copy(update=found.model_dump(exclude_none=True))
    step = found.latest_step
    if step is not None and step != old.latest_step:
        turn.event(reasons.EVENT_CHECKPOINT, f"checkpoint at step {step}", key=str(step))


def conclude(turn: Turn) -> bool:
    """What the end of the newest attempt means, once it is known."""
    attempt = turn.attempt
    if attempt is None or not turn.open:
        return False
    since = timestamps.seconds_until(attempt.ended, turn.now)
    settled = since is not None and since <= -SETTLE_SECONDS
    found = outcome(attempt, turn.pods, turn.spec.resources.nodes, settled)
    if found is None:
        if attempt.finished:
            turn.wake_in(SETTLE_SECONDS if since is None else SETTLE_SECONDS + since + 0.1)
            return True
        return False
    if found.word and found.word.checkpoint:
        _note_checkpoint(turn, found.word.checkpoint)
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
