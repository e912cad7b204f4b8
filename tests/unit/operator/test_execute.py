"""Carrying out actions: everything may be done twice, and a refusal becomes words."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest

from nemo_rl.job import names
from nemo_rl_operator import build
from nemo_rl_operator.execute import Executor, NamespaceGoneError
from nemo_rl_operator.observe import Blocked
from nemo_rl_operator.plan import Action, Create, Delete, Kind
from nemo_rl_operator.runtime.cache import Cache
from nemo_rl_operator.runtime.client import ApiError
from unit.operator import make
from unit.operator.fake_api import FakeApi

RESOURCE = make.resource()
JOB = Create(Kind.JOB, build.attempt_job(RESOURCE, make.parsed(), 1, make.IMAGE))
MAP = Create(Kind.CONFIG_MAP, build.frozen_job(RESOURCE, make.parsed()))
CLAIM = Create(Kind.CLAIM, build.output_claim(RESOURCE, make.parsed()) or {})


async def run(api: FakeApi, *actions: Action, cache: Cache | None = None) -> Blocked | None:
    executor = Executor(api, Cache() if cache is None else cache)  # type: ignore[arg-type]
    return (await executor.run(RESOURCE, actions)).blocked


def foreign(kind: Kind, name: str, **meta: Any) -> dict[str, Any]:
    return {"kind": "Anything", "metadata": {"name": name, **meta}}


async def test_what_a_job_needs_is_made_before_it() -> None:
    api = FakeApi()
    assert await run(api, JOB, MAP, CLAIM) is None
    assert api.made() == ["CONFIG_MAP x-job", "CLAIM x-output", "JOB x-1"]


async def test_doing_it_twice_is_success() -> None:
    api = FakeApi()
    await run(api, MAP, CLAIM, JOB)
    assert await run(api, MAP, CLAIM, JOB) is None


async def test_the_cache_knows_what_was_made_before_the_watch_does() -> None:
    cache = Cache()
    await run(FakeApi(), JOB, cache=cache)
    assert list(cache.get(("ns", "x")).jobs) == ["x-1"]


@pytest.mark.parametrize(
    ("action", "kind", "name"),
    [(JOB, Kind.JOB, "x-1"), (MAP, Kind.CONFIG_MAP, "x-job"), (CLAIM, Kind.CLAIM, "x-output")],
)
async def test_a_name_that_somebody_else_has_is_a_conflict(action: Create, kind: Kind, name: str) -> None:
    api = FakeApi()
    api.put(kind, foreign(kind, name))
    blocked = await run(api, action)
    assert blocked is not None
    assert (blocked.conflict, blocked.fatal) == (True, False)
    assert f"{name} exists and does not belong to this job" in blocked.message


async def test_each_job_of_several_nodes_has_a_token_of_its_own_that_nobody_reads() -> None:
    body = build.run_secret(RESOURCE, make.parsed(resources={"nodes": 2}))
    assert body is not None and "data" not in body and "stringData" not in body
    drawn = set()
    for _ in range(2):
        api = FakeApi()
        await run(api, Create(Kind.SECRET, body))
        await run(api, Create(Kind.SECRET, body))
        assert [verb for verb, _, _ in api.calls] == ["POST", "POST"], "it is never read"
        drawn.add(api.objects[Kind.SECRET, "x-run-uid-x"]["stringData"]["token"])
    assert len(drawn) == 2 and all(len(token) == 64 for token in drawn)


async def test_nothing_is_started_when_something_it_needs_is_blocked() -> None:
    api = FakeApi()
    api.put(Kind.CONFIG_MAP, foreign(Kind.CONFIG_MAP, "x-job"))
    assert await run(api, MAP, JOB) is not None
    assert "JOB x-1" not in api.made()


def kept_claim(size: str = "20Gi", mode: str = "ReadWriteOnce", **spec: Any) -> dict[str, Any]:
    meta = {"name": "x-output", "labels": {names.LABEL_JOB: "x", names.LABEL_JOB_UID: "old"}}
    content = {"accessModes": [mode], "resources": {"requests": {"storage": size}}, **spec}
    return {"kind": "PersistentVolumeClaim", "metadata": meta, "spec": content}


@pytest.mark.parametrize("size", ["20Gi", "20480Mi", "1Ti", "22G"])
async def test_a_claim_kept_from_an_earlier_job_of_the_name_is_used_again(size: str) -> None:
    api = FakeApi()
    api.put(Kind.CLAIM, kept_claim(size))
    assert await run(api, CLAIM) is None


@pytest.mark.parametrize(
    ("claim", "output", "words"),
    [
        (kept_claim("20Gi"), {"size": "2Ti"}, "it has 20Gi, spec.output.size asks for 2Ti"),
        (kept_claim("19G"), {}, "it has 19G, spec.output.size asks for 20Gi"),
        (
            kept_claim(),
            {"accessMode": "ReadWriteMany"},
            "its access mode is ReadWriteOnce, the job asks for ReadWriteMany",
        ),
        (
            kept_claim(storageClassName="slow"),
            {"storageClassName": "fast"},
            "its storage class is slow, the job asks for fast",
        ),
        (kept_claim(volumeMode="Block"), {}, "its volume mode is Block"),
    ],
)
async def test_a_kept_claim_that_gives_less_than_is_asked_is_a_conflict_that_says_so(
    claim: dict[str, Any], output: dict[str, Any], words: str
) -> None:
    api = FakeApi()
    api.put(Kind.CLAIM, claim)
    blocked = await run(api, Create(Kind.CLAIM, build.output_claim(RESOURCE, make.parsed(output=output)) or {}))
    assert blocked is not None and blocked.conflict and not blocked.fatal
    assert words in blocked.message
    assert "set spec.output.claim to x-output to use it as it is" in blocked.message


def forged_map(change: Any = None, **fields: Any) -> dict[str, Any]:
    """A frozen job that says it is ours, of a spec with these fields, as `change` leaves its document."""
    body = build.frozen_job(make.resource(**fields), make.parsed(**fields))
    document = json.loads(body["data"]["job.json"])
    if change:
        change(document)
    body["data"]["job.json"] = json.dumps(document)
    return body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (forged_map(reward={"source": "def reward(prompt, response): return 1.0"}), "spec.reward.builtin"),
        (forged_map(training={"learningRate": 1.0}), "spec.training.learningRate"),
        (forged_map(lambda job: job["metadata"].update(name="y")), "metadata"),
        (forged_map(lambda job: job["spec"].update(code="evil")), "spec.code"),
        (forged_map(lambda job: job["spec"].setdefault("training", {}).update(hook="evil")), "spec.training.hook"),
        (forged_map(lambda job: job.pop("spec")), "its form"),
        ({**forged_map(), "data": {"job.json": "[" * 5000}}, "its form"),
        ({**forged_map(), "data": {"job.json": "{}", "b": ""}}, "its keys"),
    ],
)
async def test_a_forged_frozen_job_is_a_conflict_and_no_pod_reads_it(body: dict[str, Any], words: str) -> None:
    api = FakeApi()
    api.put(Kind.CONFIG_MAP, body)
    blocked = await run(api, MAP, JOB)
    assert blocked is not None and blocked.conflict and not blocked.fatal
    assert f"ConfigMap x-job exists with other content ({words})" in blocked.message
    assert "JOB x-1" not in api.made()


async def test_a_frozen_job_of_another_version_is_used_and_pods_name_its_digest() -> None:
    api = FakeApi()
    older = forged_map(lambda job: job["spec"].update(training={"maxSteps": 1000}, backoffLimit=3))
    assert json.loads(older["data"]["job.json"])["spec"]["training"]["maxSteps"] == make.parsed().training.max_steps
    assert older["data"] != MAP.body["data"]
    api.put(Kind.CONFIG_MAP, older)
    assert await run(api, MAP, JOB) is None
    wanted = hashlib.sha256(older["data"]["job.json"].encode()).hexdigest()
    made = api.objects[Kind.JOB, "x-1"]["spec"]["template"]["spec"]["containers"][0]
    assert made["args"] == [f"--job-sha256={wanted}"]


async def test_a_frozen_job_without_a_learning_rate_is_of_the_first_version_and_goes_on_with_its_rate() -> None:
    sft: dict[str, Any] = {"algorithm": "sft", "reward": None}
    stored = {**sft, "training": {"learningRate": 1e-6}}  # the definition of that version filled it in
    wanted = Create(Kind.CONFIG_MAP, build.frozen_job(make.resource(**stored), make.parsed(**stored)))
    api = FakeApi()
    api.put(Kind.CONFIG_MAP, forged_map(lambda job: job["spec"]["training"].pop("learningRate"), **sft))
    assert await run(api, wanted, JOB) is None
    anew = Create(Kind.CONFIG_MAP, build.frozen_job(make.resource(**sft), make.parsed(**sft)))
    blocked = await run(api, anew)
    assert blocked is not None and "spec.training.learningRate" in blocked.message


def frozen_with(**fields: Any) -> Create:
    return Create(Kind.CONFIG_MAP, build.frozen_job(make.resource(**fields), make.parsed(**fields)))


def read_by(api: FakeApi, job: str) -> dict[str, Any]:
    """The specification that the pods of a Job read, once its digest was compared as they compare it."""
    pod = api.objects[Kind.JOB, job]["spec"]["template"]["spec"]
    name = next(v["configMap"]["name"] for v in pod["volumes"] if v["name"] == "job")
    text = api.objects[Kind.CONFIG_MAP, name]["data"]["job.json"]
    assert pod["containers"][0]["args"] == [f"--job-sha256={hashlib.sha256(text.encode()).hexdigest()}"]
    return json.loads(text)["spec"]  # type: ignore[no-any-return]


MORE = {"resources": {"memory": "64Gi"}, "training": {"tokensPerMicrobatch": 512, "activationCheckpointing": True}}


def attempt(number: int, **fields: Any) -> Create:
    return Create(Kind.JOB, build.attempt_job(make.resource(**fields), make.parsed(**fields), number, make.IMAGE))


async def test_a_job_that_was_changed_while_suspended_goes_on_with_a_second_frozen_job() -> None:
    api = FakeApi()
    assert await run(api, MAP, attempt(1)) is None
    assert await run(api, frozen_with(**MORE), attempt(2, **MORE)) is None
    first, second = read_by(api, "x-1"), read_by(api, "x-2")
    assert "resources" not in first
    assert second["resources"] == MORE["resources"]
    assert second["training"] == first["training"] | MORE["training"]
    assert await run(api, frozen_with(**MORE), attempt(2, **MORE)) is None, "doing it twice is success"
    assert await run(api, MAP, attempt(3)) is None
    assert read_by(api, "x-3") == first, "changed back, it reads the first one again"
    assert len([name for kind, name in api.objects if kind is Kind.CONFIG_MAP]) == 2


async def test_a_change_keeps_what_an_earlier_version_began_with() -> None:
    """Such as the learning rate of the first version, which that did not write down."""
    sft: dict[str, Any] = {"algorithm": "sft", "reward": None}
    stored = {**sft, "training": {"learningRate": 1e-6}}
    api = FakeApi()
    api.put(Kind.CONFIG_MAP, forged_map(lambda job: job["spec"]["training"].pop("learningRate"), **sft))
    now = {**stored, "resources": {"memory": "64Gi"}}
    assert await run(api, frozen_with(**now), attempt(2, **now)) is None
    assert read_by(api, "x-2")["resources"] == {"memory": "64Gi"}
    assert "learningRate" not in read_by(api, "x-2").get("training", {})


@pytest.mark.parametrize(
    "field", [{"reward": {"builtin": "length"}}, {"training": {"maxSteps": 3}}, {"image": "evil:1"}]
)
async def test_a_forged_frozen_job_is_no_earlier_form_of_a_changed_one(field: dict[str, Any]) -> None:
    api = FakeApi()
    api.put(Kind.CONFIG_MAP, forged_map(lambda job: job["spec"].update(field)))
    blocked = await run(api, frozen_with(**MORE), attempt(2, **MORE))
    assert blocked is not None and blocked.conflict
    assert "JOB x-2" not in api.made()


async def test_a_forged_second_frozen_job_is_a_conflict() -> None:
    api = FakeApi()
    await run(api, MAP, attempt(1))
    await run(api, frozen_with(**MORE), attempt(2, **MORE))
    name = next(n for k, n in api.objects if k is Kind.CONFIG_MAP and n != "x-job")
    content = json.loads(api.objects[Kind.CONFIG_MAP, name]["data"]["job.json"])
    content["spec"]["reward"] = {"builtin": "length"}
    api.objects[Kind.CONFIG_MAP, name]["data"]["job.json"] = json.dumps(content)
    blocked = await run(api, frozen_with(**MORE), attempt(3, **MORE))
    assert blocked is not None and blocked.conflict
    assert f"ConfigMap {name} exists with other content (spec.reward" in blocked.message
    assert "JOB x-3" not in api.made()


async def test_the_file_server_reads_the_frozen_job_that_there_is_and_hinders_nothing_where_it_cannot() -> None:
    files = Create(Kind.POD, build.files_pod(make.resource(**MORE), make.parsed(**MORE), make.IMAGE))
    api = FakeApi()
    await run(api, MAP, attempt(1))
    assert await run(api, frozen_with(**MORE), files) is None
    pod = api.objects[Kind.POD, "x-files"]["spec"]
    name = next(v["configMap"]["name"] for v in pod["volumes"] if v["name"] == "job")
    text = api.objects[Kind.CONFIG_MAP, name]["data"]["job.json"]
    digest = next(e["value"] for e in pod["containers"][0]["env"] if e["name"] == names.JOB_DIGEST_VARIABLE)
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    other = FakeApi()
    other.put(Kind.CONFIG_MAP, forged_map(lambda job: job["spec"].update(image="evil:1")))
    done = await Executor(other, Cache()).run(RESOURCE, [frozen_with(), files])  # type: ignore[arg-type]
    assert done.blocked is None
    assert done.unserved is not None and "x-job exists with other content" in done.unserved.message
    assert "POD x-files" not in other.made()


async def test_replicas_that_come_anew_and_a_file_server_are_made_at_once() -> None:
    api, rollout = FakeApi(), {"rollout": {"engine": "vllm", "replicas": 2}}
    job, spec = make.resource(**rollout), make.parsed(**rollout)
    files = Create(Kind.POD, build.files_pod(job, spec, make.IMAGE))
    replicas = Create(Kind.STATEFUL_SET, build.replica_set(job, spec, make.ROLLOUT_IMAGE))
    assert await run(api, Create(Kind.CONFIG_MAP, build.frozen_job(job, spec)), files, replicas) is None
    assert api.made() == ["CONFIG_MAP x-job", "STATEFUL_SET x-rollout", "POD x-files"]


async def test_an_image_that_the_api_server_would_leave_out_of_a_volume_starts_no_pod() -> None:
    """Without the feature gate it takes the Job, and the pod would have an empty folder there."""
    weights = {"volumes": [{"name": "weights", "image": {"reference": "registry.example/weights:1"}}]}
    api = FakeApi()
    assert await run(api, attempt(1, **weights)) is None
    assert api.made() == ["JOB x-1"]

    def without(body: dict[str, Any]) -> dict[str, Any]:
        for volume in body["spec"]["template"]["spec"]["volumes"]:
            volume.pop("image", None)
        return body

    older = FakeApi()
    older.completed = without
    blocked = await run(older, attempt(1, **weights))
    assert blocked is not None and blocked.fatal
    assert "volumes of images, which spec.volumes asks for (weights): they need Kubernetes 1.35" in blocked.message
    assert older.made() == []


async def test_a_field_that_a_newer_definition_fills_in_meanwhile_is_no_conflict() -> None:
    api = FakeApi()
    await run(api, MAP)
    resource = make.resource(training={"fp8": False})
    assert await run(api, Create(Kind.CONFIG_MAP, build.frozen_job(resource, make.parsed()))) is None


def forged_job(**pod: Any) -> dict[str, Any]:
    body = copy.deepcopy(JOB.body)
    body["spec"]["template"]["spec"] |= pod
    return body


@pytest.mark.parametrize(
    "body",
    [
        forged_job(containers=[{"name": "trainer", "image": "evil:1"}]),
        forged_job(initContainers=[{"name": "a", "image": "evil:1"}]),
        forged_job(serviceAccountName="admin"),
        forged_job(volumes=[{"name": "a", "hostPath": {"path": "/"}}]),
        forged_job(hostNetwork=True),
    ],
)
async def test_a_job_of_ours_that_runs_something_else_is_no_attempt(body: dict[str, Any]) -> None:
    api = FakeApi()
    api.put(Kind.JOB, body)
    blocked = await run(api, JOB)
    assert blocked is not None and blocked.conflict
    assert blocked.stray == ("x-1", api.objects[Kind.JOB, "x-1"]["metadata"]["uid"])


@pytest.mark.parametrize("change", [{"selector": {"app": "evil"}}, {"clusterIP": "10.0.0.9"}, {"type": "ExternalName"}])
async def test_a_forged_service_is_a_conflict(change: dict[str, Any]) -> None:
    body = build.service(RESOURCE, make.parsed(resources={"nodes": 2}))
    assert body is not None
    api = FakeApi()
    api.put(Kind.SERVICE, {**body, "spec": body["spec"] | change})
    blocked = await run(api, Create(Kind.SERVICE, body))
    assert blocked is not None and blocked.conflict
    assert f"Service x exists with other content ({next(iter(change))})" in blocked.message


async def test_children_of_an_earlier_job_of_the_name_are_waited_for() -> None:
    owner = {"kind": names.KIND, "name": "x", "uid": "old", "controller": True}
    api = FakeApi()
    api.put(Kind.JOB, foreign(Kind.JOB, "x-1", ownerReferences=[owner]))
    blocked = await run(api, JOB)
    assert blocked is not None
    assert (blocked.conflict, blocked.fatal) == (False, False)
    assert "to be deleted" in blocked.message


async def test_our_own_job_that_is_being_deleted_is_not_taken_for_a_new_one() -> None:
    api = FakeApi()
    await run(api, JOB)
    api.objects[Kind.JOB, "x-1"]["metadata"]["deletionTimestamp"] = make.at(0)
    assert await run(api, JOB) is not None


@pytest.mark.parametrize(
    ("code", "message", "reason", "fatal"),
    [
        (422, 'Job "x-1" is invalid: spec.template.spec.tolerations: Invalid value', "Refused", True),
        (400, 'strict decoding error: unknown field "spec.template.spec.affinity.x"', "Refused", True),
        (413, "Request entity too large", "Refused", True),
        (
            403,
            'jobs "x-1" is forbidden: exceeded quota: q, requested: count/jobs=1, used: count/jobs=1, limited: count/jobs=1',
            "QuotaExceeded",
            False,
        ),
        (403, 'admission webhook "policy" denied the request: no', "Refused", False),
        (400, 'admission webhook "v.kyverno.svc" denied the request: registry timeout', "Refused", False),
        (422, 'admission webhook "v" denied the request: Job.batch "x-1" is invalid: so we say', "Refused", False),
        (
            422,
            "jobs.batch \"x-1\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'p' denied request: no",
            "Refused",
            False,
        ),
        (418, "a proxy that is a teapot", "Refused", False),
        (405, "not here", "Refused", False),
    ],
)
async def test_refusals_become_words(code: int, message: str, reason: str, fatal: bool) -> None:
    api = FakeApi()
    api.refuse["POST", Kind.JOB] = ApiError(code, "", message)
    blocked = await run(api, JOB)
    assert blocked is not None
    assert (blocked.reason, blocked.fatal) == (reason, fatal)


@pytest.mark.parametrize("code", [0, 429, 500, 503])
async def test_what_only_time_cures_is_raised(code: int) -> None:
    api = FakeApi()
    api.refuse["POST", Kind.JOB] = ApiError(code, "", "later")
    with pytest.raises(ApiError, match="later"):
        await run(api, JOB)


@pytest.mark.parametrize(
    "error",
    [
        ApiError(404, "NotFound", 'namespaces "ns" not found'),
        ApiError(403, "Forbidden", "unable to create new content in namespace ns because it is being terminated"),
    ],
)
async def test_a_namespace_on_its_way_out_ends_the_work(error: ApiError) -> None:
    api = FakeApi()
    api.refuse["POST", Kind.JOB] = error
    with pytest.raises(NamespaceGoneError):
        await run(api, JOB)


async def test_deleting_what_is_gone_or_replaced_is_success() -> None:
    api = FakeApi()
    assert await run(api, Delete(Kind.JOB, "x-1", "u")) is None
    api.put(Kind.JOB, foreign(Kind.JOB, "x-1", uid="another"))
    assert await run(api, Delete(Kind.JOB, "x-1", "u")) is None
    assert (Kind.JOB, "x-1") in api.objects


async def test_a_file_server_that_cannot_be_made_does_not_hold_up_the_job() -> None:
    api = FakeApi()
    api.refuse["POST", Kind.POD] = ApiError(403, "Forbidden", "no pods today")
    pod = Create(Kind.POD, build.files_pod(RESOURCE, make.parsed(), make.IMAGE))
    done = await Executor(api, Cache()).run(RESOURCE, [pod, JOB])  # type: ignore[arg-type]
    assert done.blocked is None
    assert done.unserved is not None
    assert "no pods today" in done.unserved.message, "and the status says so"
