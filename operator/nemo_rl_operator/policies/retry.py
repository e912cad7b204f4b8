"""Failed attempts: which end the job, which count towards backoffLimit, and when the next one starts."""

from __future__ import annotations

from nemo_rl.job.status import Attempt, Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.classify import Outcome, verdict
from nemo_rl_operator.plan import Plan
from nemo_rl_operator.runtime import timestamps

COUNTED_BASE, FREE_BASE, LONGEST_DELAY = 10.0, 5.0, 300.0
SHORT_SECONDS = 60.0
"""A disrupted attempt that lived shorter than this and made no step may be disrupted again at once."""


def judge(plan: Plan, found: Outcome) -> bool:
    """Record the failure; True if it ends the job."""
    assert found.cause is not None
    judged = verdict(found.cause)
    counted = judged == "counted"
    plan.close(found.cause, counted=counted, message=found.message, found=found)
    plan.event(
        reasons.EVENT_ENDED,
        f"attempt {plan.number}: {found.cause}: {found.message}",
        warning=True,
        key=str(plan.number),
    )
    if judged == "fatal":
        plan.fail(found.cause, found.message, found)
        return True
    failures, limit = plan.status.counted_failures or 0, plan.spec.backoff_limit
    if counted and failures > limit:
        message = reasons.BACKOFF_LIMIT_MESSAGE.format(failures=failures, limit=limit, message=found.message)
        plan.fail(found.cause, message, found)
        return True
    return False


def wait_out(plan: Plan) -> bool:
    """Hold the next attempt back until its delay is over."""
    record = plan.record
    if record is None or record.end_time is None:
        return False
    delay = delay_after(plan.status.attempts, plan.status.counted_failures or 0)
    left = delay + (timestamps.seconds_until(record.end_time, plan.now) or 0.0)
    if left <= 0:
        return False
    end = timestamps.parse(record.end_time) or plan.now
    due = timestamps.write(end.fromtimestamp(end.timestamp() + delay, tz=end.tzinfo))
    message = reasons.BACKOFF_MESSAGE.format(
        attempt=record.number, cause=record.cause, next=record.number + 1, time=due
    )
    plan.phase("Pending", reasons.BACKOFF, message)
    plan.wake_in(left)
    return True


def delay_after(attempts: list[Attempt], counted_failures: int) -> float:
    """Seconds between the end of the newest attempt and the next: doubling with each failure in a row.

    After a disruption the next attempt starts at once, unless disruptions follow each other without any progress.
    """
    last = attempts[-1]
    if last.cause == Cause.SUSPENDED:
        return 0.0
    if last.counted:
        return float(min(LONGEST_DELAY, COUNTED_BASE * 2.0 ** min(max(0, counted_failures - 1), 20)))
    fruitless = 0
    for attempt in reversed(attempts):
        if attempt.counted or attempt.cause == Cause.SUSPENDED or not _fruitless(attempt):
            break
        fruitless += 1
    return float(min(LONGEST_DELAY, FREE_BASE * 2.0 ** (fruitless - 2))) if fruitless > 1 else 0.0


def _fruitless(attempt: Attempt) -> bool:
    start, end = timestamps.parse(attempt.start_time), timestamps.parse(attempt.end_time)
    lived = (end - start).total_seconds() if start and end else 0.0
    return lived < SHORT_SECONDS and (attempt.to_step or 0) <= (attempt.from_step or 0)
