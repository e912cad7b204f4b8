"""No attempt is live: start the next one as soon as nothing stands in its way."""

from __future__ import annotations

from nemo_rl.job import names
from nemo_rl.job.status import MAX_ATTEMPTS, Cause
from nemo_rl_operator import build, frozen, reasons
from nemo_rl_operator.observe import Assignment
from nemo_rl_operator.plan import Create, Delete, Kind, Need, Plan
from nemo_rl_operator.policies import lost
from nemo_rl_operator.runtime import timestamps

SHORTEST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.25, 30.0
"""Between two looks for bundles, whose upload takes as long as it takes."""


def wait_for_pods(plan: Plan) -> bool:
    """Two attempts never run at once: pods of earlier ones must have ended."""
    if not plan.live_pods():
        return False
    lost.release(plan)
    plan.phase("Starting", reasons.ENDING, plan.waits_for())
    return True


def wait_for_bundles(plan: Plan) -> bool:
    """The client makes the ConfigMaps after the job, so that they belong to it."""
    parts = list(dict.fromkeys(part for bundle in plan.spec.bundles for part in bundle.config_maps))
    if not parts:
        return False
    if plan.snapshot.bundle_parts is None:
        plan.needs.add(Need.BUNDLES)
        return True
    missing = [part for part in parts if part not in plan.snapshot.bundle_parts]
    if not missing:
        return False
    waited = _waited(plan)
    if waited >= names.BUNDLE_WAIT_SECONDS:
        minutes = names.BUNDLE_WAIT_SECONDS // 60
        message = reasons.BUNDLES_FAILED_MESSAGE.format(
            missing=len(missing), total=len(parts), first=missing[0], minutes=minutes
        )
        plan.fail(Cause.BUNDLES_MISSING, message)
        return True
    message = reasons.BUNDLES_MESSAGE.format(missing=len(missing), total=len(parts))
    plan.phase("Pending", reasons.BUNDLES, message)
    plan.wake_in(min(LONGEST_LOOK_SECONDS, max(SHORTEST_LOOK_SECONDS, waited / 4)))
    return True


def _waited(plan: Plan) -> float:
    """Seconds since the job could have started: since it was made, resumed, or its last attempt ended."""
    suspended = plan.status.condition("Suspended")
    times = [
        plan.snapshot.resource.created,
        suspended.last_transition_time if suspended else None,
        plan.record.end_time if plan.record else None,
    ]
    ages = [-left for time in times if (left := timestamps.seconds_until(time, plan.now)) is not None]
    return max(0.0, min(ages, default=0.0))


def confirm_end(plan: Plan) -> bool:
    """The cache may be old: before another attempt is started, the last one's Job and pods are read once."""
    if plan.number and plan.snapshot.verified != plan.number:
        plan.needs.add(Need.ATTEMPT)
        return True
    return False


def _admission(plan: Plan) -> tuple[str, Assignment]:
    """The Workload that admits the attempt, and what Kueue assigned to it; empty for a job without a queue."""
    workload = plan.snapshot.workload
    if workload is None:
        return "", Assignment()
    return workload.name, plan.snapshot.assignment or Assignment()


def start(plan: Plan) -> bool:
    resource, spec = plan.snapshot.resource, plan.spec
    if not (spec.image or plan.snapshot.image):
        plan.phase("Pending", reasons.NO_IMAGE, reasons.NO_IMAGE_MESSAGE)
        return True
    if resource.abridged:
        plan.needs.add(Need.ROWS)
        return True
    number = plan.number + 1
    if number == 1 and (problem := frozen.too_large(frozen.text(resource, spec))):
        plan.condition("Accepted", False, Cause.INVALID_SPEC, problem)
        plan.fail(Cause.INVALID_SPEC, problem)
        return True
    made = (
        (Kind.CONFIG_MAP, build.frozen_job(resource, spec)),
        (Kind.CLAIM, build.output_claim(resource, spec)),
        (Kind.NETWORK_POLICY, build.network_policy(resource, plan.snapshot.network)),
        (Kind.SECRET, build.run_secret(resource, spec)),
        (Kind.SERVICE, build.service(resource, spec)),
        (Kind.JOB, build.attempt_job(resource, spec, number, plan.snapshot.image, *_admission(plan))),
    )
    plan.actions += [Create(kind, body) for kind, body in made if body is not None]
    plan.begin(number, plan.time)
    plan.event(reasons.EVENT_STARTED, reasons.STARTING_MESSAGE.format(attempt=number), key=str(number))
    plan.phase("Starting", reasons.STARTING, reasons.STARTING_MESSAGE.format(attempt=number))
    for old in plan.snapshot.attempts.values():
        if old.number <= number - MAX_ATTEMPTS and not old.deleting:
            plan.actions.append(Delete(Kind.JOB, old.name, old.uid))
    return True
