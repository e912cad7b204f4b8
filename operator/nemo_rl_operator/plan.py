"""One round of deciding: what was seen, the status as it will be, and what is to be done. Policies read and write it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from nemo_rl.job import names
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl.job.status import MAX_ATTEMPTS, Attempt, Cause, Condition, Failure, JobStatus, Phase
from nemo_rl_operator import frozen, reasons
from nemo_rl_operator.classify import Outcome
from nemo_rl_operator.observe import AttemptView, PodView, Snapshot
from nemo_rl_operator.runtime import timestamps

LOST_PATIENCE_SECONDS = 30.0
"""How long after its time a pod that is being deleted is still expected to be reported as ended."""


class Kind(Enum):
    """Kinds of objects that actions are about: API prefix and plural."""

    RESOURCE = (f"apis/{names.API_VERSION}", names.PLURAL)
    JOB = ("apis/batch/v1", "jobs")
    STATEFUL_SET = ("apis/apps/v1", "statefulsets")
    POD = ("api/v1", "pods")
    CONFIG_MAP = ("api/v1", "configmaps")
    NETWORK_POLICY = ("apis/networking.k8s.io/v1", "networkpolicies")
    SECRET = ("api/v1", "secrets")
    CLAIM = ("api/v1", "persistentvolumeclaims")
    SERVICE = ("api/v1", "services")
    EVENT = ("api/v1", "events")
    WORKLOAD = (f"apis/{names.KUEUE_GROUP}", "workloads")
    """Kueue's kinds come without a version: the client knows which one is served."""
    FLAVOR = (f"apis/{names.KUEUE_GROUP}", "resourceflavors")
    WORKLOAD_PRIORITY = (f"apis/{names.KUEUE_GROUP}", "workloadpriorityclasses")
    LOCAL_QUEUE = (f"apis/{names.KUEUE_GROUP}", "localqueues")
    POD_PRIORITY = ("apis/scheduling.k8s.io/v1", "priorityclasses")


@dataclass(frozen=True)
class Create:
    """Make an object; that it exists already and belongs to the job is success."""

    kind: Kind
    body: dict[str, Any]


@dataclass(frozen=True)
class Delete:
    """Delete an object with this uid; that it is gone is success. Foreground: it stays until its pods are gone."""

    kind: Kind
    name: str
    uid: str
    foreground: bool = False


@dataclass(frozen=True)
class Report:
    """Set conditions of the job's Workload, by which Kueue knows how the job is; that it is gone is success."""

    name: str
    uid: str
    conditions: tuple[tuple[str, bool, str, str], ...]
    """Type, whether it holds, reason, message."""
    release: bool = False
    """Also give the quota back."""


@dataclass(frozen=True)
class Update:
    """Merge into the specification of the object with this uid; that it is gone is success."""

    kind: Kind
    name: str
    uid: str
    spec: dict[str, Any]


Action = Create | Delete | Report | Update


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event; `key` tells it from others of the same reason, so that it is posted once."""

    reason: str
    message: str
    warning: bool = False
    key: str = ""


class Need(Enum):
    """What must be read from the API server before this can be decided."""

    ATTEMPT = "the Job of the newest attempt, and its pods"
    BUNDLES = "which ConfigMaps of bundles exist"
    WARNING_EVENT = "warning Events about the newest attempt"
    ROWS = "the rows of the data set, which are not kept"
    WORKLOAD = "the job's Workload"
    QUEUE = "the default queue of the namespace, and the priority, of a job that is to be queued"
    FLAVORS = "the flavors that Kueue assigned"
    REPLICAS = "the StatefulSet of the job's rollout replicas"
    HELD = "what Kueue says about the attempt's Job, which it queues by itself"


@dataclass
class Plan:
    """State of one decision. `status` is a copy that policies change; nothing else is changed."""

    snapshot: Snapshot
    now: datetime
    status: JobStatus
    actions: list[Action] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    needs: set[Need] = field(default_factory=set)
    wake: float | None = None
    """Seconds after which to decide again even if nothing happens."""

    @property
    def spec(self) -> RLTrainingJobSpec:
        return self.snapshot.spec

    @property
    def time(self) -> str:
        return timestamps.write(self.now)

    @property
    def number(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        return self.status.attempt or 0

    @property
    def attempt(self) -> AttemptView | None:
        """Job of the newest attempt."""
        return self.snapshot.attempts.get(self.number)

    @property
    def pods(self) -> tuple[PodView, ...]:
        return self.snapshot.pods.get(self.number, ())

    @property
    def record(self) -> Attempt | None:
        """What the status says about the newest attempt."""
        found = self.status.attempts
        return found[-1] if found and found[-1].number == self.number else None

    @property
    def open(self) -> bool:
        """Whether the newest attempt has begun and its end is not recorded yet."""
        return self.record is not None and self.record.end_time is None

    @property
    def ended(self) -> str:
        """When the newest attempt ended: by its Job, where that has, or just now. Never by the clock of a node."""
        ended = timestamps.parse(self.attempt.ended) if self.attempt else None
        return timestamps.write(min(ended, self.now)) if ended else self.time

    def live_pods(self) -> list[PodView]:
        """Pods of any attempt that have not ended, but for those that are given up."""
        found = [pod for pods in self.snapshot.pods.values() for pod in pods if not pod.terminal]
        return [pod for pod in found if not self.given_up(pod)]

    def live_replicas(self) -> list[PodView]:
        """Rollout replicas that have not ended, but for those whose node is silent: nothing is lost with them."""
        return [pod for pod in self.snapshot.replicas if not pod.terminal and not self.overdue(pod)]

    def overdue(self, pod: PodView) -> bool:
        """Whether a pod should have ended some time ago, and nobody says that it has: its node is silent."""
        return pod.deleting and self.patience_left(pod) <= 0

    def patience_left(self, pod: PodView) -> float:
        """Seconds for which a pod that is being deleted is still expected to be reported as ended."""
        return LOST_PATIENCE_SECONDS + (timestamps.seconds_until(pod.gone_by, self.now) or 0.0)

    def given_up(self, pod: PodView) -> bool:
        """Whether the job goes on without knowing that this pod has ended, as its user asked for."""
        spec = self.snapshot.spec
        return spec is not None and spec.on_node_lost == "replace" and not pod.terminal and self.overdue(pod)

    def deletes(self, uid: str) -> bool:
        """Whether an object is to be deleted already."""
        return any(isinstance(action, Delete) and action.uid == uid for action in self.actions)

    def waits_for(self) -> str:
        """Which pods must end first, in words; a finalizer or a node may hold them, so they are named."""
        live = self.live_pods()
        if not live:
            return reasons.ENDING_JOB_MESSAGE.format(job=names.attempt_job(self.snapshot.resource.name, self.number))
        text = reasons.ENDING_MESSAGE.format(pod=live[0].name, attempt=live[0].attempt)
        return text + (reasons.ENDING_MORE_MESSAGE.format(more=len(live) - 1) if len(live) > 1 else "")

    def seconds_until(self, time: str | None) -> float | None:
        """Seconds from now to a time; negative once it has passed, None without one."""
        return timestamps.seconds_until(time, self.now)

    def wake_in(self, seconds: float) -> None:
        self.wake = max(0.0, seconds) if self.wake is None else min(self.wake, max(0.0, seconds))

    def event(self, reason: str, message: str, *, warning: bool = False, key: str = "") -> None:
        self.events.append(Event(reason, message, warning, key))

    def condition(self, kind: str, holds: bool, reason: str, message: str = "") -> None:
        """Set a condition; the time of its last transition changes only when the condition does."""
        value = "True" if holds else "False"
        old = self.status.condition(kind)
        generation = self.snapshot.resource.generation
        if old and (old.status, old.reason, old.message, old.observed_generation) == (
            value,
            reason,
            message,
            generation,
        ):
            return
        since = old.last_transition_time if old and old.status == value else self.time
        new = Condition.model_validate(
            {
                "type": kind,
                "status": value,
                "reason": reason,
                "message": message,
                "observedGeneration": generation,
                "lastTransitionTime": since,
            }
        )
        if old:
            self.status.conditions = [new if c.type == kind else c for c in self.status.conditions]
        else:
            self.status.conditions = [*self.status.conditions, new]

    def phase(self, phase: Phase, reason: str, message: str, *, training: bool = True) -> None:
        """Set the phase and the conditions that follow from it. Not `training`: it runs no more, although pods do."""
        self.status.phase, self.status.reason, self.status.message = phase, reason, message[:1024]
        self.condition("Running", phase == "Running" and training, reason, message)
        if phase == "Suspended":
            self.condition("Suspended", True, reasons.SUSPENDED, message)
        elif self.status.condition("Suspended"):
            self.condition("Suspended", False, reasons.RESUMED)
        if phase != "Pending" and self.status.condition("Blocked"):
            self.condition("Blocked", False, reasons.UNBLOCKED)
        finished = phase in ("Succeeded", "Failed")
        if finished:
            self.condition("Complete" if phase == "Succeeded" else "Failed", True, reason, message)
        self.condition("Finished", finished, reason, message if finished else "")

    def begin(self, number: int, started: str) -> None:
        """Record that an attempt began."""
        checkpoint = self.status.checkpoint
        record = Attempt(
            number=number,
            job=names.attempt_job(self.snapshot.resource.name, number),
            start_time=started,
            from_step=checkpoint.latest_step if checkpoint else None,
        )
        self.status.attempts = [*self.status.attempts, record][-MAX_ATTEMPTS:]
        self.status.attempt = number
        if number == 1 and not self.snapshot.resource.abridged and not self.snapshot.problem:
            self.status.job_digest = frozen.started_digest(self.snapshot.resource, self.spec)
        self.status.start_time = self.status.start_time or started

    def close(self, cause: str, *, counted: bool = False, message: str = "", found: Outcome | None = None) -> None:
        """Record how the newest attempt ended."""
        record = self.record
        if record is None or record.end_time is not None:
            return
        record.end_time = self.ended
        record.cause, record.counted, record.message = cause, counted, message[:200] or None
        record.exit_code = found.exit_code if found else None
        record.to_step = self.status.progress.step if self.status.progress else None
        if found and found.termination and found.termination.total_steps is not None:
            record.to_step = found.termination.total_steps  # steps since the last look at its progress
        if counted:
            self.status.counted_failures = (self.status.counted_failures or 0) + 1

    def clock(self, running: bool, at: str | None = None) -> None:
        """Start or stop the clock of activeDeadlineSeconds, by default now."""
        if running:
            self.status.active_since = self.status.active_since or at or self.time
        elif self.status.active_since:
            self.status.active_seconds = int(self.active_seconds(timestamps.parse(at)))
            self.status.active_since = None

    def active_seconds(self, until: datetime | None = None) -> float:
        """Seconds on that clock, by default until now."""
        running = timestamps.seconds_until(self.status.active_since, min(until or self.now, self.now))
        return (self.status.active_seconds or 0) + max(0.0, -(running or 0.0))

    def fail(self, cause: Cause, message: str, found: Outcome | None = None, reason: str | None = None) -> None:
        """End the job in failure, and stop what still runs."""
        self.close(cause, message=message, found=found)
        self.clock(False)
        self.status.failure = Failure(
            cause=cause,
            exit_code=found.exit_code if found else None,
            pod=found.pod if found else None,
            message=message,
            traceback=found.traceback if found else None,
        )
        self.status.completion_time = self.time
        self.phase("Failed", reason or cause, message)
        self.event(reasons.EVENT_FAILED, message, warning=True)
        self.stop_live()

    def stop_live(self) -> None:
        """Delete Jobs that still have pods. A Job whose pods have ended is left, with its pods and their logs."""
        for attempt in self.snapshot.attempts.values():
            pods = self.snapshot.pods.get(attempt.number, ())
            ended = attempt.finished or (len(pods) >= self._nodes() and all(pod.terminal for pod in pods))
            if not ended and not attempt.deleting:
                self.actions.append(Delete(Kind.JOB, attempt.name, attempt.uid, foreground=True))

    def _nodes(self) -> int:
        return self.snapshot.spec.resources.nodes
