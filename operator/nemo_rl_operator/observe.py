"""What the operator looks at: small frozen views of the resource, its Jobs and its pods, cut from what the API sends.

The cache keeps only these views, so ten thousand jobs fit in little memory, and two views are equal exactly when
nothing changed that a decision depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from nemo_rl.job import names
from nemo_rl.job.decode import too_deep
from nemo_rl.job.reading import problems, read_spec, salvage_spec
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl.job.status import JobStatus, Progress
from nemo_rl_operator.fingerprint import fingerprint

Raw = Mapping[str, Any]
ENDED = ("Succeeded", "Failed")
MAIN_POD_SET = "main"
"""The pod set of the trainers in the job's Workload."""

log = logging.getLogger(__name__)

ROWS_KEPT = names.MAX_INLINE_ROWS
"""Bytes of inline rows that are kept in memory; of more only a digest is."""
PARSED_BYTES = 2 * 1024 * 1024
"""Specifications whose texts are this long together are kept as objects, which are several times as large."""


@dataclass(frozen=True, slots=True)
class Resource:
    """An RLTrainingJob. Spec and status are kept as JSON text: a tenth of the memory of nested dicts."""

    namespace: str
    name: str
    uid: str
    version: str
    generation: int
    created: str
    deleting: bool
    queue: str
    """Kueue queue, from the label; empty without."""
    priority: str
    spec: str
    status: str
    phase: str
    at_rest: bool
    """Finished, reported as such, and with nothing to do at a later time."""
    restored: str = ""
    """Name of the restore that it came from, if it came from a backup."""
    abridged: bool = False
    """In `spec` a digest stands for inline rows: they are read when pods are made, and not kept meanwhile."""

    @property
    def finished(self) -> bool:
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class AttemptView:
    """The Job of one attempt."""

    number: int
    name: str
    uid: str
    owner: str
    """Uid of the RLTrainingJob that controls it."""
    created: str
    suspended: bool
    queue: str
    """Queue in which Kueue holds this very Job: by the label that Kueue, or an older operator, gave it."""
    workload: str
    """The job's Workload under whose quota it was started; empty for a job without a queue."""
    deleting: bool
    complete: bool
    failed: bool
    reason: str
    """Of the Failed condition."""
    message: str
    ended: str
    content: str
    """Fingerprint of what it runs."""
    generation: int = field(default=0, compare=False)
    """Of the specification: as long as it stays, so does the fingerprint."""

    @property
    def finished(self) -> bool:
        return self.complete or self.failed


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod of an attempt, the file server, or a rollout replica."""

    name: str
    uid: str
    owner: str
    """Uid of the RLTrainingJob that it belongs to, by its label."""
    controller: str
    """Uid of the Job or StatefulSet that made it; empty where nothing or somebody else did."""
    attempt: int
    """0 for the file server and for replicas."""
    index: int
    phase: str
    """Of the trainer's container: Running while it runs and ended when it has, whatever containers of others do."""
    reason: str
    message: str
    ip: str
    created: str
    deleting: bool
    gone_by: str
    """When a pod that is being deleted should have ended."""
    forced: bool
    """Deleted without waiting for its node's word: kubectl delete --force."""
    scheduled: bool
    """Whether it has a node: from then on it holds what it asked for."""
    unschedulable: str
    waiting: str
    waiting_message: str
    exit_code: int | None
    end_reason: str
    termination: str
    """Termination message of the trainer."""
    started: str
    ended: str
    disruption: str
    """Reason and message of the DisruptionTarget condition."""
    lingers: bool = False
    """The trainer has ended, but a container that others added keeps the pod."""
    scheduled_at: str = ""
    init_failure: str = ""
    """Which init container failed, and how, in words."""
    init_waiting: str = ""
    """Which init container the trainer waits for, and why, in words."""
    replica: bool = False
    """Whether it is a rollout replica; `index` is its number then."""
    restarts: int = 0
    """How often the container of a replica was started anew."""
    last_end: str = ""
    """How the container of a replica ended the last time, in words."""

    @property
    def terminal(self) -> bool:
        """Whether the trainer has ended."""
        return self.phase in ENDED


@dataclass(frozen=True, slots=True)
class ReplicaSetView:
    """The StatefulSet of the job's rollout replicas."""

    name: str
    uid: str
    owner: str
    """Uid of the RLTrainingJob that controls it."""
    deleting: bool
    replicas: int
    content: str
    """Fingerprint of what it runs."""


@dataclass(frozen=True, slots=True)
class WorkloadView:
    """Kueue's Workload of the job: its place in the queue, and its quota."""

    name: str
    uid: str
    owner: str
    """Uid of the RLTrainingJob that controls it."""
    deleting: bool
    queue: str
    active: bool
    reserved: bool
    """Its quota is set aside."""
    admitted: bool
    evicted: str
    """Why Kueue takes the quota back; empty while it does not."""
    eviction: str
    """Reason of that, in one word."""
    pending: str
    """What it waits for."""
    pods_ready: bool | None
    finished: bool
    assignment: str
    """What Kueue assigned to the pods, as JSON: their flavors, changes by admission checks, a topology."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What Kueue adds to the pods that it admits."""

    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    node_selector: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[str, ...] = ()
    """Each as JSON."""
    gates: tuple[str, ...] = ()
    """Scheduling gates."""


@dataclass(frozen=True, slots=True)
class Queueing:
    """With what a job enters its queue."""

    queue: str
    """The LocalQueue; empty where it names none and the namespace has no default one."""
    priority: int = 0
    priority_class: str = ""
    pod_priority: bool = False
    """Whether the class is one of pods, and not one of Kueue's."""
    problem: str = ""
    """Why it cannot be queued; empty if it can."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Why the last attempt to make a child object failed."""

    reason: str
    message: str
    fatal: bool
    """Trying again cannot help."""
    conflict: bool = False
    """The object exists and belongs to somebody else."""
    stray: tuple[str, str] | None = None
    """Name and uid of a Job that says it is this job's, and is not what the operator makes."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that `decide` knows besides the time."""

    resource: Resource
    spec: RLTrainingJobSpec
    """As far as it can be read: with a problem it is good enough to look after what runs, and nothing may be started."""
    problem: str
    """Why the spec is refused; empty where it is not."""
    status: JobStatus
    attempts: Mapping[int, AttemptView] = field(default_factory=dict)
    pods: Mapping[int, tuple[PodView, ...]] = field(default_factory=dict)
    files: PodView | None = None
    replicas: tuple[PodView, ...] = ()
    """Pods of the job's rollout replicas, by number."""
    replica_set: ReplicaSetView | None = None
    replica_set_read: bool = False
    """The StatefulSet of the replicas was read just now: `replica_set` is None where there is none."""
    replica_warning: str = ""
    """Newest warning Event about that StatefulSet, where it lacks pods: their quota, for example."""
    rollout_image: str = ""
    """Image of the replicas of jobs that name none."""
    progress: Progress | None = None
    unreadable: str = ""
    """Why the progress has not been readable for a while; empty where it is, or may be soon."""
    image: str = ""
    """Trainer image of jobs that name none."""
    network: str = ""
    """What may reach the pods of a job beside each other, as JSON; empty: the operator makes no NetworkPolicy."""
    begun: int = 0
    """Number of the attempt that was made just now, and that the status does not tell of yet."""
    verified: int = 0
    """Number of the attempt whose Job and pods were just read from the API server rather than from the cache."""
    bundle_parts: frozenset[str] | None = None
    """ConfigMaps of bundles that exist; None before somebody looked."""
    warning_event: str | None = None
    """Newest warning Event about the live attempt; empty where there is none, None before somebody looked."""
    kueue: str = ""
    """Version of Kueue's API that is served; empty where Kueue is not installed."""
    workload: WorkloadView | None = None
    workload_read: bool = False
    """The Workload was just read from the API server rather than from the cache."""
    queueing: Queueing | None = None
    """None before somebody looked; likewise the next two."""
    assignment: Assignment | None = None
    held: str | None = None
    """What Kueue says about the attempt's Job, which it queues by itself."""
    blocked: Blocked | None = None
    unknown: tuple[str, ...] = ()
    """Fields of the spec that this version does not know."""
    changed: str = ""
    """What of the specification was changed since the job started, which is not taken; `spec` is as it was then."""
    unserved: Blocked | None = None
    """Why the file server could not be made just now."""
    strays: tuple[AttemptView, ...] = ()
    """Jobs that say they are the next attempt, and are not what the operator would make of the job as it is now."""


def resource(raw: Raw, *, whole: bool = False) -> Resource:
    """The view of an RLTrainingJob; `whole` keeps all of its rows."""
    meta = raw["metadata"]
    labels = meta.get("labels") or {}
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    if not whole:
        spec = abridged(spec)
    phase = str(status.get("phase") or "") if isinstance(status, Mapping) else ""
    return Resource(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        version=meta.get("resourceVersion", ""),
        generation=meta.get("generation", 0),
        created=meta.get("creationTimestamp", ""),
        deleting=bool(meta.get("deletionTimestamp")),
        queue=labels.get(names.LABEL_QUEUE, ""),
        priority=labels.get(names.LABEL_PRIORITY, ""),
        restored=labels.get(names.LABEL_RESTORED, ""),
        spec=json.dumps(spec, separators=(",", ":")),
        status=json.dumps(status, separators=(",", ":")) if status else "",
        phase=phase,
        at_rest=phase in ("Succeeded", "Failed")
        and status.get("observedGeneration") == meta.get("generation")
        and not spec.get("ttlSecondsAfterFinished")
        and spec.get("ttlSecondsAfterFinished") != 0
        and not (spec.get("output") or {}).get("serveUntil"),
        abridged=not whole and is_abridged(spec),
    )


ABRIDGED = "nemo-rl.io/abridged"
"""Key of the one row that stands for many."""


def abridged(spec: Raw) -> Raw:
    """The spec with a digest in place of rows that take too much memory to be kept."""
    kept = spec
    for name in ("dataset", "validationDataset"):
        section = spec.get(name)
        if not isinstance(section, Mapping):
            continue
        rows = section.get("inline")
        if not isinstance(rows, list) or any(too_deep(row) for row in rows):
            continue  # what is wrong with them must still be seen
        written = json.dumps(rows, separators=(",", ":"))
        if len(written) > ROWS_KEPT // 2:
            digest = hashlib.sha256(written.encode()).hexdigest()
            kept = {**kept, name: {**section, "inline": [{ABRIDGED: f"{len(rows)} rows, sha256 {digest}"}]}}
    return kept


def is_abridged(spec: Raw) -> bool:
    """Whether a digest stands for rows."""
    sections = (spec.get(name) for name in ("dataset", "validationDataset"))
    rows = [section.get("inline") for section in sections if isinstance(section, Mapping)]
    return any(isinstance(r, list) and len(r) == 1 and isinstance(r[0], Mapping) and ABRIDGED in r[0] for r in rows)


def _conditions(status: Raw) -> dict[str, Raw]:
    return {c["type"]: c for c in status.get("conditions") or () if c.get("status") == "True"}


def _controller(meta: Raw) -> Raw:
    """The controller among the owners."""
    return next((o for o in meta.get("ownerReferences") or () if o.get("controller")), {})


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def attempt_view(raw: Raw, known: AttemptView | None = None) -> AttemptView:
    """The view of a Job; `known` is what was known of that name, whose fingerprint holds while the specification does."""
    meta, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    conditions = _conditions(status)
    failed, complete = conditions.get("Failed"), conditions.get("Complete")
    end = failed or complete or {}
    uid, generation = meta["uid"], meta.get("generation", 0)
    same = known is not None and generation and (known.uid, known.generation) == (uid, generation)
    return AttemptView(
        number=_number((meta.get("labels") or {}).get(names.LABEL_ATTEMPT)),
        name=meta["name"],
        uid=uid,
        owner=_controller(meta).get("uid", ""),
        created=meta.get("creationTimestamp", ""),
        suspended=bool(spec.get("suspend")),
        queue=str((meta.get("labels") or {}).get(names.LABEL_QUEUE) or ""),
        workload=str((meta.get("annotations") or {}).get(names.ANNOTATION_WORKLOAD) or ""),
        deleting=bool(meta.get("deletionTimestamp")),
        complete=complete is not None,
        failed=failed is not None,
        reason=(failed or {}).get("reason", ""),
        message=(failed or {}).get("message", ""),
        ended=end.get("lastTransitionTime") or "",
        content=known.content if known and same else fingerprint(spec),
        generation=generation,
    )


def replica_set_view(raw: Raw) -> ReplicaSetView:
    meta, spec = raw["metadata"], raw.get("spec") or {}
    return ReplicaSetView(
        name=meta["name"],
        uid=meta["uid"],
        owner=_controller(meta).get("uid", ""),
        deleting=bool(meta.get("deletionTimestamp")),
        replicas=int(spec.get("replicas", 1)),
        content=fingerprint(spec),
    )


def workload_view(raw: Raw) -> WorkloadView:
    meta, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    conditions = {c.get("type"): c for c in status.get("conditions") or ()}
    held = {kind for kind, c in conditions.items() if c.get("status") == "True"}
    evicted = conditions["Evicted"] if "Evicted" in held else {}
    checks = status.get("admissionChecks") or ()
    admission = status.get("admission") or {}
    ready = conditions.get("PodsReady")
    return WorkloadView(
        name=meta["name"],
        uid=meta["uid"],
        owner=_controller(meta).get("uid", ""),
        deleting=bool(meta.get("deletionTimestamp")),
        queue=spec.get("queueName", ""),
        active=spec.get("active", True) is not False,
        reserved="QuotaReserved" in held,
        admitted="Admitted" in held,
        evicted=str(evicted.get("message") or evicted.get("reason") or ""),
        eviction=str(evicted.get("reason") or ""),
        pending=_pending(conditions, checks)[:500],
        pods_ready=None if ready is None else ready.get("status") == "True",
        finished="Finished" in held,
        assignment=_assignment(admission, checks),
    )


def _pending(conditions: Mapping[str, Raw], checks: Iterable[Raw]) -> str:
    """What Kueue says that a Workload waits for: quota, or admission checks."""
    reserved = conditions.get("QuotaReserved") or {}
    if reserved.get("status") != "True":
        return str(reserved.get("message") or "")
    waiting = [c for c in checks if c.get("state") != "Ready"]
    return "; ".join(f"admission check {c.get('name')}: {c.get('message') or c.get('state')}" for c in waiting)


def _assignment(admission: Raw, checks: Iterable[Raw]) -> str:
    found = [a for a in admission.get("podSetAssignments") or () if a.get("name", MAIN_POD_SET) == MAIN_POD_SET]
    if not found:
        return ""
    updates = [u for c in checks for u in c.get("podSetUpdates") or () if u.get("name") == MAIN_POD_SET]
    assigned = {
        "flavors": sorted(set((found[0].get("flavors") or {}).values())),
        "updates": updates,
        "topology": bool(found[0].get("topologyAssignment")),
    }
    return json.dumps(assigned, separators=(",", ":"), sort_keys=True)


def pod_view(raw: Raw) -> PodView:
    meta, status = raw["metadata"], raw.get("status") or {}
    labels = meta.get("labels") or {}
    attempt = _number(labels.get(names.LABEL_ATTEMPT))
    replica = not attempt and labels.get(names.LABEL_COMPONENT) == names.COMPONENT_ROLLOUT
    controller = _maker(meta, labels, attempt, replica)
    trainer = _container(status)
    state = trainer.get("state") or {}
    told = status.get("phase") or "Pending"
    phase = _trainer_phase(told, state) if attempt else told
    ended, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    scheduling: Raw = next((c for c in status.get("conditions") or () if c.get("type") == "PodScheduled"), {})
    disruption = _conditions(status).get("DisruptionTarget")
    index = labels.get(names.ANNOTATION_JOB_INDEX) or (meta.get("annotations") or {}).get(names.ANNOTATION_JOB_INDEX)
    if replica:
        index = meta["name"].rpartition("-")[2]
    return PodView(
        name=meta["name"],
        uid=meta["uid"],
        owner=labels.get(names.LABEL_JOB_UID, "") if controller else "",
        controller=controller,
        attempt=attempt,
        index=_number(index),
        phase=phase,
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        ip=status.get("podIP", ""),
        created=meta.get("creationTimestamp", ""),
        deleting=bool(meta.get("deletionTimestamp")),
        gone_by=meta.get("deletionTimestamp") or "",
        forced=bool(meta.get("deletionTimestamp")) and meta.get("deletionGracePeriodSeconds") == 0,
        scheduled=scheduling.get("status") == "True" or bool((raw.get("spec") or {}).get("nodeName")),
        unschedulable=scheduling.get("message", "") if scheduling.get("reason") == "Unschedulable" else "",
        waiting=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        exit_code=ended.get("exitCode"),
        end_reason=ended.get("reason", ""),
        termination=ended.get("message", ""),
        started=(state.get("running") or ended).get("startedAt") or status.get("startTime") or "",
        ended=ended.get("finishedAt") or "",
        disruption=f"{disruption.get('reason', '')}: {disruption.get('message', '')}" if disruption else "",
        lingers=phase in ENDED and told not in ENDED,
        scheduled_at=scheduling.get("lastTransitionTime") or "" if scheduling.get("status") == "True" else "",
        init_failure=_init_failure(status),
        init_waiting=_init_waiting(status),
        replica=replica,
        restarts=int(trainer.get("restartCount") or 0) if replica else 0,
        last_end=_last_end(trainer) if replica else "",
    )


def _maker(meta: Raw, labels: Mapping[str, str], attempt: int, replica: bool) -> str:
    """Uid of what made the pod, if that is what makes such pods: the attempt's Job, the StatefulSet of the replicas, or the
    resource (the file server).

    Labels can be written by anybody who makes pods. So can an owner, but one that does not exist is the end of a pod:
    the garbage collector deletes it.
    """
    job, found = labels.get(names.LABEL_JOB, ""), _controller(meta)
    kind, name = ("Job", names.attempt_job(job, attempt)) if attempt else (names.KIND, job)
    if replica:
        kind, name = "StatefulSet", names.rollout(job)
    wanted = found.get("kind", kind) == kind and found.get("name", name) == name
    return str(found.get("uid") or "") if wanted else ""


def _last_end(container: Raw) -> str:
    """How a container that is started anew ended before, in words; empty where it never did."""
    ended = ((container.get("state") or {}).get("terminated")) or ((container.get("lastState") or {}).get("terminated"))
    if not ended:
        return ""
    why = f" ({ended['reason']})" if ended.get("reason") not in (None, "", "Error", "Completed") else ""
    return f"it exited with {ended.get('exitCode')}{why}"


def _trainer_phase(phase: str, state: Raw) -> str:
    """The pod's phase as it would be with the trainer's container alone."""
    if ended := state.get("terminated"):
        return "Succeeded" if ended.get("exitCode") == 0 else "Failed"
    return "Running" if phase == "Pending" and state.get("running") else phase


def _init_failure(status: Raw) -> str:
    for container in status.get("initContainerStatuses") or ():
        ended = (container.get("state") or {}).get("terminated") or {}
        if ended.get("exitCode"):
            why = ": ".join(text for text in (ended.get("reason"), ended.get("message")) if text)
            return f"{container.get('name')} exited with {ended['exitCode']}" + (f" ({why[:300]})" if why else "")
    return ""


def _init_waiting(status: Raw) -> str:
    for container in status.get("initContainerStatuses") or ():
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "", "PodInitializing", "ContainerCreating"):
            why = ": ".join(text for text in (waiting.get("reason"), waiting.get("message")) if text)
            return f"{container.get('name')} ({why[:300]})"
    return ""


def _container(status: Raw) -> Raw:
    """Status of the trainer's container; what mutating webhooks add beside it is not looked at."""
    found = status.get("containerStatuses") or ()
    wanted = (names.TRAINER_CONTAINER, names.COMPONENT_FILES, names.ROLLOUT_CONTAINER)
    return next((c for c in found if c.get("name") in wanted), {})


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a spec's text says."""

    spec: RLTrainingJobSpec
    problem: str = ""
    """Why it is refused, one `path: problem` per error; then `spec` is what can be understood of it."""
    unknown: tuple[str, ...] = ()


class _Parser:
    """Parses specs, and remembers some of them, up to a bound on their size."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Parsed] = OrderedDict()
        self._size = 0
        self._told: set[str] = set()

    def __call__(self, text: str) -> Parsed:
        found = self._known.get(text)
        if found is not None:
            self._known.move_to_end(text)
            return found
        found = _parse(text)
        self._tell(found.unknown)
        if len(text) <= 2 * ROWS_KEPT:
            self._known[text] = found
            self._size += len(text)
            while self._size > PARSED_BYTES:
                oldest, _ = self._known.popitem(last=False)
                self._size -= len(oldest)
        return found

    def _tell(self, unknown: tuple[str, ...]) -> None:
        """Each field once: with a newer definition they stand in every job."""
        new = [path for path in unknown if path not in self._told and len(self._told) < 1000]
        if new:
            self._told.update(new)
            log.warning("jobs have fields that this version does not know, and ignores: %s", ", ".join(new))


def _parse(text: str) -> Parsed:
    value = json.loads(text)
    try:
        found = read_spec(value)
        return Parsed(found.spec, unknown=found.unknown)
    except ValidationError as error:
        return Parsed(salvage_spec(value), problems(error))


parse_spec = _Parser()


def newest(pods: tuple[PodView, ...]) -> tuple[PodView, ...]:
    """Of each index the newest pod: a Job that was suspended and resumed has older ones, which do not count.

    Two may be of the same second: then the older one is that which has ended, which is deleted, which ended before the other.
    """

    def age(pod: PodView) -> tuple[int, str, bool, bool, str, str]:
        return pod.index, pod.created, not pod.terminal, not pod.deleting, pod.ended, pod.name

    ordered = sorted(pods, key=age)
    return tuple({pod.index: pod for pod in ordered}.values())


def _foreign(pod: PodView, job: AttemptView | None) -> bool:
    """Whether a pod carries our labels but was not made by the attempt's Job, which may be gone."""
    if not pod.attempt:
        return False
    return pod.controller != job.uid if job else not pod.controller


def observe(
    found: Resource,
    attempts: Iterable[AttemptView],
    pods: Iterable[PodView],
    progress: Progress | None = None,
    image: str = "",
    *,
    network: str = "",
    begun: int = 0,
    expected: Callable[[Resource, RLTrainingJobSpec, int, str], str] | None = None,
    workload: WorkloadView | None = None,
    rollout_image: str = "",
) -> Snapshot:
    """Put together what belongs to this very job: children of an earlier job of the same name have another owner.

    Anybody who may create Jobs can write our labels and owner on them. One that the status does not tell of yet is an
    attempt where this process made it (`begun`), or where it is the next and runs what we would make (`expected`).
    """
    parsed = parse_spec(found.spec)
    status = JobStatus.load(json.loads(found.status) if found.status else None)
    last = max(begun, status.attempt or 0)

    def is_ours(job: AttemptView) -> bool:
        if job.name != names.attempt_job(found.name, job.number) or job.number > names.MAX_ATTEMPT_NUMBER:
            return False
        if job.number <= last or expected is None:
            return True
        next_one = job.number == last + 1 or status.attempt is None  # a status that was lost is made anew
        return next_one and not parsed.problem and job.content == expected(found, parsed.spec, job.number, image)

    claimed = [a for a in attempts if a.owner == found.uid and a.number]
    jobs = {a.number: a for a in claimed if is_ours(a)}
    others = [a for a in claimed if jobs.get(a.number) is not a]
    strays = {a.uid for a in others}
    own = [
        pod
        for pod in pods
        if pod.owner == found.uid and pod.controller not in strays and not _foreign(pod, jobs.get(pod.attempt))
    ]
    by_attempt: dict[int, list[PodView]] = {}
    for pod in sorted((p for p in own if p.attempt), key=lambda p: (p.index, p.created, p.name)):
        by_attempt.setdefault(pod.attempt, []).append(pod)
    return Snapshot(
        resource=found,
        spec=parsed.spec,
        problem=parsed.problem,
        unknown=parsed.unknown,
        status=status,
        attempts=jobs,
        pods={number: tuple(group) for number, group in by_attempt.items()},
        files=next((p for p in own if not p.attempt and not p.replica), None),
        replicas=tuple(sorted((p for p in own if p.replica), key=lambda p: (p.index, p.name))),
        rollout_image=rollout_image,
        progress=progress,
        image=image,
        network=network,
        begun=begun,
        strays=tuple(a for a in others if a.number == last + 1 and a.name == names.attempt_job(found.name, a.number)),
        workload=workload if workload and workload.owner == found.uid else None,
    )
