"""Failed attempts: which end the job, which count towards backoffLimit, and when the next one starts."""

from __future__ import annotations

from datetime import timedelta

from nemo_rl.job.status import Attempt, Cause
from nemo_rl_operator import reasons
from nemo_rl_operator.classify import Outcome, verdict
from nemo_rl_operator.plan import Plan
from nemo_rl_operator.runtime import timestamps

UNCOUNTED = (Cause.NODE_REJECTED, Cause.STARTUP_TIMEOUT, Cause.SUSPENDED)
"""What never counts, however often: attempts that took nothing from anybody, or that the user ended."""
COUNTED_BASE, FREE_BASE, LONGEST_DELAY = 10.0, 5.0, 300.0
MOST_FRUITLESS = 8
"""Disruptions in a row that are free although no new checkpoint came of any of them; further ones count."""
SHORT_SECONDS = 60.0
"""A disrupted attempt that lived shorter than this and made no step may be disrupted again at once."""


def judge(plan: Plan, found: Outcome) -> bool:
    """Record the failure; True if it ends the job."""
    assert found.cause is not None
    judged, message = verdict(found.cause), found.message
    row = _fruitless_row(plan) if judged == "free" and found.cause not in UNCOUNTED else 0
    if row > MOST_FRUITLESS:
        judged, message = "counted", reasons.FRUITLESS_MESSAGE.format(row=row, message=message)
    counted = judged == "counted"
    plan.close(found.cause, counted=counted, message=message, found=found)
    plan.event(
        reasons.EVENT_ENDED,
        f"attempt {plan.number}: {found.cause}: {message}",
        warning=True,
        key=str(plan.number),
    )
    if judged == "fatal":
        plan.fail(found.cause, message, found)
        return True
    failures, limit = plan.status.counted_failures or 0, plan.spec.backoff_limit
    if counted and failures > limit:
        message = reasons.BACKOFF_LIMIT_MESSAGE.format(failures=failures, limit=limit, message=message)
        plan.fail(found.cause, message, found)
        return True
    return False


def _fruitless_row(plan: Plan) -> int:
    """How many attempts in a row, with the newest, were ended by others and brought no new checkpoint."""
    row, reached = 0, (plan.status.checkpoint.latest_step if plan.status.checkpoint else None) or 0
    for attempt in reversed(plan.status.attempts):
        started = attempt.from_step or 0
        if reached > started:
            break
        if attempt.number != plan.number:
            if attempt.cause in (Cause.NODE_REJECTED, Cause.STARTUP_TIMEOUT):
                continue  # it never ran
            if attempt.cause == Cause.SUSPENDED or verdict(attempt.cause or "") != "free":
                break
        row, reached = row + 1, started
    return row


def wait_out(plan: Plan) -> bool:
    """Hold the next attempt back until its delay is over."""
    record = plan.record
    if record is None or record.end_time is None:
        return False
    delay = delay_after(plan.status.attempts, plan.status.counted_failures or 0)
    end = min(timestamps.parse(record.end_time) or plan.now, plan.now)  # version 1 wrote times of nodes
    record.end_time = timestamps.write(end)
    due = end + timedelta(seconds=delay)
    left = (due - plan.now).total_seconds()
    if left <= 0:
        return False
    message = reasons.BACKOFF_MESSAGE.format(
        attempt=record.number, cause=record.cause, next=record.number + 1, time=timestamps.write(due)
    )
    plan.phase("Pending", reasons.BACKOFF, message)
    plan.wake_in(left)
    return True


def delay_after(attempts: list[Attempt], counted_failures: int) -> float:
    """Seconds between the end of the newest attempt and the next: doubling with each failure in a row.

    After a disruption the next attempt starts at once, unless disruptions follow each other without any progress. A
    node that refused a pod would get the next one too, so that waits.
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
    if last.cause in (Cause.NODE_REJECTED, Cause.STARTUP_TIMEOUT):  # others may take what was given back
        fruitless = max(1, fruitless) + 1
    return float(min(LONGEST_DELAY, FREE_BASE * 2.0 ** (fruitless - 2))) if fruitless > 1 else 0.0


def _fruitless(attempt: Attempt) -> bool:
    start, end = timestamps.parse(attempt.start_time), timestamps.parse(attempt.end_time)
    lived = (end - start).total_seconds() if start and end else 0.0
    return lived < SHORT_SECONDS and (attempt.to_step or 0) <= (attempt.from_step or 0)
