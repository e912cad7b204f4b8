"""Bad input: refused with the field's name and a cure, by the API server or by the operator; the next job is served."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from cluster.api import ApiError, Object, path
from cluster.bad_manifests import BAD, Bad
from cluster.manifests import job, merge
from cluster.operator_process import Operator
from cluster.scene import Scene
from nemo_rl.job import names

UNCHANGEABLE: list[tuple[str, Object]] = [
    ("spec.model", {"model": "another"}),
    ("spec.dataset", {"dataset": {"inline": [{"prompt": "3+3=", "answer": "6"}]}}),
    ("spec.reward", {"reward": {"builtin": "length"}}),
    ("spec.training", {"training": {"maxSteps": 5}}),
    ("spec.grpo", {"grpo": {"temperature": 0.5}}),
    ("spec.validationDataset", {"validationDataset": {"name": "a/b"}}),
    ("spec.output.size", {"output": {"size": "1Gi"}}),
    ("spec.output.claim", {"output": {"claim": "other"}}),
    ("spec.image", {"image": "another"}),
    ("spec.volumes", {"volumes": [{"name": "a", "emptyDir": {}}]}),
    ("spec.hostNetwork", {"hostNetwork": True}),
    ("spec.capabilities", {"capabilities": ["IPC_LOCK"]}),
    ("spec.env", {"env": [{"name": "A", "value": "b"}]}),
    ("spec.labels", {"labels": {"a": "b"}}),
    ("spec.runtimeClassName", {"runtimeClassName": "nvidia"}),
    ("spec.topologySpreadConstraints", {"topologySpreadConstraints": [{"topologyKey": "zone"}]}),
    ("spec.tolerations", {"tolerations": [{"key": "gpu", "operator": "Exists"}]}),
    ("spec.serviceAccountName", {"serviceAccountName": "another"}),
    # deep down: other values, values that come, and values that go
    ("spec.dataset.split", {"dataset": {"split": "test"}}),
    ("spec.reward.timeoutSeconds", {"reward": {"timeoutSeconds": 5}}),
    ("spec.training.warmupSteps", {"training": {"warmupSteps": 5}}),
    ("spec.training.loraRank", {"training": {"loraRank": 8}}),
    ("spec.output.retain", {"output": {"retain": False}}),
    ("spec.cache.claim", {"cache": {"claim": "other"}}),
]


OF_SUSPENDED: list[tuple[str, Object]] = [
    ("spec.resources", {"resources": {"memory": "64Gi"}}),
    ("spec.resources", {"resources": {"cpu": "2"}}),
    ("spec.resources", {"resources": {"extra": {"rdma/hca": 1}}}),
    ("spec.resources", {"resources": {"gpuResource": "amd.com/gpu"}}),
    ("spec.resources", {"resources": {"claims": [{"template": "a", "gpus": False}]}}),
    ("spec.training.tokensPerMicrobatch", {"training": {"tokensPerMicrobatch": 512}}),
    ("spec.training.activationCheckpointing", {"training": {"activationCheckpointing": True}}),
]
"""What may change once a job is suspended."""


def manifest(case: Bad, name: str) -> Object:
    spec = dict(case.spec)
    algorithm = spec.pop("algorithm_", None)
    made = job(case.name or name, case.algorithm, **spec)
    if algorithm:
        made["spec"]["algorithm"] = algorithm
    return made


def refusal(scene: Scene, body: Object) -> str:
    """What the API server says, or else what the operator says."""
    try:
        where = path(names.PLURAL, scene.namespace) + "?fieldValidation=Strict"
        created = scene.api.request("POST", where, body)
    except ApiError as error:
        if error.code in (400, 422):
            return error.message
        raise
    name = created["metadata"]["name"]

    def refused(status: Object) -> bool:
        return any(c["type"] == "Accepted" and c["status"] == "False" for c in status.get("conditions", []))

    status = scene.until(refused, "Accepted=False", name)
    assert status["phase"] == "Failed"
    assert any(c["type"] == "Finished" and c["status"] == "True" for c in status["conditions"])
    return str(next(c["message"] for c in status["conditions"] if c["type"] == "Accepted"))


@pytest.fixture(scope="module")
def bad_scene(new_scene: Any) -> Any:
    made = new_scene("bad-input")
    yield made
    made.close()


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("case", BAD, ids=lambda case: case.why)
def test_bad_manifest_is_refused_with_field_and_cure(bad_scene: Scene, case: Bad) -> None:
    message = refusal(bad_scene, manifest(case, f"bad-{BAD.index(case)}"))
    for fragment in case.expected:
        assert fragment in message, message


def test_next_job_is_served(bad_scene: Scene, operator: Operator) -> None:
    assert operator.probe("/healthz") == 200
    bad_scene.submit("good")
    assert bad_scene.succeed(name="good")["phase"] == "Succeeded"
    assert [j["metadata"]["labels"][names.LABEL_JOB] for j in bad_scene.api.list("jobs", bad_scene.namespace)] == [
        "good"
    ]


def test_table_is_long_and_its_cases_differ() -> None:
    assert len(BAD) >= 40
    assert len({case.why for case in BAD}) == len(BAD)


@pytest.mark.parametrize(("field", "change"), UNCHANGEABLE, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_fixed_after_creation_says_so(bad_scene: Scene, field: str, change: Object) -> None:
    name = field.replace(".", "-").lower()
    bad_scene.api.create(names.PLURAL, bad_scene.namespace, job(name, suspend=True))
    with pytest.raises(ApiError, match="cannot change after creation; delete the job and create a new one") as caught:
        bad_scene.change(name, **change)
    assert field in caught.value.message


@pytest.mark.parametrize(("field", "change"), OF_SUSPENDED, ids=[f"{f}-{n}" for n, (f, _) in enumerate(OF_SUSPENDED)])
def test_what_may_change_of_a_suspended_job_changes_of_no_other(
    bad_scene: Scene, operator: Operator, field: str, change: Object
) -> None:
    name = f"may-{OF_SUSPENDED.index((field, change))}"
    bad_scene.submit(name)
    bad_scene.attempt(1, name).run()
    bad_scene.phase("Running", name=name)
    words = (
        f"{field} may change only while the job is suspended: set spec.suspend to true, wait for the phase Suspended"
    )
    for together in ({}, {"suspend": True}):
        with pytest.raises(ApiError, match=words):
            bad_scene.change(name, **change, **together)
    bad_scene.change(name, suspend=True)
    bad_scene.phase("Suspended", name=name)
    changed = bad_scene.change(name, **change, suspend=False)
    assert merge(changed["spec"], change) == changed["spec"]
    bad_scene.attempt(2, name).run()
    with pytest.raises(ApiError, match=field):
        bad_scene.change(name, **{field.split(".")[1]: None})


def test_a_suspended_job_cannot_outgrow_its_claim(bad_scene: Scene, operator: Operator) -> None:
    for name, output in (("own", {}), ("named", {"claim": "shared-output"})):
        bad_scene.submit(name, suspend=True, output=output)
        bad_scene.phase("Suspended", name=name)
    with pytest.raises(ApiError, match="the claim that was made for the output can be mounted by one node only"):
        bad_scene.change("own", resources={"nodes": 2})
    assert bad_scene.change("named", resources={"nodes": 2})["spec"]["resources"]["nodes"] == 2


def test_removing_a_section_is_a_change_too(bad_scene: Scene) -> None:
    body = job("removal", suspend=True, grpo={"temperature": 0.5}, image="one", validationDataset={"name": "a/b"})
    bad_scene.api.create(names.PLURAL, bad_scene.namespace, body)
    for field in ("grpo", "image", "validationDataset"):
        with pytest.raises(ApiError, match=f"spec.{field} cannot change"):
            bad_scene.change("removal", **{field: None})


def test_null_where_a_value_was_is_a_change_too(bad_scene: Scene) -> None:
    bad_scene.submit("null", suspend=True)
    patch = '[{"op": "replace", "path": "/spec/training/maxGradNorm", "value": null}]'
    said = bad_scene.kubectl("patch", names.SHORT_NAME, "null", "--type=json", "-p", patch, check=False)
    assert "spec.training.maxGradNorm cannot change" in said


def test_what_may_change_does(bad_scene: Scene) -> None:
    bad_scene.api.create(names.PLURAL, bad_scene.namespace, job("free", suspend=True))
    changes: Object = {
        "backoffLimit": 7,
        "activeDeadlineSeconds": 60,
        "ttlSecondsAfterFinished": 3600,
        "output": {"serveUntil": "2100-01-01T00:00:00Z"},
    }
    changed = bad_scene.change("free", **changes)
    assert merge(changed["spec"], changes) == changed["spec"]
    meta = {"metadata": {"labels": {"a": "b"}, "annotations": {"c": "d"}}}
    bad_scene.api.patch(names.PLURAL, bad_scene.namespace, "free", meta)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [({"training": {"maxStep": 5}}, "maxStep"), ({"model": None}, "spec.model"), ({"reward": None}, "needs a reward")],
)
def test_kubectl_shows_the_refusal(bad_scene: Scene, change: Object, fragment: str) -> None:
    text = yaml.safe_dump(job("shown", **change))
    assert fragment in bad_scene.kubectl("apply", "-f", "-", stdin=text, check=False)


def test_large_manifest_within_the_limits_is_served(bad_scene: Scene) -> None:
    rows = [{"prompt": "p" * 90, "answer": "a"} for _ in range(5000)]
    bad_scene.submit("large", dataset={"inline": rows})
    assert bad_scene.succeed(name="large")["phase"] == "Succeeded"
