"""The CRD: what is in the repository is what the models say, and it stays within what a cluster takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from nemo_rl.job import names
from nemo_rl.job.crd import (
    MUTABLE,
    MUTABLE_WHILE_SUSPENDED,
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


def rules(node: dict[str, Any]) -> list[str]:
    return [rule["rule"] for rule in node.get("x-kubernetes-validations", [])]


def free(node: dict[str, Any], path: str) -> set[str]:
    """Fields that may change, or come and go, by the rules of the schema."""
    found = set()
    for name, child in node["properties"].items():
        where = f"{path}.{name}"
        always_there = name in node.get("required", ()) or ("default" in child and not child.get("nullable"))
        if not always_there and f"has(self.{name}) == has(oldSelf.{name})" not in rules(node):
            found.add(where)
        if "properties" in child:
            found |= free(child, where)
        elif "self == oldSelf" not in rules(child):
            found.add(where)
    return found


def test_only_the_named_fields_may_change() -> None:
    open_to_the_section = free(spec_schema(), "spec")
    of_suspended = {f for f in open_to_the_section if f.startswith(("spec.resources.", *MUTABLE_WHILE_SUSPENDED))}
    within = {field for field in open_to_the_section if field.startswith(tuple(f"{path}." for path in MUTABLE))}
    assert open_to_the_section - of_suspended - within == MUTABLE
    guarded = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"]
    for field in MUTABLE_WHILE_SUSPENDED:
        assert any(field in rule["rule"] and "'Suspended'" in rule["rule"] for rule in guarded), field
    outside_lists = ("spec.suspend", "spec.backoffLimit", "spec.activeDeadlineSeconds", "spec.ttlSecondsAfterFinished")
    assert {*outside_lists, "spec.output.serveUntil", "spec.rollout.replicas", "spec.budget"} == MUTABLE


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
