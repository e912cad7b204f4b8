"""The newest attempt ended: success ends the job, failure is left to the retry policy."""

from __future__ import annotations

from nemo_rl.job.status import SCORES, Checkpoint, Progress, Result, TerminationMessage
from nemo_rl_operator import reasons
from nemo_rl_operator.classify import Outcome, outcome
from nemo_rl_operator.observe import newest
from nemo_rl_operator.plan import Plan
from nemo_rl_operator.policies import retry, sidecars, startup
from nemo_rl_operator.runtime import timestamps

SETTLE_SECONDS = 5.0
"""How long after a Job ended news about its pods may still be on the way."""


def note_progress(plan: Plan) -> bool:
    """Copy what the trainer last reported; when its pod has ended, that is its last termination."""
    if not plan.open:
        return False
    progress = plan.snapshot.progress
    if progress is not None:
        plan.status.progress = progress
        plan.status.bottleneck = progress.bottleneck or plan.status.bottleneck
        if progress.checkpoint:
            _note_checkpoint(plan, progress.checkpoint)
    termination = _last_word(plan)
    if termination is not None and termination.checkpoint:
        _note_checkpoint(plan, termination.checkpoint)
    old = plan.status.progress
    if (
        termination is not None
        and termination.total_steps is not None
        and old is not None
        and termination.total_steps > old.step
    ):
        plan.status.progress = Progress(
            step=termination.total_steps, total_steps=old.total_steps, metrics=old.metrics, time=old.time
        )
    _note_score(plan)
    return False


def _note_score(plan: Plan) -> None:
    """A metric that is not reported keeps its last value: some are measured in some of the steps only."""
    metrics = plan.status.progress.metrics if plan.status.progress else {}
    plan.status.score = metrics.get(SCORES[plan.spec.algorithm], plan.status.score)


def _last_word(plan: Plan) -> TerminationMessage | None:
    """What the pod with index 0 left when it ended."""
    first = next((pod for pod in newest(plan.pods) if pod.index == 0 and pod.terminal), None)
    return TerminationMessage.parse(first.termination) if first else None


def _note_checkpoint(plan: Plan, found: Checkpoint) -> None:
    old = plan.status.checkpoint or Checkpoint()
    plan.status.checkpoint = old.model_copy(update=found.model_dump(exclude_none=True))
    step = found.latest_step
    if step is not None and step != old.latest_step:
        plan.event(reasons.EVENT_CHECKPOINT, f"checkpoint at step {step}", key=str(step))


def conclude(plan: Plan) -> bool:
    """What the end of the newest attempt means, once it is known."""
    attempt = plan.attempt
    if attempt is None or not plan.open:
        return False
    since = timestamps.seconds_until(attempt.ended, plan.now)
    settled = since is not None and since <= -SETTLE_SECONDS
    found = outcome(attempt, plan.pods, plan.spec.resources.nodes, settled, kept=_kept(plan))
    if found is None:
        if attempt.finished:
            plan.wake_in(SETTLE_SECONDS if since is None else SETTLE_SECONDS + since + 0.1)
            return True
        return False
    if found.termination and found.termination.checkpoint:
        _note_checkpoint(plan, found.termination.checkpoint)
    if found.cause is None:
        _succeed(plan, found)
        return True
    return retry.judge(plan, startup.never_ran(plan, found))


def _kept(plan: Plan) -> bool:
    """Whether a trainer failed some time ago in a pod that others keep, so that the Job does not hear of it."""
    if not any(pod.lingers and pod.phase == "Failed" for pod in newest(plan.pods)):
        return False
    said = plan.status.condition("Running")
    if said is None or said.reason != reasons.POD_FAILED:
        return False
    return (timestamps.seconds_until(said.last_transition_time, plan.now) or 0.0) <= -sidecars.PATIENCE_SECONDS


def _succeed(plan: Plan, found: Outcome) -> None:
    status = plan.status
    termination = found.termination or TerminationMessage(kind="result")
    old = status.progress
    steps = termination.total_steps if termination.total_steps is not None else (old.step if old else 0)
    metrics = termination.metrics or (old.metrics if old else {})
    status.result = Result(total_steps=steps, metrics=metrics, checkpoint=status.checkpoint)
    status.progress = Progress(
        step=steps, total_steps=steps, metrics=metrics, percent=100, time=old.time if old else None
    )
    _note_score(plan)
    plan.close("Succeeded", found=found)
    plan.clock(False)
    status.completion_time = plan.ended
    message = reasons.SUCCEEDED_MESSAGE.format(steps=steps)
    plan.phase("Succeeded", reasons.SUCCEEDED, message)
    plan.event(reasons.EVENT_SUCCEEDED, message)
