"""No attempt is live: start the next one as soon as nothing stands in its way."""

from __future__ import annotations

from nemo_rl.job import names
from nemo_rl.job.status import MAX_ATTEMPTS, Cause
from nemo_rl_operator import build, reasons, timestamps
from nemo_rl_operator.policies import lost
from nemo_rl_operator.turn import Create, Delete, Kind, Need, Turn


def wait_for_pods(turn: Turn) -> bool:
    """Two attempts never run at once: pods of earlier ones must have ended."""
    if not turn.live_pods():
        return False
    lost.release(turn)
    turn.phase("Starting", reasons.ENDING, reasons.ENDING_MESSAGE.format(attempt=turn.number))
    return True


def wait_for_bundles(turn: Turn) -> bool:
    """The client makes the ConfigMaps after the job, so that they belong to it."""
    parts = list(dict.fromkeys(part for bundle in turn.spec.bundles for part in bundle.config_maps))
    if not parts:
        return False
    if turn.seen.bundle_parts is None:
        turn.needs.add(Need.BUNDLES)
        return True
    missing = [part for part in parts if part not in turn.seen.bundle_parts]
    if not missing:
        return False
    turn.clock(False)
    waited = _waited(turn)
    if waited >= names.BUNDLE_WAIT_SECONDS:
        minutes = names.BUNDLE_WAIT_SECONDS // 60
        message = reasons.BUNDLES_FAILED_MESSAGE.format(
            missing=len(missing), total=len(parts), first=missing[0], minutes=minutes
        )
        turn.fail(Cause.BUNDLES_MISSING, message)
        return True
    message = reasons.BUNDLES_MESSAGE.format(missing=len(missing), total=len(parts))
    turn.phase("Pending", reasons.BUNDLES, message)
    turn.wake_in(min(5.0, max(0.25, waited / 4)))
    return True


def _waited(turn: Turn) -> float:
    """Seconds since the job could have started: since it was made, resumed, or its last attempt ended."""
    suspended = turn.status.condition("Suspended")
    times = [
        turn.seen.resource.created,
        suspended.last_transition_time if suspended else None,
        turn.record.end_time if turn.record else None,
    ]
    ages = [-left for time in times if (left := timestamps.seconds_until(time, turn.now)) is not None]
    return max(0.0, min(ages, default=0.0))


def confirm_end(turn: Turn) -> bool:
    """The cache may be old: before another attempt is started, the last one's Job and pods are read once."""
    if turn.number and turn.seen.verified != turn.number:
        turn.needs.add(Need.ATTEMPT)
        return True
    return False


def start(turn: Turn) -> bool:
    resource, spec = turn.seen.resource, turn.spec
    if not (spec.image or turn.seen.image):
        turn.phase("Pending", reasons.NO_IMAGE, reasons.NO_IMAGE_MESSAGE)
        return True
    number = turn.number + 1
    made = (
        (Kind.CONFIG_MAP, build.frozen_job(resource, spec)),
        (Kind.CLAIM, build.output_claim(resource, spec)),
        (Kind.SERVICE, build.service(resource, spec)),
        (Kind.JOB, build.attempt_job(resource, spec, number, turn.seen.image)),
    )
    turn.actions += [Create(kind, body) for kind, body in made if body is not None]
    turn.begin(number, turn.time)
    turn.clock(not resource.queue)
    turn.event(reasons.EVENT_STARTED, reasons.STARTING_MESSAGE.format(attempt=number), key=str(number))
    if resource.queue:
        turn.phase("Queued", reasons.QUEUED, reasons.QUEUED_MESSAGE.format(queue=resource.queue))
    else:
        turn.phase("Starting", reasons.STARTING, reasons.STARTING_MESSAGE.format(attempt=number))
    for old in turn.seen.attempts.values():
        if old.number <= number - MAX_ATTEMPTS and not old.deleting:
            turn.actions.append(Delete(Kind.JOB, old.name, old.uid))
    return True
