"""One reconciliation from sight to status: what is read, what is written, and what is not."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.job import names
from nemo_rl.job.status import Progress, TerminationMessage
from nemo_rl_operator.observe import Resource
from nemo_rl_operator.plan import Event, Kind
from nemo_rl_operator.reconcile import Reconciler
from nemo_rl_operator.runtime import timestamps
from nemo_rl_operator.runtime.cache import Cache
from nemo_rl_operator.runtime.client import ApiError
from nemo_rl_operator.status_writer import merge_patch
from unit.operator import make
from unit.operator.fake_api import FakeApi, merge

KEY = ("ns", "x")


@dataclass
class Setting:
    """A reconciler with an API server in a dict; `deliver` plays the watch."""

    api: FakeApi = field(default_factory=FakeApi)
    cache: Cache = field(default_factory=Cache)
    now: datetime = make.NOW
    busy: bool = False
    rollout_image: str = ""

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        self.written: list[int] = []
        self.progress: Progress | None = None
        self.followed: dict[Any, tuple[str, str]] = {}
        self.reconcile = Reconciler(
            self.api,  # type: ignore[arg-type]
            self.cache,
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            self,
            image=make.IMAGE,
            rollout_image=self.rollout_image,
            busy=lambda: self.busy,
            clock=lambda: self.now,
        )

    def post(self, resource: Resource, event: Event) -> None:
        self.events.append(event)

    def wrote(self, key: Any, version: str) -> None:
        self.written.append(int(version))

    def newest(self, key: Any) -> Progress | None:
        return self.progress

    def unreadable(self, key: Any) -> str:
        return ""

    def follow(self, key: Any, pod: str, ip: str) -> None:
        self.followed[key] = (pod, ip)

    def forget(self, key: Any) -> None:
        self.followed.pop(key, None)

    def deliver(self) -> None:
        for (kind, _), body in self.api.objects.items():
            if kind in (Kind.RESOURCE, Kind.JOB, Kind.POD):
                self.cache.put({Kind.RESOURCE: "resource", Kind.JOB: "job", Kind.POD: "pod"}[kind], body)  # type: ignore[arg-type]

    def pod(self, phase: str, **state: Any) -> None:
        """The pod of attempt 1 in this phase."""
        job = self.api.objects[Kind.JOB, "x-1"]
        labels = job["spec"]["template"]["metadata"]["labels"]
        owner = {"kind": "Job", "name": "x-1", "uid": job["metadata"]["uid"], "controller": True}
        status = {"phase": phase, "podIP": "10.0.0.1", "containerStatuses": [{"name": "trainer", "state": state}]}
        meta = {"name": "x-1-0", "uid": "p", "labels": labels, "ownerReferences": [owner]}
        self.api.put(Kind.POD, {"metadata": meta, "status": status})

    async def start_others(self, count: int) -> float | None:
        """Besides x, so many jobs start: x0, x1, ... Seconds until the last of them is looked at again."""
        wake, body = None, self.api.put_job()
        for number in range(count):
            meta = body["metadata"] | {"name": f"x{number}", "uid": f"uid-{number}"}
            self.cache.put("resource", body | {"metadata": meta})
            wake = await self.reconcile(("ns", f"x{number}"))
        return wake

    @property
    def status(self) -> dict[str, Any]:
        return self.api.objects[Kind.RESOURCE, "x"].get("status") or {}


async def started() -> Setting:
    """After an attempt has started so long ago that the status says so."""
    setting = Setting()
    setting.api.put_job()
    setting.deliver()
    await setting.reconcile(KEY)
    setting.now = make.later(1)
    setting.deliver()
    await setting.reconcile(KEY)
    return setting


async def test_a_life_takes_five_writes_and_no_reads() -> None:
    setting = await started()
    assert setting.status["phase"] == "Starting"
    setting.pod("Running", running={})
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Running"
    assert setting.followed == {KEY: ("p", "10.0.0.1")}
    word = TerminationMessage(kind="result", total_steps=5).encode()
    setting.pod("Succeeded", terminated={"exitCode": 0, "message": word})
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Succeeded"
    assert setting.followed == {}
    verbs = [(verb, kind.name) for verb, kind, _ in setting.api.calls]
    assert verbs == [
        *[("POST", kind) for kind in ("CONFIG_MAP", "CLAIM", "JOB")],
        *[("PATCH", "RESOURCE")] * 3,
    ]
    assert [e.reason for e in setting.events] == ["AttemptStarted", "Succeeded"]


async def test_nothing_new_writes_nothing() -> None:
    setting = await started()
    setting.api.calls.clear()
    for _ in range(3):
        setting.deliver()
        await setting.reconcile(KEY)
    assert setting.api.calls == []


async def test_that_it_starts_is_not_written_of_a_job_that_runs_at_once() -> None:
    setting = Setting()
    setting.api.put_job()
    setting.deliver()
    wake = await setting.reconcile(KEY)
    assert wake == pytest.approx(0.3)
    assert setting.status == {}
    setting.pod("Running", running={})
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Running"
    assert [e.reason for e in setting.events] == ["AttemptStarted"], "the Event is posted nevertheless"


async def test_an_attempt_whose_job_could_not_be_made_has_not_begun() -> None:
    setting = Setting()
    setting.api.put_job()
    setting.deliver()
    setting.api.refuse["POST", Kind.JOB] = ApiError(429, "TooManyRequests", "later")
    for _ in range(2):
        with pytest.raises(ApiError, match="later"):
            await setting.reconcile(KEY)
    setting.api.refuse.clear()
    await setting.reconcile(KEY)
    setting.now = make.later(1)
    await setting.reconcile(KEY)
    assert [a["number"] for a in setting.status["attempts"]] == [1]


async def test_an_attempt_whose_job_is_deleted_before_the_status_tells_of_it_is_not_forgotten() -> None:
    setting = Setting()
    setting.api.put_job()
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status == {}
    setting.pod("Running", running={})  # it outlives its Job, and the watch has not told of it yet
    del setting.api.objects[Kind.JOB, "x-1"]
    setting.cache.remove("job", KEY, "x-1")
    await setting.reconcile(KEY)
    assert "JOB x-2" not in setting.api.made(), "never two attempts at once"
    assert setting.api.made().count("JOB x-1") == 1
    del setting.api.objects[Kind.POD, "x-1-0"]
    setting.cache.remove("pod", KEY, "x-1-0")
    await setting.reconcile(KEY)
    assert "JOB x-2" in setting.api.made()
    assert setting.status["attempts"][0]["cause"] == "JobDeleted"


async def test_the_more_jobs_start_the_later_it_is_written_that_they_do() -> None:
    assert await Setting().start_others(100) == pytest.approx(0.3 + 99 * 0.1)


async def test_the_last_of_many_starts_is_as_patient_as_all_were() -> None:
    setting = Setting()
    await setting.start_others(100)
    setting.deliver()
    await setting.reconcile(KEY)
    for number in range(100):
        setting.cache.remove("resource", ("ns", f"x{number}"), f"x{number}")
        await setting.reconcile(("ns", f"x{number}"))
    setting.now = make.later(5)
    await setting.reconcile(KEY)
    assert setting.status == {}
    setting.now = make.later(11)
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Starting"


async def test_what_a_start_waits_for_is_written_although_many_others_start() -> None:
    setting = Setting()
    await setting.start_others(200)
    setting.deliver()
    await setting.reconcile(KEY)
    setting.pod("Pending", waiting={})
    unbound = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": unbound}
    setting.api.objects[Kind.POD, "x-1-0"]["status"]["conditions"] = [condition]
    setting.now = make.later(11)  # less than the patience of 20 s
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["reason"] == "UnboundClaim"


async def test_a_status_that_comes_too_late_is_computed_again() -> None:
    setting = Setting()
    setting.api.put_job()
    setting.deliver()
    await setting.reconcile(KEY)
    setting.now = make.later(1)
    setting.api.put_job()  # a newer version that the cache has not heard of
    with pytest.raises(ApiError, match="modified"):
        await setting.reconcile(KEY)
    assert setting.events == [], "Events are posted only after the status is written"
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["attempt"] == 1


async def test_a_job_that_is_gone_is_forgotten() -> None:
    setting = await started()
    setting.pod("Running", running={})
    setting.deliver()
    del setting.api.objects[Kind.RESOURCE, "x"]
    await setting.reconcile(KEY)
    assert setting.cache.get(KEY).resource is None
    assert await setting.reconcile(KEY) is None


async def test_a_refusal_is_written_into_the_status() -> None:
    setting = Setting()
    setting.api.put_job()
    setting.deliver()
    setting.api.refuse["POST", Kind.CONFIG_MAP] = ApiError(
        403, "Forbidden", "exceeded quota: q, requested: a=1, used: a=1, limited: a=1"
    )
    assert await setting.reconcile(KEY) == 10.0
    assert (setting.status["phase"], setting.status["reason"]) == ("Pending", "QuotaExceeded")
    assert "JOB x-1" not in setting.api.made()
    setting.api.refuse.clear()
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Starting"


async def test_the_last_attempt_is_read_before_the_next_starts() -> None:
    setting = await started()
    setting.pod("Failed", terminated={"exitCode": 143})
    setting.api.objects[Kind.POD, "x-1-0"]["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    setting.deliver()
    setting.api.calls.clear()
    await setting.reconcile(KEY)
    assert [(verb, kind.name) for verb, kind, _ in setting.api.calls[:2]] == [("GET", "JOB"), ("LIST", "POD")]
    assert "JOB x-2" in setting.api.made()


async def test_a_pod_that_is_gone_still_tells_its_cause_when_the_last_attempt_is_read() -> None:
    setting = await started()
    setting.pod("Failed", terminated={"exitCode": 137, "reason": "OOMKilled"})
    setting.deliver()
    setting.cache.pod_gone(setting.api.objects.pop((Kind.POD, "x-1-0")))
    job = setting.api.objects[Kind.JOB, "x-1"]
    condition = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "lastTransitionTime": make.at(0)}
    setting.api.put(Kind.JOB, {**job, "status": {"conditions": [condition]}})
    setting.deliver()
    await setting.reconcile(KEY)
    assert (setting.status["attempts"][0]["cause"], setting.status["countedFailures"]) == ("OutOfMemory", 1)


@pytest.mark.parametrize(("busy", "reads"), [(False, 1), (True, 0)])
async def test_why_a_start_is_slow_is_not_asked_while_all_are(busy: bool, reads: int) -> None:
    setting = await started()
    setting.now = make.later(60)
    setting.busy = busy
    setting.api.calls.clear()
    await setting.reconcile(KEY)
    assert [verb for verb, kind, _ in setting.api.calls if kind is Kind.EVENT] == ["LIST"] * reads


async def test_bundles_are_looked_for_until_they_are_there() -> None:
    setting = Setting()
    setting.api.put_job(bundles=[{"name": "code", "sha256": "0" * 64, "configMaps": ["b-0", "b-1"]}])
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["message"] == "waiting for 2 of 2 bundle parts"
    for name in ("b-0", "b-1"):
        setting.api.put(Kind.CONFIG_MAP, {"metadata": {"name": name}})
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Starting"


JSON = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from("abcd"), JSON, max_size=4)


@given(OBJECTS, OBJECTS)
def test_a_patch_turns_the_old_into_the_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert merge(old, merge_patch(old, new)) == new


@given(OBJECTS)
def test_no_change_is_an_empty_patch(value: dict[str, Any]) -> None:
    assert merge_patch(value, value) == {}


def test_a_job_at_rest_is_known_by_its_resource_alone() -> None:
    cache = Cache()
    api = FakeApi()
    body = api.put_job()
    body["status"] = {"phase": "Succeeded", "observedGeneration": 1}
    cache.put("resource", body)
    assert cache.get(KEY).at_rest
    for change in ({"ttlSecondsAfterFinished": 0}, {"output": {"serveUntil": make.at(9)}}):
        changed = api.put(Kind.RESOURCE, {**body, "spec": make.spec(**change)})
        cache.put("resource", changed)
        assert not cache.get(KEY).at_rest
    cache.put("resource", api.put(Kind.RESOURCE, body))
    assert cache.get(KEY).at_rest
    pod = {"metadata": {"name": "p", "uid": "p", "namespace": "ns", "labels": {names.LABEL_JOB: "x"}}, "status": {}}
    cache.put("pod", pod)
    assert not cache.get(KEY).at_rest, "a pod is still there"


@pytest.mark.parametrize(
    ("verb", "kind", "error"),
    [
        ("POST", Kind.JOB, ApiError(500, "InternalError", 'failed calling webhook "mjob.kb.io": connection refused')),
        ("POST", Kind.CONFIG_MAP, ApiError(400, "BadRequest", 'admission webhook "v" denied the request: timed out')),
        ("POST", Kind.CLAIM, ApiError(403, "Forbidden", "persistentvolumeclaims is forbidden: not you")),
        ("LIST", Kind.CONFIG_MAP, ApiError(403, "Forbidden", "configmaps is forbidden: not you")),
        ("POST", Kind.JOB, ApiError(503, "ServiceUnavailable", "etcdserver: leader changed")),
        ("POST", Kind.JOB, ApiError(401, "Unauthorized", "Unauthorized")),
    ],
)
async def test_every_call_about_a_child_that_fails_is_said_and_passes(verb: str, kind: Kind, error: ApiError) -> None:
    setting = Setting()
    setting.api.put_job(bundles=[{"name": "code", "sha256": "0" * 64, "configMaps": ["b"]}])
    setting.api.put(Kind.CONFIG_MAP, {"metadata": {"name": "b", "labels": {names.LABEL_BUNDLE: "x"}}})
    setting.api.refuse[verb, kind] = error
    setting.deliver()
    wake = None
    for _ in range(3):
        with contextlib.suppress(ApiError):  # the first few of what may pass are repeated at once
            wake = await setting.reconcile(KEY)
        setting.deliver()
    assert error.message in setting.status["message"]
    assert setting.status["phase"] == "Pending"
    blocked = {c["type"]: c for c in setting.status["conditions"]}["Blocked"]
    assert (blocked["status"], error.message in blocked["message"]) == ("True", True)
    waits = []
    for _ in range(12):
        assert wake is not None
        setting.now = make.later((setting.now - make.NOW).total_seconds() + wake)
        setting.api.calls.clear()
        wake = await setting.reconcile(KEY)
        waits.append(wake)
        setting.deliver()
        assert len(setting.api.calls) <= 8
    assert waits == sorted(waits), "the longer it lasts, the rarer it is tried"
    assert waits[-1] == 300.0
    setting.api.refuse.clear()
    await setting.reconcile(KEY)
    setting.now = make.later((setting.now - make.NOW).total_seconds() + 20)
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Starting"
    assert {c["type"]: c["status"] for c in setting.status["conditions"]}["Blocked"] == "False"


@pytest.mark.parametrize(
    "error",
    [
        ApiError(422, "Invalid", 'Job.batch "x-2" is invalid: spec.template: Invalid value'),
        ApiError(400, "BadRequest", 'admission webhook "v" denied the request: verify-images: registry timeout'),
        ApiError(413, "RequestEntityTooLarge", "limit is 3145728"),
    ],
)
async def test_a_job_that_has_started_is_never_failed_for_what_is_refused_later(error: ApiError) -> None:
    setting = await started()
    setting.pod("Failed", terminated={"exitCode": 1})
    setting.deliver()
    setting.api.refuse["POST", Kind.JOB] = error
    await setting.reconcile(KEY)
    setting.now = make.later(60)
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Pending"
    assert error.message in setting.status["message"]
    setting.api.refuse.clear()
    await setting.reconcile(KEY)
    assert "JOB x-2" in setting.api.made()


async def test_a_field_that_a_newer_definition_adds_disturbs_no_running_job(caplog: pytest.LogCaptureFixture) -> None:
    setting = await started()
    setting.pod("Running", running={})
    body = setting.api.objects[Kind.RESOURCE, "x"]
    body["spec"]["training"] = {"fp8FromTheFuture": False}
    body["spec"]["output"] = {"whereFromTheFuture": "x"}
    setting.api.put(Kind.RESOURCE, body)
    setting.deliver()
    for _ in range(3):
        await setting.reconcile(KEY)
        setting.deliver()
    assert setting.status["phase"] == "Running"
    accepted = {c["type"]: c for c in setting.status["conditions"]}["Accepted"]
    assert accepted["status"] == "True"
    assert "spec.training.fp8FromTheFuture" in accepted["message"]
    assert not [call for call in setting.api.calls if call[0] == "DELETE"]
    assert caplog.text.count("fp8FromTheFuture") == 1, "said once, not with every look"


async def test_a_started_job_whose_spec_cannot_be_read_trains_to_its_end_and_starts_no_other() -> None:
    setting = await started()
    body = setting.api.objects[Kind.RESOURCE, "x"]
    body["spec"]["grpo"] = {"lossType": "newest"}
    setting.api.put(Kind.RESOURCE, body)
    setting.pod("Running", running={})
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Running"
    accepted = {c["type"]: c for c in setting.status["conditions"]}["Accepted"]
    assert (accepted["status"], "spec.grpo.lossType" in accepted["message"]) == ("False", True)
    setting.pod("Failed", terminated={"exitCode": 1})
    for later in (0, 100, 1000):
        setting.now = make.later(later)
        setting.deliver()
        await setting.reconcile(KEY)
    assert (setting.status["phase"], setting.status["reason"]) == ("Pending", "InvalidSpec")
    assert "JOB x-2" not in setting.api.made()
    del body["spec"]["grpo"]  # an operator that can read it is at work again
    setting.api.objects[Kind.RESOURCE, "x"]["spec"].pop("grpo", None)
    setting.api.put(Kind.RESOURCE, setting.api.objects[Kind.RESOURCE, "x"])
    setting.deliver()
    await setting.reconcile(KEY)
    assert "JOB x-2" in setting.api.made()


class Strict(FakeApi):
    """Refuses a status with progress in it, as the API server does for a time that is none."""

    async def patch_status(self, namespace: str, name: str, version: str, status: dict[str, Any]) -> dict[str, Any]:
        if status.get("progress"):
            self.calls.append(("PATCH", Kind.RESOURCE, "refused"))
            raise ApiError(422, "Invalid", "status.progress.time: Invalid value")
        return await super().patch_status(namespace, name, version, status)


async def test_what_pods_said_cannot_make_a_status_unwritable() -> None:
    setting = Setting(Strict())
    setting.api.put_job()
    setting.deliver()
    await setting.reconcile(KEY)
    setting.pod("Running", running={})
    setting.deliver()
    await setting.reconcile(KEY)
    setting.progress = Progress(step=3)
    for _ in range(5):
        await setting.reconcile(KEY)
        setting.deliver()
    assert (setting.status["phase"], setting.status.get("progress")) == ("Running", None)
    assert [name for verb, _, name in setting.api.calls if name == "refused"] == ["refused"], "tried once"
    word = TerminationMessage(kind="result", total_steps=5).encode()
    setting.pod("Succeeded", terminated={"exitCode": 0, "message": word})
    setting.deliver()
    await setting.reconcile(KEY)
    assert (setting.status["phase"], setting.status["result"]["totalSteps"]) == ("Succeeded", 5)


class Pruning(FakeApi):
    """Its definition lacks a field of the status, so a write of that alone changes nothing."""

    async def patch_status(self, namespace: str, name: str, version: str, status: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in status.items() if name != "gpus"}
        if not kept:
            self.calls.append(("PATCH", Kind.RESOURCE, name))
            return copy.deepcopy(self.objects[Kind.RESOURCE, name])
        return await super().patch_status(namespace, name, version, kept)


async def test_a_write_that_changes_nothing_is_not_repeated_and_not_waited_for() -> None:
    setting = Setting(Pruning())
    setting.api.put_job()
    for _ in range(25):
        setting.deliver()
        await setting.reconcile(KEY)
        setting.now = make.later((setting.now - make.NOW).total_seconds() + 2)
    writes = [call for call in setting.api.calls if call[0] == "PATCH"]
    assert len(writes) <= 5
    assert len(setting.written) < len(writes), "nobody waits for the echo of a write that made no version"


async def test_many_rows_are_not_kept_and_reach_the_frozen_job_whole() -> None:
    rows = [{"prompt": f"{n} what is {n} plus {n}", "answer": str(2 * n)} for n in range(10_000)]
    setting = Setting()
    setting.api.put_job(dataset={"inline": rows})
    setting.deliver()
    found = setting.cache.get(KEY).resource
    assert found is not None
    assert len(found.spec) < 1000
    await setting.reconcile(KEY)
    assert "JOB x-1" in setting.api.made()
    text = setting.api.objects[Kind.CONFIG_MAP, "x-job"]["data"]["job.json"]
    assert json.loads(text)["spec"]["dataset"]["inline"] == rows
    found = setting.cache.get(KEY).resource
    assert found is not None
    assert len(found.spec) < 1000
    changed = setting.api.objects[Kind.RESOURCE, "x"]
    changed["spec"]["dataset"]["inline"] = [*rows[:-1], {"prompt": "other", "answer": "x"}]
    assert setting.cache.put("resource", setting.api.put(Kind.RESOURCE, changed)) == KEY, "a change of them is seen"


async def test_a_job_of_many_bundle_parts_costs_few_calls() -> None:
    bundles = [
        {"name": f"b{i}", "sha256": "0" * 64, "configMaps": [f"m-{i}-{j}" for j in range(32)]} for i in range(16)
    ]
    setting = Setting()
    setting.api.put_job(bundles=bundles)
    setting.deliver()
    await setting.reconcile(KEY)
    assert len(setting.api.calls) <= 12
    assert setting.status["message"] == "waiting for 512 of 512 bundle parts"


@given(st.text(max_size=40))
def test_a_time_at_the_edge_of_the_calendar_is_far_away(text: str) -> None:
    for value in (text, "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59Z"):
        assert timestamps.parse(value) is None or timestamps.write(timestamps.parse(value) or make.NOW)
    assert (timestamps.seconds_until("9999-12-31T23:59:59-23:59", make.NOW) or 0) > 1e9
    assert (timestamps.seconds_until("0001-01-01T00:00:00+23:59", make.NOW) or 0) < -1e9
