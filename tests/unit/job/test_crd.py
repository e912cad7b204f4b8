"""The CRD: what is in the repository is what the models say, and it stays within what a cluster takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from nemo_rl.job import changes, names
from nemo_rl.job.changes import MUTABLE, MUTABLE_WHILE_SUSPENDED
from nemo_rl.job.crd import (
    UnsupportedSchemaError,
    crd,
    crd_yaml,
    spec_schema,
    structural,
)

FILE = Path(__file__).parents[3] / "crds" / "nemo-rl.io_rltrainingjobs.yaml"


def schema() -> dict[str, Any]:
    return crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def leaves(node: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, node)]
    for name, child in node.get("properties", {}).items():
        found += leaves(child, f"{path}.{name}")
    if isinstance(node.get("items"), dict):
        found += leaves(node["items"], f"{path}[]")
    return found


def test_the_file_in_the_repository_is_the_generated_one() -> None:
    assert FILE.read_text() == crd_yaml(), "run: nemo-rl crd > crds/nemo-rl.io_rltrainingjobs.yaml"


def test_it_is_below_200_kilobytes() -> None:
    assert len(crd_yaml().encode()) < 200_000


def test_every_field_is_described() -> None:
    properties = schema()["properties"]
    missing = [
        path
        for part in ("spec", "status")
        for path, node in leaves(properties[part], part)
        if not path.endswith("[]") and not node.get("description")
    ]
    assert missing == []


def test_no_rule_of_the_definition_is_about_changes() -> None:
    """Each would be evaluated at every write of a status, which changes nothing of the specification."""
    assert [
        path
        for path, node in leaves(schema())
        for rule in node.get("x-kubernetes-validations", ())
        if "oldSelf" in rule["rule"]
    ] == []


def test_the_policy_comes_with_the_definition() -> None:
    kinds = [found["kind"] for found in yaml.safe_load_all(FILE.read_text())]
    assert kinds == ["CustomResourceDefinition", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]
    rule = changes.policy(spec_schema())["spec"]["matchConstraints"]["resourceRules"]
    assert [r["resources"] for r in rule] == [[names.PLURAL]], "and no write of a status meets it"


def test_only_the_named_fields_may_change() -> None:
    outside_lists = ("spec.suspend", "spec.backoffLimit", "spec.activeDeadlineSeconds", "spec.ttlSecondsAfterFinished")
    assert {*outside_lists, "spec.output.serveUntil", "spec.rollout.replicas", "spec.budget"} == MUTABLE
    known = {path for path, _ in leaves(spec_schema(), "spec")}
    assert {*MUTABLE, *MUTABLE_WHILE_SUSPENDED} <= known
    variables = {v["name"]: v["expression"] for v in changes.policy(spec_schema())["spec"]["variables"]}
    for field in (*MUTABLE, *MUTABLE_WHILE_SUSPENDED):
        assert f"'{field}'" in variables["fixed"]
    for field in MUTABLE_WHILE_SUSPENDED:
        assert f"'{field}'" in variables["ofSuspended"]


def test_rules_are_the_same_each_time_they_are_made() -> None:
    assert crd() == crd()


def test_columns_categories_and_status() -> None:
    definition = crd()["spec"]
    version = definition["versions"][0]
    shown = [c["name"].upper() for c in version["additionalPrinterColumns"] if not c.get("priority")]
    wide = [c["name"].upper() for c in version["additionalPrinterColumns"] if c.get("priority")]
    assert shown == ["ALGO", "MODEL", "PHASE", "STEP", "SCORE", "ETA", "AGE"]
    assert wide == ["GPUS", "QUEUE", "ATTEMPT", "REPLICAS", "WAITS-FOR", "REASON", "CHECKPOINT"]
    assert definition["names"]["shortNames"] == [names.SHORT_NAME]
    assert definition["names"]["categories"] == ["ml"]
    assert set(version["subresources"]) == {"status", "scale"}
    assert version["subresources"]["scale"]["specReplicasPath"] == ".spec.rollout.replicas"


def test_null_is_allowed_where_python_allows_none() -> None:
    training = spec_schema()["properties"]["training"]["properties"]
    assert training["maxGradNorm"]["nullable"]
    assert training["maxGradNorm"]["default"] == 1.0
    assert "nullable" not in training["maxSteps"]


class Recursive(BaseModel):
    child: Recursive | None = None


class Union(BaseModel):
    value: int | str


class Pair(BaseModel):
    value: tuple[int, str]


@pytest.mark.parametrize("model", [Recursive, Union, Pair])
def test_what_a_structural_schema_cannot_say_is_refused(model: type[BaseModel]) -> None:
    with pytest.raises(UnsupportedSchemaError, match=r"\$"):
        structural(model.model_json_schema())
