"""A small cluster in memory: Job controller, kubelet and user, and an operator whose cache lags as a test wants."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from nemo_rl.job.status import JobStatus, Progress, TerminationMessage
from nemo_rl_operator import reasons
from nemo_rl_operator.decide import Decision, decide
from nemo_rl_operator.fingerprint import fingerprint
from nemo_rl_operator.observe import (
    Assignment,
    AttemptView,
    PodView,
    Queueing,
    ReplicaSetView,
    Resource,
    Snapshot,
    WorkloadView,
    observe,
)
from nemo_rl_operator.plan import Action, Create, Delete, Kind, Need, Report, Update
from nemo_rl_operator.reconcile import newest_attempt
from nemo_rl_operator.runtime import timestamps
from unit.operator import make

RULES = (40, 41, 42)


def _why(pods: list[PodView]) -> dict[str, str]:
    """Reason and message of a Job that fails, by its podFailurePolicy."""
    for pod in pods:
        if pod.phase == "Failed" and pod.exit_code in RULES:
            text = (
                f"Container trainer for pod ns/{pod.name} failed with exit code {pod.exit_code} matching FailJob rule"
            )
            return {"reason": "PodFailurePolicy", "message": text}
        if pod.phase == "Failed" and pod.disruption:
            text = f"Pod ns/{pod.name} has condition DisruptionTarget matching FailJob rule at index 1"
            return {"reason": "PodFailurePolicy", "message": text}
    return {"reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}


@dataclass
class Objects:
    resource: Resource
    jobs: dict[str, AttemptView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)
    workload: WorkloadView | None = None
    replica_set: ReplicaSetView | None = None
    replicas: dict[str, PodView] = field(default_factory=dict)


@dataclass
class World:
    """`live` is the API server's truth, `cache` what the operator has heard."""

    nodes: int = 1
    hasty: bool = False
    """The Job controller ends a Job before all of its pods have ended, as before Kubernetes 1.31."""
    fields: dict[str, Any] = field(default_factory=dict)
    patient: bool = False
    """The operator does not write at once that the first attempt starts, but keeps it in mind."""

    def __post_init__(self) -> None:
        self.now: datetime = make.NOW
        first = make.resource(resources={"nodes": self.nodes}, created=make.at(0), **self.fields)
        self.live = Objects(replace(first, version="1"))
        self.cache = Objects(self.live.resource)
        self.uids = 0
        self.begun = 0
        self.released: set[str] = set()
        self.strangers: dict[str, PodView] = {}
        self.silent: set[str] = set()
        """Pods whose node does not answer any more."""
        self.sidecars = False
        """Pods that end from now on are kept by a container of somebody else, until they are deleted."""
        self.progress: Progress | None = None
        """What the trainer says; pods say what they like."""
        self.skew = 0.0
        """Seconds by which the nodes' clocks are wrong."""
        self.seen_phases: list[str] = []
        self.replica_reads = 0
        self.writes = 0

    # --- the API server

    def _change(self, **fields: Any) -> None:
        old = self.live.resource
        self.live.resource = replace(old, version=str(int(old.version) + 1), **fields)

    @property
    def status(self) -> JobStatus:
        text = self.live.resource.status
        return JobStatus.load(json.loads(text) if text else None)

    def write_status(self, status: JobStatus, version: str) -> bool:
        """False on a conflict."""
        if version != self.live.resource.version:
            return False
        self.writes += 1
        self._change(status=json.dumps(status.dump()), phase=status.phase or "")
        self.seen_phases.append(status.phase or "")
        return True

    # --- the others

    def suspend(self, value: bool) -> None:
        spec = json.loads(self.live.resource.spec) | {"suspend": value}
        self._change(spec=json.dumps(spec), generation=self.live.resource.generation + 1)

    def scale(self, replicas: int) -> None:
        """Somebody changes how many replicas there shall be."""
        spec = json.loads(self.live.resource.spec)
        if "rollout" in spec:
            spec["rollout"]["replicas"] = replicas
            self._change(spec=json.dumps(spec), generation=self.live.resource.generation + 1)

    @property
    def replicas_asked(self) -> int:
        return int(json.loads(self.live.resource.spec).get("rollout", {}).get("replicas", 0))

    def stateful_set_controller(self) -> None:
        """Makes pods that miss, and deletes those that are too many, or left by a set that is gone."""
        found = self.live.replica_set
        wanted = found.replicas if found else 0
        for pod in list(self.live.replicas.values()):
            if pod.index >= wanted or (found and pod.controller != found.uid):
                self.live.replicas[pod.name] = replace(pod, deleting=True)
        for number in range(wanted):
            name = f"x-rollout-{number}"
            if name not in self.live.replicas and found:
                self.uids += 1
                pod = make.pod(0, number, name=name, controller=found.uid, replica=True)
                self.live.replicas[name] = replace(pod, uid=f"pod-{self.uids}", created=self.time)

    def replica(self, number: int, what: str) -> None:
        """A replica comes, goes, or breaks."""
        pod = self.live.replicas.get(f"x-rollout-{number}")
        if pod is None:
            return
        if what == "go":
            self.live.replicas[pod.name] = replace(pod, deleting=True)
        elif what == "gone":
            del self.live.replicas[pod.name]
        elif what == "crash" and pod.phase == "Running":
            broken = {"waiting": "CrashLoopBackOff", "last_end": "it exited with 1", "restarts": pod.restarts + 1}
            self.live.replicas[pod.name] = replace(pod, **broken)
        elif what == "come" and not pod.deleting:
            self.live.replicas[pod.name] = replace(pod, phase="Running", ip=f"10.1.0.{number}", waiting="")

    def say(self, number: int, state: str) -> None:
        """The trainer says something of a replica, true or not."""
        told = {"address": f"10.1.0.{number}:8000", "state": state, "weightVersion": 3, "message": "so it says"}
        self.progress = Progress.of_a_pod({"step": 3, "rollout": [told, {"address": 7}, "nonsense"]})

    def delete_replica_set(self) -> None:
        """Somebody deletes the StatefulSet."""
        self.live.replica_set = None

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @property
    def time(self) -> str:
        return timestamps.write(self.now)

    def job_controller(self) -> None:
        """Make pods, count them, end Jobs, remove what is deleted."""
        self.stateful_set_controller()
        owners = {job.uid for job in self.live.jobs.values()}
        for pod in [p for p in self.live.pods.values() if p.forced and p.controller not in owners]:
            del self.live.pods[pod.name]
        for job in list(self.live.jobs.values()):
            pods = [p for p in self.live.pods.values() if p.controller == job.uid]
            if job.deleting:
                self._remove_deleted(job, pods)
                continue
            if job.finished:  # it counts no more pods, so those that were deleted by force are let go
                for pod in [p for p in pods if p.forced]:
                    del self.live.pods[pod.name]
                continue
            if job.suspended:
                for pod in pods:
                    if not pod.terminal or pod.lingers:
                        self.live.pods[pod.name] = replace(pod, deleting=True, lingers=False)
                        self.released.add(pod.uid)
                continue
            stopping = [p for p in pods if p.uid in self.released and not p.terminal]
            pods = [p for p in pods if p.uid not in self.released]
            if stopping and not pods:
                continue  # podReplacementPolicy: Failed
            missing = set(range(self.nodes)) - {p.index for p in pods}
            if missing and not any(p.phase == "Failed" for p in pods):
                for index in sorted(missing):
                    self.uids += 1
                    pod = make.pod(job.number, index, name=f"{job.name}-{index}-{self.uids}", controller=job.uid)
                    self.live.pods[pod.name] = replace(pod, uid=f"pod-{self.uids}", created=self.time)
                continue
            pods = [replace(p, phase="Running") if p.lingers else p for p in pods]  # it sees pods, no containers
            if any(p.phase == "Failed" for p in pods):
                for pod in pods:
                    held = self.live.pods[pod.name]
                    if pod.phase == "Running" and held.lingers:
                        self.live.pods[pod.name] = replace(held, deleting=True, lingers=False)
                    elif not pod.terminal:
                        self.live.pods[pod.name] = replace(pod, deleting=True)
                if self.hasty or all(p.terminal for p in pods):
                    self.live.jobs[job.name] = replace(job, failed=True, ended=self.time, **_why(pods))
                    self._let_go(pods)
            elif all(p.phase == "Succeeded" for p in pods):
                self.live.jobs[job.name] = replace(job, complete=True, ended=self.time)

    def _let_go(self, pods: list[PodView]) -> None:
        """Pods that are being deleted are gone as soon as their Job has counted them."""
        for pod in pods:
            if pod.deleting and pod.terminal:
                del self.live.pods[pod.name]

    def _remove_deleted(self, job: AttemptView, pods: list[PodView]) -> None:
        for pod in pods:
            if pod.terminal or pod.forced:
                del self.live.pods[pod.name]
            elif not pod.deleting:
                self.live.pods[pod.name] = replace(pod, deleting=True)
        if not [p for p in self.live.pods.values() if p.controller == job.uid]:
            del self.live.jobs[job.name]

    def delete_pod(self, choice: int, forced: bool = False) -> None:
        """Somebody deletes a pod; by force, when its node does not answer."""
        live = sorted(n for n, p in self.live.pods.items() if not p.terminal)
        if live:
            pod = self.live.pods[live[choice % len(live)]]
            gone_by = pod.gone_by or timestamps.write(self.now + timedelta(seconds=0 if forced else 30))
            self.live.pods[pod.name] = replace(pod, deleting=True, forced=forced or pod.forced, gone_by=gone_by)
            if forced:
                self.silent.add(pod.uid)

    def kueue(self, hold: bool) -> None:
        """Kueue suspends the newest Job, or lets it go."""
        if self.live.jobs:
            job = max(self.live.jobs.values(), key=lambda j: j.number)
            if not job.finished:
                self.live.jobs[job.name] = replace(job, suspended=hold)

    def quota(self, given: bool) -> None:
        """Kueue admits the job's Workload, or wants the quota back; it has it back when the operator says so."""
        held = self.live.workload
        if held is None or held.finished:
            return
        if given and not held.reserved:
            self.live.workload = replace(held, reserved=True, admitted=True, evicted="", eviction="")
        elif not given and held.reserved:
            self.live.workload = replace(held, evicted="a job of higher priority came", eviction="Preempted")

    def delete_workload(self) -> None:
        """Somebody deletes the job's place in the queue."""
        self.live.workload = None

    def run_pods(self) -> None:
        for pod in list(self.live.pods.values()):
            if pod.phase == "Pending" and not pod.deleting:
                self.live.pods[pod.name] = replace(pod, phase="Running", ip="10.0.0.1", started=self.time)
        for pod in list(self.live.replicas.values()):
            self.replica(pod.index, "come")

    def end_deleted_pods(self) -> None:
        """Pods that were asked to stop save and exit with 75; replicas are gone."""
        self.live.replicas = {name: pod for name, pod in self.live.replicas.items() if not pod.deleting}
        for pod in list(self.live.pods.values()):
            if pod.deleting and not pod.terminal and pod.uid not in self.silent:
                self._end(pod, 75)

    def end_pod(self, choice: int, code: int, **fields: Any) -> None:
        """One of the running pods ends."""
        running = sorted(n for n, p in self.live.pods.items() if p.phase == "Running" and p.uid not in self.silent)
        if running:
            self._end(self.live.pods[running[choice % len(running)]], code, **fields)

    def reject_pod(self, choice: int) -> None:
        """A node refuses a pod that it was to run."""
        waiting = sorted(n for n, p in self.live.pods.items() if p.phase == "Pending" and not p.deleting)
        if waiting:
            pod = self.live.pods[waiting[choice % len(waiting)]]
            self.live.pods[pod.name] = replace(pod, phase="Failed", reason="UnexpectedAdmissionError", message="no GPU")

    def stranger(self, attempt: int) -> None:
        """Somebody makes a pod with our labels, for whichever attempt."""
        pod = make.running_pod(attempt or 1, name=f"stranger-{attempt}", controller="")
        self.strangers[pod.name] = pod

    def _end(self, pod: PodView, code: int, **fields: Any) -> None:
        word = TerminationMessage(kind="result", total_steps=9).encode() if code == 0 else ""
        time = timestamps.write(self.now + timedelta(seconds=self.skew))
        phase = "Failed" if code else "Succeeded"
        ended = replace(pod, phase=phase, exit_code=code, ended=time, termination=word, **fields)
        if self.sidecars and not pod.deleting:
            ended = replace(ended, lingers=True)
        self.live.pods[pod.name] = ended

    def delete_job(self) -> None:
        """Somebody deletes the newest Job in the background: it is gone at once, its pods are asked to stop."""
        if not self.live.jobs:
            return
        job = max(self.live.jobs.values(), key=lambda j: j.number)
        del self.live.jobs[job.name]
        for pod in list(self.live.pods.values()):
            if pod.controller == job.uid:
                self.live.pods[pod.name] = replace(pod, deleting=True)
                if pod.phase != "Running":
                    del self.live.pods[pod.name]

    # --- the operator

    def hear(self, part: str) -> None:
        """The cache catches up with one kind of objects."""
        if part == "resource":
            self.cache.resource = self.live.resource
        elif part == "jobs":
            self.cache.jobs = dict(self.live.jobs)
        elif part == "workload":
            self.cache.workload = self.live.workload
        else:
            self.cache.pods = dict(self.live.pods)
            self.cache.replicas = dict(self.live.replicas)

    def hear_all(self) -> None:
        for part in ("resource", "jobs", "pods", "workload"):
            self.hear(part)

    def look(self, verified: int = 0) -> Snapshot:
        cache = self.cache
        pods = [*cache.pods.values(), *cache.replicas.values(), *self.strangers.values()]
        found = observe(
            cache.resource,
            cache.jobs.values(),
            pods,
            self.progress if cache.resource.phase == "Running" else None,  # only then it is followed
            make.IMAGE,
            workload=cache.workload,
            rollout_image=make.ROLLOUT_IMAGE,
        )
        queue = cache.resource.queue
        known = {
            "kueue": "v1beta2" if queue else "",
            "queueing": Queueing(queue),
            "assignment": Assignment(),
            "held": "",
        }
        found = replace(found, **known)
        return replace(found, verified=verified, warning_event="", begun=self.begun)

    def decide(self) -> tuple[Snapshot, Decision]:
        verified = 0
        read = False
        replicas: dict[str, Any] = {}
        while True:
            snapshot = replace(self.look(verified), workload_read=read, **replicas)
            decision = decide(snapshot, self.now)
            if not decision.needs:
                return snapshot, decision
            if Need.WORKLOAD in decision.needs:
                read, self.cache.workload = True, self.live.workload
                continue
            if Need.REPLICAS in decision.needs:
                self.replica_reads += 1
                replicas = {"replica_set": self.live.replica_set, "replica_set_read": True}
                continue
            assert decision.needs == {Need.ATTEMPT}
            verified = newest_attempt(snapshot)
            name = f"x-{verified}"
            if name in self.live.jobs:
                self.cache.jobs[name] = self.live.jobs[name]
            else:
                self.cache.jobs.pop(name, None)
            others = {n: p for n, p in self.cache.pods.items() if p.attempt != verified}
            self.cache.pods = others | {n: p for n, p in self.live.pods.items() if p.attempt == verified}

    def reconcile(self, die_after: int | None = None) -> Decision:
        """One plan of the operator; with `die_after` it is killed after so many calls."""
        snapshot, decision = self.decide()
        calls = 0
        for action in decision.actions:
            if calls == die_after:
                self.begun = 0
                return decision
            calls += 1
            self._execute(action)
        if calls == die_after:
            self.begun = 0
            return decision
        new = decision.status
        if self.patient and not snapshot.status.phase and new.attempt == 1 and new.reason == reasons.STARTING:
            self.begun = 1
            return decision
        if snapshot.status.dump() != decision.status.dump() and self.write_status(
            decision.status, snapshot.resource.version
        ):
            self.cache.resource = self.live.resource
        return decision

    def _execute(self, action: Action) -> None:
        if isinstance(action, Report) or action.kind is Kind.WORKLOAD:
            self._execute_about_workload(action)
            return
        if action.kind is Kind.STATEFUL_SET:
            self._execute_about_replicas(action)
            return
        if isinstance(action, Create):
            if action.kind is Kind.JOB:
                name = action.body["metadata"]["name"]
                if name not in self.live.jobs:
                    self.uids += 1
                    number = int(action.body["metadata"]["labels"]["nemo-rl.io/attempt"])
                    self.live.jobs[name] = make.attempt(number, uid=f"job-{self.uids}", created=self.time)
                self.cache.jobs[name] = self.live.jobs[name]
            return
        held = self.live.jobs.get(action.name)
        if held and held.uid == action.uid and action.kind is Kind.JOB:
            if action.foreground:
                self.cache.jobs[action.name] = self.live.jobs[action.name] = replace(held, deleting=True)
            else:
                del self.live.jobs[action.name]

    def _execute_about_replicas(self, action: Create | Delete | Update) -> None:
        found = self.live.replica_set
        if isinstance(action, Create):
            if found is None:
                self.uids += 1
                uid, spec = f"set-{self.uids}", action.body["spec"]
                self.live.replica_set = ReplicaSetView(
                    "x-rollout", uid, make.UID, False, spec["replicas"], fingerprint(spec)
                )
        elif found is None or found.uid != action.uid:
            return
        elif isinstance(action, Delete):
            self.live.replica_set = None
        else:
            content = fingerprint(action.spec) if "template" in action.spec else found.content
            self.live.replica_set = replace(
                found, replicas=action.spec.get("replicas", found.replicas), content=content
            )

    def _execute_about_workload(self, action: Action) -> None:
        held = self.live.workload
        if isinstance(action, Create):
            if held is None:
                self.uids += 1
                held = make.workload(uid=f"workload-{self.uids}")
        elif held is None or held.uid != action.uid:
            held = self.live.workload
        elif isinstance(action, Delete):
            held = None
        else:
            assert not (action.release and self.live_attempts()), "quota is given back under a living pod"
            kinds = {kind: holds for kind, holds, _, _ in action.conditions}
            held = replace(
                held,
                reserved=held.reserved and not action.release,
                admitted=held.admitted and not action.release,
                finished=held.finished or "Finished" in kinds,
                pods_ready=kinds.get("PodsReady", held.pods_ready),
            )
        self.live.workload = self.cache.workload = held

    # --- what must always hold

    def live_attempts(self) -> set[int]:
        """Attempts with pods that have not ended."""
        return {pod.attempt for pod in self.live.pods.values() if not pod.terminal}

    def settle(self, rounds: int = 60) -> None:
        """Everybody does their part, in good order, until nothing is left to do; running pods succeed."""
        for _ in range(rounds):
            self.hear_all()
            self.reconcile()
            self.quota(True)
            self.job_controller()
            self.run_pods()
            self.end_deleted_pods()
            for index in range(self.nodes):
                self.end_pod(index, 0)
            self.job_controller()
            self.pass_time(30)
