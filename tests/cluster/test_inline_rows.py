"""Rows within a job: few are examples, many are refused with the cure, and what is stored with many is still served."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from charts import Object
from cluster.api import ApiError, eventually
from cluster.manifests import job, result
from cluster.operator_process import Operator
from cluster.scene import Scene
from nemo_rl.backends.kubernetes.contents import _inline_bytes
from nemo_rl.job import names
from nemo_rl.job.crd import spec_schema
from nemo_rl.job.status import Cause

KINDS: dict[str, Any] = {
    "plain": "what is 2 + 2?",
    "quotes, lines and tabs": 'say "yes"\n\tor\\no \x01',
    "other letters": "été, 漢字, 🙂, \u200b\u00a0\u2028, \U000e0001",
    "numbers": [1, -7, 0.5, 1e-9, 12345678.25, 3.0],
    "truths and nothing": [True, False, None],
    "mappings": [{"role": "user", "content": "a, b: c"}, {}],
}


def refusal(scene: Scene, **spec: Any) -> str:
    """What the API server says to such a job; empty where it takes it."""
    where = f"/apis/{names.API_VERSION}/namespaces/{scene.namespace}/{names.PLURAL}?dryRun=All"
    try:
        scene.api.request("POST", where, job("dry", **spec))
    except ApiError as error:
        return error.message
    return ""


def filled(value: Any, size: int) -> list[Object]:
    """Rows of that value, as many as take so many bytes by our own count, filled up with letters."""
    rows = [{"prompt": "", "answer": value}]
    while _inline_bytes(rows) + 2000 < size:
        rows += rows[: max(1, (size - _inline_bytes(rows)) // (2 * _inline_bytes(rows) // len(rows)))]
    rows[-1] = {**rows[-1], "prompt": "a" * (size - _inline_bytes(rows))}
    assert _inline_bytes(rows) == size
    return rows


def test_the_policy_takes_what_our_client_sends_and_refuses_more_with_the_cure(
    scene: Scene, release: list[Object]
) -> None:
    limit = names.MAX_INLINE_ROWS
    much, enough = filled("4", limit + 1), filled("4", limit)
    found = eventually(lambda: refusal(scene, dataset={"inline": much}), "the policy is in force")
    for word in ("spec.dataset.inline takes 65537 bytes", "at most 65536", "spec.dataset.path", "nemo-rl train"):
        assert word in found, found
    assert "spec.validationDataset.inline takes 65537" in refusal(scene, validationDataset={"inline": much})
    assert refusal(scene, dataset={"inline": enough}, validationDataset={"inline": enough}) == ""
    largest = [{"prompt": "why?" * 30, "answer": str(n)} for n in range(10_000)]
    assert "spec.dataset.inline takes 1" in refusal(scene, dataset={"inline": largest}), "1.4 MB, all that is stored"
    for kind, value in KINDS.items():
        rows = filled(value, limit)
        more = [*rows, *rows]
        counted = int(re.search(r"takes (\d+) bytes", refusal(scene, dataset={"inline": more}))[1])  # type: ignore[index]
        assert counted <= _inline_bytes(more) <= 1.5 * counted, kind
        assert refusal(scene, dataset={"inline": rows}) == "", kind
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    assert refusal(scene, dataset={"inline": [{"prompt": "p", "x": deep}]}) == "", "the operator says what is too deep"
    _nulls_are_as_good_as_nothing(scene)


def _nulls_are_as_good_as_nothing(scene: Scene) -> None:
    """Templates write them, and send them by both ways of kubectl."""
    body, spec = job("nulls")["spec"], spec_schema()["properties"]
    body |= {name: None for name, field in spec.items() if "default" not in field and name not in body}
    for section in ("dataset", "reward", "output", "cache", "training", "resources"):
        fields = spec[section]["properties"]
        body[section] = {n: None for n, f in fields.items() if "default" not in f} | (body.get(section) or {})
    body["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": None, "value": None}]
    spread = {"topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "minDomains": None}
    body["topologySpreadConstraints"] = [spread]
    body["env"] = [{"name": "A", "value": "b", "valueFrom": None}]
    made = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": "nulls"}, "spec": body}
    scene.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(made))
    for section, field in (("output", "accessMode"), ("reward", "builtin")):
        if body[section][field] is None:
            del body[section][field]
    del body["imagePullPolicy"], body["tolerations"][0]["effect"]  # which server-side apply takes for a word
    scene.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=json.dumps(made))


def test_a_job_that_was_stored_with_more_is_served_to_its_end(
    scene: Scene, operator: Operator, request: pytest.FixtureRequest
) -> None:
    rows = [{"prompt": "why?" * 20, "answer": str(n)} for n in range(3000)]
    scene.submit(dataset={"inline": rows}, suspend=True)
    scene.phase("Suspended")
    request.getfixturevalue("release")
    eventually(lambda: refusal(scene, dataset={"inline": rows}), "the policy is in force")
    scene.change(suspend=False)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    frozen = json.loads(scene.api.get("configmaps", scene.namespace, names.frozen_job("x"))["data"][names.JOB_KEY])
    assert frozen["spec"]["dataset"]["inline"] == rows
    pod.exit(0, result())
    scene.phase("Succeeded")


def test_a_job_that_fits_into_no_config_map_is_refused_in_words(scene: Scene, operator: Operator) -> None:
    """Without the chart's policy; what the API server stores is larger than what the operator can freeze."""
    rows = [{"prompt": "why?" * 30, "answer": str(n)} for n in range(8000)]
    scene.submit(dataset={"inline": rows})
    status = scene.phase("Failed")
    assert status["failure"]["cause"] == Cause.INVALID_SPEC
    for word in ("spec.dataset.inline", "1048576", "spec.dataset.path"):
        assert word in status["message"], status
