"""One Workload of Kueue for all attempts of a job: the place in the queue, the quota, and what Kueue adds to the pods."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nemo_rl.job import names
from nemo_rl_operator import build, kueue
from nemo_rl_operator.decide import Decision, decide
from nemo_rl_operator.observe import Assignment, Queueing, Snapshot, WorkloadView, workload_view
from nemo_rl_operator.plan import Create, Delete, Kind, Need, Report
from nemo_rl_operator.runtime.cache import Cache
from nemo_rl_operator.runtime.client import ApiError
from nemo_rl_operator.runtime.workloads import WorkloadWatch
from unit.operator import make
from unit.operator.fake_api import FakeApi

TEAM = Queueing("team", 10, "high")
LIVE = make.status(make.record(), phase="Running", active_since=make.at(-600))


def seen(*args: Any, workload: WorkloadView | None = None, **fields: Any) -> Snapshot:
    """A job in a cluster with Kueue; what the operator may ask for is known unless the test says otherwise."""
    known: dict[str, Any] = {"kueue": "v1beta2", "queueing": TEAM, "assignment": Assignment(), "workload_read": True}
    return make.seen(*args, **(known | {"workload": workload} | fields))


def queued(status: Any = None, **fields: Any) -> Any:
    return make.resource(status, queue="team", **fields)


def done(decision: Decision) -> list[str]:
    """Actions in a few words."""
    verbs = {Create: "create", Delete: "delete", Report: "report"}
    return [
        f"{verbs[type(a)]} " + (a.body["kind"] if isinstance(a, Create) else getattr(a, "kind", Kind.WORKLOAD).name)
        for a in decision.actions
    ]


def test_a_job_enters_its_queue_once_and_makes_nothing_else() -> None:
    asked = decide(seen(queued(), queueing=None), make.NOW)
    assert asked.needs == {Need.QUEUE}
    decision = decide(seen(queued()), make.NOW)
    assert done(decision) == ["create Workload"]
    assert (decision.status.phase, decision.status.message) == ("Queued", "waits in queue team")
    assert decision.status.attempt is None
    waits = decide(seen(queued(decision.status), workload=make.workload(pending="2 more GPUs needed")), make.NOW)
    assert done(waits) == []
    assert waits.status.message == "waits in queue team: 2 more GPUs needed"
    assert waits.requeue_after is None, "the watch tells when it is admitted"


def test_the_first_attempt_starts_when_kueue_admits_the_job() -> None:
    status = make.status(phase="Queued")
    asked = decide(seen(queued(status), workload=make.admitted(), assignment=None), make.NOW)
    assert asked.needs == {Need.FLAVORS}
    decision = decide(seen(queued(status), workload=make.admitted()), make.NOW)
    assert "create Job" in done(decision)
    job = next(a.body for a in decision.actions if isinstance(a, Create) and a.kind is Kind.JOB)
    assert "suspend" not in job["spec"]
    assert names.LABEL_QUEUE not in job["metadata"]["labels"], "the Job is not to be queued once more"
    assert (decision.status.phase, decision.status.attempt) == ("Starting", 1)


def test_the_deadline_does_not_run_in_the_queue() -> None:
    hours = 5 * 3600
    job = queued(make.status(phase="Queued"), activeDeadlineSeconds=3600, created=make.at(-hours))
    started = decide(seen(job, workload=make.admitted()), make.NOW)
    assert started.status.active_since is None, "no pod is there yet"
    later = queued(started.status, activeDeadlineSeconds=3600, created=make.at(-hours))
    attempt = make.attempt(1, workload="x", created=make.at(0))
    running = decide(seen(later, [attempt], [make.running_pod()], workload=make.admitted()), make.later(2))
    assert running.status.phase == "Running"
    assert running.status.active_seconds in (None, 0)


def test_a_retry_keeps_the_quota() -> None:
    status = make.status(make.record(1, "Disrupted", False), phase="Running")
    failed = make.failed_attempt()
    decision = decide(seen(queued(status), [failed], [], workload=make.admitted(), verified=1), make.NOW)
    assert "create Job" in done(decision)
    assert "create Workload" not in done(decision)
    assert decision.status.attempt == 2


def test_preempted_pods_save_and_end_before_the_quota_is_given_back() -> None:
    attempt, pod = make.attempt(1, workload="x"), make.running_pod()
    stops = decide(seen(queued(LIVE), [attempt], [pod], workload=make.evicted()), make.NOW)
    assert done(stops) == ["delete JOB"]
    assert "Preempted to accommodate a workload" in str(stops.status.message)
    ending = dataclasses.replace(attempt, deleting=True)
    waits = decide(seen(queued(stops.status), [ending], [pod], workload=make.evicted()), make.NOW)
    assert done(waits) == [], "a pod still lives on the quota"
    gone = decide(seen(queued(waits.status), [], [], workload=make.evicted(), verified=1), make.NOW)
    (report,) = gone.actions
    assert isinstance(report, Report)
    assert report.release
    conditions = {kind: holds for kind, holds, _, _ in report.conditions}
    assert conditions == {"Requeued": True, "QuotaReserved": False, "Admitted": False}
    assert gone.status.attempts[0].cause == "Preempted"
    assert not gone.status.counted_failures
    assert gone.status.phase == "Queued"
    assert gone.status.active_since is None


@pytest.mark.parametrize("reason", ["PodsReadyTimeout", "AdmissionCheck", "ClusterQueueStopped", "Deactivated"])
def test_when_a_job_is_queued_again_is_kueues_to_say(reason: str) -> None:
    status = make.status(make.record(1, "Preempted", False), phase="Running")
    gone = decide(seen(queued(status), workload=make.evicted(eviction=reason), verified=1), make.NOW)
    report = next(a for a in gone.actions if isinstance(a, Report))
    assert ("Requeued", False, reason, "Preempted to accommodate a workload") in report.conditions


def test_a_job_whose_workload_somebody_deleted_is_queued_again() -> None:
    attempt, pod = make.attempt(1, workload="x"), make.running_pod()
    unsure = decide(seen(queued(LIVE), [attempt], [pod], workload_read=False), make.NOW)
    assert unsure.needs == {Need.WORKLOAD}, "after a restart the list of Workloads may not be in yet"
    stops = decide(seen(queued(LIVE), [attempt], [pod]), make.NOW)
    assert done(stops) == ["delete JOB"]
    again = decide(seen(queued(stops.status), [], [], verified=1), make.NOW)
    assert done(again) == ["create Workload"]


def test_a_job_that_began_without_a_queue_is_not_stopped_by_a_label() -> None:
    decision = decide(seen(queued(LIVE), [make.attempt(1)], [make.running_pod()]), make.NOW)
    assert done(decision) == []
    assert decision.status.phase == "Running"


def test_nothing_is_stopped_while_it_is_unknown_whether_kueue_is_there() -> None:
    decision = decide(seen(queued(LIVE), [make.attempt(1, workload="x")], [make.running_pod()], kueue=""), make.NOW)
    assert done(decision) == []
    assert decision.status.phase == "Running"


def test_a_suspended_job_leaves_the_queue() -> None:
    status = make.status(make.record(1, "Suspended", False), phase="Running")
    decision = decide(seen(queued(status, suspend=True), workload=make.admitted()), make.NOW)
    assert done(decision) == ["delete WORKLOAD"]
    assert decision.status.phase == "Suspended"


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_finished_job_gives_its_quota_back_when_its_pods_have_ended(phase: Any) -> None:
    finished = queued(make.status(make.record(1, "Error", True), phase=phase, completion_time=make.at(-1)))
    busy = decide(seen(finished, [make.failed_attempt()], [make.running_pod()], workload=make.admitted()), make.NOW)
    assert not [a for a in busy.actions if isinstance(a, Report)]
    decision = decide(seen(finished, [make.failed_attempt()], [], workload=make.admitted()), make.NOW)
    (report,) = decision.actions
    assert isinstance(report, Report)
    assert report.conditions[0][:3] == ("Finished", True, phase)
    settled = decide(seen(finished, [make.failed_attempt()], [], workload=make.admitted(finished=True)), make.NOW)
    assert settled.actions == ()


def test_kueue_is_told_when_all_pods_run_and_when_they_no_longer_do() -> None:
    job, pod = make.attempt(1, workload="x"), make.running_pod()
    ready = decide(seen(queued(LIVE), [job], [pod], workload=make.admitted()), make.NOW)
    assert [a.conditions[0][:3] for a in ready.actions if isinstance(a, Report)] == [("PodsReady", True, "Started")]
    told = decide(seen(queued(LIVE), [job], [pod], workload=make.admitted(pods_ready=True)), make.NOW)
    assert told.actions == ()
    status = make.status(make.record(1, "Disrupted", False), phase="Running")
    retry = decide(
        seen(queued(status), [make.failed_attempt()], [], workload=make.admitted(pods_ready=True), verified=1), make.NOW
    )
    reports = [a.conditions[0][:3] for a in retry.actions if isinstance(a, Report)]
    assert reports == [("PodsReady", False, "WaitForRecovery")]


def test_another_queue_by_the_label_is_entered_while_the_job_waits() -> None:
    moved = decide(seen(queued(make.status(phase="Queued")), workload=make.workload(queue="other")), make.NOW)
    assert done(moved) == ["delete WORKLOAD", "create Workload"]
    kept = decide(
        seen(queued(make.status(phase="Queued")), workload=make.admitted(queue="other", admitted=False)), make.NOW
    )
    assert done(kept) == [], "a reserved quota stays where it is"


def test_without_kueue_a_job_with_a_queue_says_so_and_one_without_starts() -> None:
    waits = decide(seen(queued(), kueue=""), make.NOW)
    assert waits.actions == ()
    assert "this cluster has no Kueue" in str(waits.status.message)
    assert "create Job" in done(decide(seen(make.resource(), kueue="", queueing=None), make.NOW))


def test_a_job_without_a_queue_goes_to_the_default_one_where_there_is_one() -> None:
    assert decide(seen(make.resource(), queueing=None), make.NOW).needs == {Need.QUEUE}
    assert "create Job" in done(decide(seen(make.resource(), queueing=Queueing("")), make.NOW))
    decision = decide(seen(make.resource(), queueing=Queueing("default")), make.NOW)
    assert done(decision) == ["create Workload"]
    assert decision.status.message == "waits in queue default"


def test_a_job_that_kueue_queues_by_itself_says_where_and_holds_no_second_quota() -> None:
    held = make.attempt(1, suspended=True, queue="default", workload="x")
    asked = decide(seen(queued(LIVE), [held], workload=make.admitted(), held=None), make.NOW)
    assert asked.needs == {Need.HELD}
    decision = decide(seen(queued(LIVE), [held], workload=make.admitted(), held="no quota"), make.NOW)
    assert done(decision) == ["delete WORKLOAD"]
    assert (decision.status.phase, decision.status.message) == ("Queued", "waits in queue default: no quota")
    assert decision.requeue_after is not None
    alone = decide(seen(queued(LIVE), [held], held="no quota"), make.NOW)
    assert done(alone) == [], "the Job has a place of its own now"
    admitted = dataclasses.replace(held, suspended=False)
    runs = decide(seen(queued(LIVE), [admitted], [make.running_pod()]), make.NOW)
    assert (done(runs), runs.status.phase) == ([], "Running")


def test_whoever_names_no_queue_where_kueue_manages_everything_is_told_the_cure() -> None:
    held = make.attempt(1, suspended=True)
    decision = decide(seen(make.resource(LIVE), [held]), make.NOW)
    assert "kubectl label rlj x kueue.x-k8s.io/queue-name=" in str(decision.status.message)
    assert decision.requeue_after == 300.0
    labelled = decide(seen(queued(decision.status), [held]), make.NOW)
    assert done(labelled) == ["delete JOB"], "then the job is queued as others are"
    admitted = make.attempt(1, suspended=True, workload="x")
    unknown = decide(seen(queued(LIVE), [admitted], workload=make.admitted()), make.NOW)
    assert "externalFrameworks" in str(unknown.status.message)


def test_a_priority_that_does_not_exist_is_said() -> None:
    decision = decide(seen(queued(), queueing=Queueing("team", problem="there is no PriorityClass high")), make.NOW)
    assert decision.actions == ()
    assert decision.status.message == "waits in queue team: there is no PriorityClass high"


def test_a_deactivated_workload_is_said_with_the_cure() -> None:
    workload = make.workload(active=False, evicted="The workload is deactivated")
    decision = decide(seen(queued(make.status(phase="Queued")), workload=workload), make.NOW)
    assert "set spec.active of the Workload to true" in str(decision.status.message)


def test_an_earlier_jobs_workload_of_the_same_name_is_not_ours() -> None:
    assert make.seen(queued(), workload=None).workload is None
    other = make.admitted(owner="uid-of-another")
    assert make.observe(queued(), [], [], None, make.IMAGE, workload=other).workload is None


# --- objects


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
def test_the_workload_asks_for_what_the_pods_do(version: str) -> None:
    spec = make.parsed(
        resources={"nodes": 2, "gpusPerNode": 8, "cpu": "4"},
        nodeSelector={"zone": "a"},
        env=[{"name": "SECRET", "value": "not for the queue"}],
        annotations={"kueue.x-k8s.io/podset-required-topology": "rack"},
    )
    made = build.workload(make.resource(), spec, TEAM, make.IMAGE, version)
    (pods,) = made["spec"]["podSets"]
    assert (pods["name"], pods["count"]) == ("main", 2)
    (container,) = pods["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "4", "nvidia.com/gpu": "8"}
    assert pods["template"]["spec"]["nodeSelector"] == {"zone": "a"}
    assert pods["topologyRequest"] == {"required": "rack", "podIndexLabel": names.ANNOTATION_JOB_INDEX}
    assert "SECRET" not in str(made)
    assert made["spec"]["priority"] == 10
    reference = {"group": "kueue.x-k8s.io", "kind": "WorkloadPriorityClass", "name": "high"}
    if version == "v1beta2":
        assert made["spec"]["priorityClassRef"] == reference
    else:
        assert made["spec"]["priorityClassSource"] == "kueue.x-k8s.io/workloadpriorityclass"
    assert made["metadata"]["labels"][names.LABEL_JOB] == "x"
    assert made["metadata"]["ownerReferences"][0]["controller"] is True


def test_what_kueue_assigns_reaches_the_pods() -> None:
    toleration = {"key": "gpu", "operator": "Exists"}
    spec = make.parsed(nodeSelector={"zone": "a"}, tolerations=[toleration], annotations={"mine": "1"})
    assigned = Assignment(
        labels=(("kueue.x-k8s.io/podset", "main"),),
        annotations=(("kueue.x-k8s.io/workload", "x"),),
        node_selector=(("pool", "h100"),),
        tolerations=('{"key": "gpu", "operator": "Exists"}', '{"key": "spot", "operator": "Exists"}'),
        gates=("kueue.x-k8s.io/topology",),
    )
    template = build.attempt_job(make.resource(), spec, 1, make.IMAGE, "x", assigned)["spec"]["template"]
    assert template["metadata"]["labels"]["kueue.x-k8s.io/podset"] == "main"
    assert template["metadata"]["annotations"] == {"mine": "1", "kueue.x-k8s.io/workload": "x"}
    assert template["spec"]["nodeSelector"] == {"zone": "a", "pool": "h100"}
    assert [t["key"] for t in template["spec"]["tolerations"]] == ["gpu", "spot"]
    assert template["spec"]["schedulingGates"] == [{"name": "kueue.x-k8s.io/topology"}]


async def test_flavors_and_admission_checks_say_where_the_pods_run() -> None:
    api = FakeApi()
    toleration = {"key": "spot", "operator": "Exists"}
    flavor = {"metadata": {"name": "gpu"}, "spec": {"nodeLabels": {"pool": "h100"}, "tolerations": [toleration]}}
    api.put(Kind.FLAVOR, flavor)
    update = {"name": "main", "nodeSelector": {"request": "7"}, "annotations": {"a": "b"}}
    main: dict[str, Any] = {"name": "main", "flavors": {"cpu": "gpu", "nvidia.com/gpu": "gpu"}}
    admission = {"podSetAssignments": [main]}
    checks = [{"name": "provision", "state": "Ready", "podSetUpdates": [update]}]
    view = workload_view({"metadata": META, "spec": {}, "status": {"admission": admission, "admissionChecks": checks}})
    found = await kueue.assignment(api, view)  # type: ignore[arg-type]
    assert dict(found.node_selector) == {"pool": "h100", "request": "7"}
    assert len(found.tolerations) == 1
    assert dict(found.annotations) == {"a": "b"}
    assert (found.labels, found.gates) == ((), ())
    main["topologyAssignment"] = {"levels": ["rack"]}
    view = workload_view({"metadata": META, "spec": {}, "status": {"admission": admission}})
    placed = await kueue.assignment(api, view)  # type: ignore[arg-type]
    assert dict(placed.annotations) == {"kueue.x-k8s.io/workload": "x"}
    assert dict(placed.labels) == {"kueue.x-k8s.io/podset": "main"}
    assert placed.gates == ("kueue.x-k8s.io/topology",)


META = {"name": "x", "namespace": "ns", "uid": "u", "labels": {names.LABEL_JOB: "x"}}


def test_what_a_workload_waits_for_is_quota_or_a_check() -> None:
    short = {"type": "QuotaReserved", "status": "False", "message": "1 more nvidia.com/gpu needed"}
    assert workload_view({"metadata": META, "status": {"conditions": [short]}}).pending == short["message"]
    reserved = {"type": "QuotaReserved", "status": "True"}
    checks = [{"name": "provision", "state": "Pending", "message": "2 nodes are on their way"}]
    view = workload_view({"metadata": META, "status": {"conditions": [reserved], "admissionChecks": checks}})
    assert view.pending == "admission check provision: 2 nodes are on their way"


@pytest.mark.parametrize("label", ["high", ""])
async def test_the_priority_is_kueues_class_or_else_that_of_the_pods(label: str) -> None:
    api = FakeApi()
    api.put(Kind.WORKLOAD_PRIORITY, {"metadata": {"name": "high"}, "value": 1000})
    api.put(Kind.POD_PRIORITY, {"metadata": {"name": "mine"}, "value": 5})
    job = make.resource(queue="team", priority=label, priorityClassName="mine")
    found = await kueue.queueing(api, make.seen(job))  # type: ignore[arg-type]
    assert found == (Queueing("team", 1000, "high") if label else Queueing("team", 5, "mine", True))
    job = make.resource(queue="team", priority="none-such")
    assert "none-such" in (await kueue.queueing(api, make.seen(job))).problem  # type: ignore[arg-type]


async def test_the_default_queue_is_that_of_the_namespace() -> None:
    api = FakeApi()
    assert await kueue.queueing(api, make.seen(make.resource())) == Queueing("")  # type: ignore[arg-type]
    api.put(Kind.LOCAL_QUEUE, {"metadata": {"name": "default"}})
    assert (await kueue.queueing(api, make.seen(make.resource()))).queue == "default"  # type: ignore[arg-type]


def test_conditions_of_others_stay_and_times_change_with_the_status_only() -> None:
    old = {"type": "Evicted", "status": "True", "lastTransitionTime": make.at(-9)}
    reserved = {"type": "QuotaReserved", "status": "True", "reason": "r", "lastTransitionTime": make.at(-9)}
    raw = {"metadata": META | {"generation": 3}, "status": {"conditions": [old, reserved], "admission": {"a": 1}}}
    report = Report("x", "u", (("QuotaReserved", False, "Pending", "why"),), release=True)
    changes = kueue.with_conditions(raw, report, make.at(0))
    assert changes is not None
    assert changes["admission"] is None
    assert changes["conditions"][0] == old
    assert changes["conditions"][1]["lastTransitionTime"] == make.at(0)
    after = {"metadata": raw["metadata"], "status": {"conditions": changes["conditions"]}}
    assert kueue.with_conditions(after, report, make.at(5)) is None, "said twice is said once"


# --- the watch


class Served:
    """Kueue's API as the watch calls it: lists, then events, each once."""

    def __init__(self, *rounds: Any) -> None:
        self.rounds, self.kueue_version, self.asked = list(rounds), "", 0

    async def find_kueue(self) -> str:
        self.asked += 1
        self.kueue_version = "v1beta2" if self.rounds else ""
        return self.kueue_version

    async def page(self, *_: Any) -> Any:
        found = self.rounds.pop(0)
        if isinstance(found, ApiError):
            raise found
        return {"metadata": {"resourceVersion": "100"}, "items": found}

    async def watch(self, *_: Any) -> AsyncIterator[Any]:
        for event in self.rounds.pop(0):
            if isinstance(event, ApiError):
                raise event
            yield event
        if not self.rounds:
            raise ApiError(404, "NotFound", "the API is gone")


def raw_workload(version: int, name: str = "x", **status: Any) -> dict[str, Any]:
    labels = {names.LABEL_JOB: "x"}
    meta = {"name": name, "namespace": "ns", "uid": "w", "labels": labels, "resourceVersion": str(version)}
    return {"metadata": meta, "status": status}


async def follow(*rounds: Any) -> tuple[Cache, list[Any]]:
    cache, changed = Cache(), []
    watch = WorkloadWatch(Served(*rounds), cache, changed.append, ())  # type: ignore[arg-type]
    task = asyncio.create_task(watch.run())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not task.done()
    assert watch.listed.is_set()
    task.cancel()
    return cache, changed


async def test_workloads_are_listed_once_and_then_followed() -> None:
    admitted = raw_workload(7, conditions=[{"type": "Admitted", "status": "True"}])
    cache, changed = await follow([raw_workload(5)], [{"type": "MODIFIED", "object": admitted}])
    assert cache.get(("ns", "x")).workload.admitted  # type: ignore[union-attr]
    assert changed == [("ns", "x"), ("ns", "x")]


async def test_what_was_deleted_is_forgotten_also_in_a_gap_of_the_watch() -> None:
    cache, _ = await follow([raw_workload(5)], [{"type": "DELETED", "object": raw_workload(8)}])
    assert cache.get(("ns", "x")).workload is None
    cache, changed = await follow([raw_workload(5)], [ApiError(410, "Expired", "too old")], [], [])
    assert cache.get(("ns", "x")).workload is None
    assert changed[-1] == ("ns", "x")


async def test_one_workload_that_cannot_be_read_stops_no_other() -> None:
    odd: dict[str, Any] = {"metadata": {"name": "x", "namespace": "ns", "labels": {names.LABEL_JOB: "x"}}, "status": 7}
    events = [
        {"type": "MODIFIED", "object": odd},
        {"message": "no event"},
        {"type": "ADDED", "object": raw_workload(9)},
    ]
    cache, _ = await follow([odd], events)
    assert cache.get(("ns", "x")).workload is not None


async def test_others_with_our_label_are_not_the_jobs_workload() -> None:
    cache, changed = await follow([raw_workload(5, "job-x-1-abcde")], [])
    assert cache.get(("ns", "x")).workload is None
    assert changed == []


async def test_without_kueue_it_asks_once_a_minute() -> None:
    served, changed = Served(), []
    watch = WorkloadWatch(served, Cache(), changed.append, ())  # type: ignore[arg-type]
    task = asyncio.create_task(watch.run())
    await asyncio.wait_for(watch.listed.wait(), 5)
    await asyncio.sleep(0.05)
    task.cancel()
    assert served.asked == 1
