"""Kueue: one Workload for all attempts of a job, so that a retry keeps its place in the queue and its quota.

The job asks for its quota once, before its first attempt. Pods run only while Kueue admits it; when Kueue takes the
quota back, the attempt is stopped, and the next one starts when the job is admitted again.
"""

from __future__ import annotations

from nemo_rl.job.status import Cause
from nemo_rl_operator import build, reasons
from nemo_rl_operator.observe import AttemptView, WorkloadView
from nemo_rl_operator.plan import Create, Delete, Kind, Need, Plan, Report
from nemo_rl_operator.policies import lost

LONGEST_LOOK_SECONDS = 300.0
"""Between two looks at what nobody tells the operator of."""
HELD_SECONDS = 10.0
RETURNED = ("Preempted", "NodeFailures")
"""Evictions after which a job may be admitted again at once; for the others Kueue says when."""


def give_way(plan: Plan) -> bool:
    """Kueue takes the quota back, or somebody deleted the Workload: the pods save a checkpoint and end."""
    attempt, record = plan.attempt, plan.record
    if attempt is None or record is None or not plan.open or not plan.snapshot.kueue:
        return False
    if attempt.queue or not (attempt.workload or _to_be_queued(plan, attempt)):
        return False
    workload = plan.snapshot.workload
    if workload is not None and workload.admitted and not workload.evicted and not workload.deleting:
        return False
    if not plan.snapshot.workload_read:
        plan.needs.add(Need.WORKLOAD)
        return True
    record.cause, record.counted = Cause.PREEMPTED, False
    why = workload.evicted if workload else ""
    record.message = (why or reasons.WITHOUT_WORKLOAD)[:200]
    if attempt.deleting or attempt.finished:
        lost.release(plan)
    else:
        plan.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))
    plan.phase(
        plan.status.phase or "Starting",
        reasons.PREEMPTED,
        reasons.PREEMPTED_MESSAGE.format(why=why or reasons.WITHOUT_WORKLOAD),
    )
    return True


def _to_be_queued(plan: Plan, attempt: AttemptView) -> bool:
    """The job got its queue's name only after Kueue had refused to run a Job without one."""
    return bool(plan.snapshot.resource.queue) and attempt.suspended


def release(plan: Plan) -> bool:
    """Give the quota back once no pod uses it."""
    workload = plan.snapshot.workload
    if workload is None or not (workload.evicted and workload.reserved) or workload.finished:
        return False
    if plan.number and plan.snapshot.verified != plan.number:
        plan.needs.add(Need.ATTEMPT)
        return True
    requeued = workload.eviction in RETURNED
    plan.actions.append(
        Report(
            workload.name,
            workload.uid,
            (
                ("Requeued", requeued, workload.eviction, workload.evicted),
                ("QuotaReserved", False, "Pending", workload.evicted),
                ("Admitted", False, "NoReservation", "The workload has no reservation"),
            ),
            release=True,
        )
    )
    return False


def wait_for_admission(plan: Plan) -> bool:
    """Enter the queue, and wait there until Kueue admits the job."""
    resource, workload = plan.snapshot.resource, plan.snapshot.workload
    if not plan.snapshot.kueue:
        if not resource.queue:
            return False
        _queued(plan, resource.queue, reasons.NO_KUEUE)
        return True
    if workload is not None and workload.deleting:
        _queued(plan, workload.queue, reasons.WORKLOAD_ENDING)
        return True
    if workload is not None and _of_another_queue(plan, workload):
        plan.actions.append(Delete(Kind.WORKLOAD, workload.name, workload.uid))
        workload = None
    if workload is None:
        return _enter(plan)
    if not workload.active:
        _queued(plan, workload.queue, reasons.DEACTIVATED.format(name=workload.name, why=workload.evicted))
        return True
    if not workload.admitted or workload.evicted:
        _queued(plan, workload.queue, workload.pending)
        return True
    if plan.snapshot.assignment is None:
        plan.needs.add(Need.FLAVORS)
        return True
    return False


def _of_another_queue(plan: Plan, workload: WorkloadView) -> bool:
    """It has ended, or the job's label names another queue by now; a reserved one stays where it is."""
    queue = plan.snapshot.resource.queue
    return workload.finished or (bool(queue) and queue != workload.queue and not workload.reserved)


def _enter(plan: Plan) -> bool:
    queueing = plan.snapshot.queueing
    if queueing is None:
        plan.needs.add(Need.QUEUE)
        return True
    if not queueing.queue:
        return False
    if build.num_replicas(plan.spec):  # the namespace queues all jobs
        plan.phase("Pending", reasons.REFUSED, reasons.REPLICAS_IN_QUEUE_MESSAGE)
        return True
    if queueing.problem:
        _queued(plan, queueing.queue, queueing.problem)
        plan.wake_in(LONGEST_LOOK_SECONDS)
        return True
    body = build.workload(plan.snapshot.resource, plan.spec, queueing, plan.snapshot.image, plan.snapshot.kueue)
    plan.actions.append(Create(Kind.WORKLOAD, body))
    _queued(plan, queueing.queue, "")
    return True


def _queued(plan: Plan, queue: str, why: str) -> None:
    message = reasons.QUEUED_MESSAGE.format(queue=queue)
    plan.phase("Queued", reasons.QUEUED, f"{message}: {why}" if why else message)


def report_held(plan: Plan, attempt: AttemptView) -> None:
    """The attempt's Job is suspended, and not by us: Kueue manages it by itself, or somebody else does."""
    workload = plan.snapshot.workload
    if not attempt.queue:
        plan.phase("Queued", reasons.QUEUED, _held_message(plan, attempt))
        plan.wake_in(LONGEST_LOOK_SECONDS)
        return
    if workload is not None and not workload.deleting:  # two reservations for one job could wait for each other
        plan.actions.append(Delete(Kind.WORKLOAD, workload.name, workload.uid))
    if plan.snapshot.held is None and plan.snapshot.kueue:
        plan.needs.add(Need.HELD)
    queued = plan.status.condition("Running")
    asked = -(plan.seconds_until(queued.last_transition_time if queued else None) or 0.0)
    plan.wake_in(min(LONGEST_LOOK_SECONDS, max(HELD_SECONDS, asked / 4)))
    _queued(plan, attempt.queue, plan.snapshot.held or "")


def _held_message(plan: Plan, attempt: AttemptView) -> str:
    if not plan.snapshot.kueue:
        return reasons.HELD_MESSAGE.format(job=attempt.name)
    if plan.snapshot.workload is None:
        return reasons.UNQUEUED_MESSAGE.format(job=attempt.name, name=plan.snapshot.resource.name)
    return reasons.UNKNOWN_TO_KUEUE_MESSAGE.format(job=attempt.name)


def leave(plan: Plan) -> None:
    """Leave the queue: a suspended job neither waits nor holds quota."""
    workload = plan.snapshot.workload
    if workload is not None and not workload.deleting and not workload.finished:
        plan.actions.append(Delete(Kind.WORKLOAD, workload.name, workload.uid))


def report_ready(plan: Plan) -> None:
    """Tell Kueue whether all pods run: it may be set up to take the quota back from jobs that do not start."""
    workload = plan.snapshot.workload
    if workload is None or not workload.admitted or workload.evicted or workload.finished:
        return
    ready = plan.status.phase == "Running"
    if ready == bool(workload.pods_ready):
        return
    reason = "Started" if ready else "WaitForRecovery"
    plan.actions.append(Report(workload.name, workload.uid, (("PodsReady", ready, reason, plan.status.message or ""),)))


def finish(plan: Plan) -> None:
    """Give the quota of a finished job back, once its pods have ended."""
    workload = plan.snapshot.workload
    if workload is None or workload.finished or plan.live_pods():
        return
    if any(not attempt.finished and attempt.deleting for attempt in plan.snapshot.attempts.values()):
        return
    reason = "Succeeded" if plan.status.phase == "Succeeded" else "Failed"
    finished = (("Finished", True, reason, plan.status.message or reason),)
    plan.actions.append(Report(workload.name, workload.uid, finished))
