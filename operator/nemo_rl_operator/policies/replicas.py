"""Rollout replicas: a StatefulSet that comes with the first attempt, stays over attempts, and goes with suspension and the end.

A replica holds nothing that cannot be made anew, so it has rules of its own: its loss ends no attempt, and the trainer, which
alone sees whether one has the weights, says what it is good for. Where both speak of a replica, its pod has the last word:
one that does not run is not ready, whatever the trainer has heard of it.

That there is a StatefulSet is remembered in `status.rollout`, and the set is read only when something is to be done about it:
a job without replicas asks the API server nothing more.
"""

from __future__ import annotations

import re

from nemo_rl.job import names
from nemo_rl.job.status import RolloutMember, RolloutStatus, ServerReport
from nemo_rl_operator import build, pending, reasons
from nemo_rl_operator.observe import PodView
from nemo_rl_operator.plan import Create, Delete, Kind, Need, Plan, Update
from nemo_rl_operator.policies import budget

ABSENT_SECONDS = 30.0
"""So long a replica's pod may be missing before its StatefulSet is looked at: somebody may have deleted or changed it."""


def check(plan: Plan) -> bool:
    """What keeps a job with replicas from being started at all."""
    if not build.num_replicas(plan.spec):
        return False
    if not _image(plan):
        plan.phase("Pending", reasons.NO_IMAGE, reasons.NO_ROLLOUT_IMAGE_MESSAGE)
        return True
    if plan.snapshot.resource.queue:
        plan.phase("Pending", reasons.REFUSED, reasons.REPLICAS_IN_QUEUE_MESSAGE)
        return True
    return False


def keep(plan: Plan) -> None:
    """Makes, changes or deletes the StatefulSet, and says how the replicas are. Goes last: it follows what was decided."""
    if plan.needs:
        return  # this will be decided once more
    if plan.snapshot.problem and not (plan.status.finished or budget.held(plan)):
        return  # how many there should be is not understood: they stay as they are
    wanted = _wanted(plan)
    if not (wanted or plan.status.rollout or plan.snapshot.replicas):
        return
    if not wanted:
        _end(plan)
    elif plan.snapshot.blocked is None:
        _have(plan, wanted)
    if wanted and not plan.needs:
        _report(plan, wanted)


def _image(plan: Plan) -> str:
    rollout = plan.spec.rollout
    return (rollout.image if rollout is not None else None) or plan.snapshot.rollout_image


def _wanted(plan: Plan) -> int:
    """How many replicas there should be now."""
    wanted = build.num_replicas(plan.spec)
    if not (wanted and plan.number and _image(plan)) or plan.status.finished or budget.held(plan):
        return 0
    if plan.open:
        return wanted
    # the trainer is gone, and its next attempt waits: replicas stay warm for as long as a start may take
    record = plan.record
    waited = -(plan.seconds_until(record.end_time if record else None) or 0.0)
    limit = plan.spec.startup_timeout_seconds
    if waited >= limit:
        return 0
    plan.wake_in(limit - waited + 0.1)
    return wanted


def _end(plan: Plan) -> None:
    """Deletes the StatefulSet, and with it the pods."""
    if plan.status.rollout is None and all(pod.deleting or pod.terminal for pod in plan.snapshot.replicas):
        return
    if not plan.snapshot.replica_set_read:
        plan.needs.add(Need.REPLICAS)
        return
    found = plan.snapshot.replica_set
    if found is not None and found.owner == plan.snapshot.resource.uid and not found.deleting:
        plan.actions.append(Delete(Kind.STATEFUL_SET, found.name, found.uid))
    plan.status.rollout = None


def _have(plan: Plan, wanted: int) -> None:
    """Sees to it that the StatefulSet is there, and is what it should be."""
    before = plan.status.rollout
    resource, spec = plan.snapshot.resource, plan.spec
    starting = any(isinstance(action, Create) and action.kind is Kind.JOB for action in plan.actions)
    if before is not None and before.replicas == wanted and not starting and not _missing(plan, wanted):
        return
    if not plan.snapshot.replica_set_read:
        plan.needs.add(Need.REPLICAS)
        return
    found = plan.snapshot.replica_set
    if found is None:
        _create(plan)
        return
    if found.owner != resource.uid or found.deleting:
        plan.wake_in(ABSENT_SECONDS)  # it goes, or somebody must say what is to become of it
        return
    body = build.replica_set(resource, spec, plan.snapshot.rollout_image)
    change = {}
    if found.replicas != wanted:
        change["replicas"] = wanted
    if found.content != build.replica_content(resource, spec, plan.snapshot.rollout_image):
        change["template"] = body["spec"]["template"]
    if change:
        plan.actions.append(Update(Kind.STATEFUL_SET, found.name, found.uid, change))


def _create(plan: Plan) -> None:
    """After the trainer's Job: where there is room for one pod, it is the trainer's."""
    resource = plan.snapshot.resource
    bodies = (
        (Kind.SERVICE, build.replica_service(resource)),
        (Kind.STATEFUL_SET, build.replica_set(resource, plan.spec, plan.snapshot.rollout_image)),
    )
    plan.actions += [Create(kind, body) for kind, body in bodies]


def _missing(plan: Plan, wanted: int) -> bool:
    """Whether pods have been missing for some time: their StatefulSet is looked at then, and again with patience."""
    if len({pod.index for pod in plan.snapshot.replicas if pod.index < wanted}) == wanted:
        return False
    before = plan.snapshot.status.rollout
    waited = -(plan.seconds_until(before.missing_since if before else None) or 0.0)
    plan.wake_in(max(0.0, ABSENT_SECONDS - waited) + 0.1)
    return waited >= ABSENT_SECONDS


# --- what is said about them


def _report(plan: Plan, wanted: int) -> None:
    """The members: of each what its pod says, and where that runs, what the trainer says."""
    resource = plan.snapshot.resource
    told = {one.address.rpartition(":")[0].strip("[]"): one for one in _heard(plan)}
    pods = {pod.index: pod for pod in plan.snapshot.replicas}
    members = []
    for number in range(wanted):
        pod = pods.get(number)
        if pod is None:
            name = f"{names.rollout(resource.name)}-{number}"
            members.append(RolloutMember(name=name, state="Pending", message=_why_absent(plan, name)))
        else:
            members.append(_member(plan, pod, told.get(pod.ip) if pod.ip else None))
    ready = sum(member.state == "Ready" for member in members)
    before = plan.snapshot.status.rollout
    missing = before.missing_since if before else None
    if all(number in pods for number in range(wanted)):
        missing = None
    elif missing is None or plan.snapshot.replica_set_read:
        missing = plan.time
    selector = ",".join(f"{name}={value}" for name, value in sorted(build.replica_selector(resource).items()))
    plan.status.rollout = RolloutStatus(
        replicas=wanted,
        ready=ready,
        text=f"{ready}/{wanted}",
        weight_version=max((m.weight_version for m in members if m.weight_version is not None), default=None),
        selector=selector,
        missing_since=missing,
        members=members,
    )
    _say(plan, before, members)
    if plan.status.phase == "Running" and plan.status.reason == reasons.RUNNING:
        message = reasons.REPLICAS_MESSAGE.format(ready=ready, replicas=wanted)
        if worst := next((m for m in members if m.state in ("Refused", "Lost", "Pending") and m.message), None):
            message += reasons.REPLICAS_FIRST_MESSAGE.format(name=worst.name, message=worst.message)
        trains = re.split(reasons.REPLICAS_PATTERN, plan.status.message or "")[0]  # it may be that of the time before
        plan.status.message = f"{trains}{message}"[:1024]


def _heard(plan: Plan) -> list[ServerReport]:
    """What the trainer said of the servers; nothing where it does not run."""
    progress = plan.snapshot.progress
    return (progress.rollout or []) if progress is not None and plan.open else []


def _member(plan: Plan, pod: PodView, told: ServerReport | None) -> RolloutMember:
    def found(state: str, message: str | None = None) -> RolloutMember:
        return RolloutMember.model_validate({"name": pod.name, "state": state, "message": message})

    if pod.deleting or pod.terminal:
        why = f" ({pod.disruption})" if pod.disruption else ""
        return found("Lost", reasons.REPLICA_ENDING_MESSAGE.format(reason=why))
    if pod.phase != "Running":
        text = _why_pending(plan, pod)
        return found("Pending", text)
    if (pod.waiting or pod.exit_code is not None) and pod.last_end:
        return found("Lost", reasons.REPLICA_ENDED_MESSAGE.format(end=pod.last_end, restarts=pod.restarts))
    if told is None:
        return found("Loading", reasons.REPLICA_LOADING_MESSAGE)
    return RolloutMember(
        name=pod.name,
        state=told.state,
        weight_version=told.weight_version,
        tokens_per_second=told.tokens_per_second,
        message=told.message,
    )


def _why_absent(plan: Plan, name: str) -> str:
    """Why a replica has no pod: what the StatefulSet controller was told, as long as nobody says otherwise."""
    if warning := plan.snapshot.replica_warning:
        return pending.from_warning(warning).message
    before = plan.snapshot.status.rollout
    known = [m for m in (before.members if before and before.missing_since else []) if m.name == name]
    return known[0].message or "" if known and known[0].state == "Pending" else reasons.REPLICA_ABSENT_MESSAGE


def _why_pending(plan: Plan, pod: PodView) -> str:
    """Why a replica's pod does not run yet."""
    asks = plan.spec.model_copy(update={"resources": _asks(plan)})
    waiting = pending.waiting((pod,), asks, _image(plan), "")
    return waiting.message if waiting.message != "the pod starts" else reasons.REPLICA_STARTING_MESSAGE


def _asks(plan: Plan) -> object:
    """What one replica asks for, in the form of what a trainer asks for."""
    rollout, resources = plan.spec.rollout, plan.spec.resources
    assert rollout is not None
    return resources.model_copy(
        update={
            "nodes": 1,
            "gpus_per_node": rollout.gpus_per_replica,
            "extra": {},
            "cpu": rollout.resources.cpu,
            "memory": rollout.resources.memory,
            "ephemeral_storage": rollout.resources.ephemeral_storage,
        }
    )


def _say(plan: Plan, before: RolloutStatus | None, members: list[RolloutMember]) -> None:
    """Events about replicas that were lost or refused, or came back. Each change once, by the time at which it was seen."""
    old = {member.name: member.state for member in before.members} if before else {}
    for member in members:
        was = old.get(member.name)
        if was is None or was == member.state:
            continue
        key = f"{member.name} {member.state} {plan.time}"
        if member.state == "Refused":
            text = (
                f"rollout replica {member.name} is refused and gets no requests: {member.message or 'no reason given'}"
            )
            plan.event(reasons.EVENT_REPLICA_REFUSED, text, warning=True, key=key)
        elif member.state == "Lost" or (was == "Ready" and member.state in ("Pending", "Loading")):
            text = f"rollout replica {member.name} is lost, the others go on: {member.message or 'its pod is new'}"
            plan.event(reasons.EVENT_REPLICA_LOST, text, warning=True, key=key)
        elif member.state == "Ready" and was != "Updating":
            text = f"rollout replica {member.name} has version {member.weight_version} of the weights and gets requests"
            plan.event(reasons.EVENT_REPLICA_READY, text, key=key)
