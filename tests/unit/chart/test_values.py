"""Values that cannot be meant are refused before anything is installed, in words that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import CHART, helm

WRONG: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a name that is not there": ({"replicas": 2}, ("replicas", "not allowed")),
    "a typo in a section": ({"image": {"repo": "x"}}, ("/image", "repo", "not allowed")),
    "a typo two levels down": ({"metrics": {"rules": {"enable": True}}}, ("/metrics/rules", "enable")),
    "a tag of latest": ({"image": {"tag": "latest"}}, ("/image/tag",)),
    "a trainer image of latest": ({"trainerImage": {"tag": "latest"}}, ("/trainerImage/tag",)),
    "a tag in the repository": ({"image": {"repository": "registry.example.com/op:1.0"}}, ("/image/repository",)),
    "a short digest": ({"image": {"digest": "sha256:abc"}}, ("/image/digest", "pattern")),
    "a pull policy in lower case": ({"image": {"pullPolicy": "always"}}, ("/image/pullPolicy", "Always")),
    "namespaces as a text": ({"watchNamespaces": "ml"}, ("/watchNamespaces", "array")),
    "a namespace in capitals": ({"watchNamespaces": ["ML"]}, ("/watchNamespaces/0", "ML")),
    "a namespace twice": ({"watchNamespaces": ["ml", "ml"]}, ("/watchNamespaces",)),
    "workers as a text": ({"operator": {"workers": "16"}}, ("/operator/workers", "integer")),
    "no workers": ({"operator": {"workers": 0}}, ("/operator/workers", "1")),
    "an unknown log level": ({"operator": {"logLevel": "verbose"}}, ("/operator/logLevel", "debug")),
    "an unknown log format": ({"operator": {"logFormat": "yaml"}}, ("/operator/logFormat", "json")),
    "a memory that is no quantity": ({"resources": {"limits": {"memory": "lots"}}}, ("/resources/limits/memory",)),
    "limits at the wrong place": ({"resources": {"memory": "1Gi"}}, ("/resources", "memory")),
    "a switch that is a text": ({"crds": {"enabled": "yes"}}, ("/crds/enabled", "boolean")),
    "a label that is a number": ({"podLabels": {"team": 7}}, ("/podLabels/team", "string")),
    "a pull secret without name": ({"imagePullSecrets": ["regcred"]}, ("/imagePullSecrets/0", "object")),
    "images as a text": ({"admissionPolicy": {"allowedImages": "ghcr.io/"}}, ("/admissionPolicy/allowedImages",)),
    "an image that ends a rule": ({"admissionPolicy": {"allowedImages": ["a'b"]}}, ("/admissionPolicy",)),
    "an interval without unit": ({"metrics": {"serviceMonitor": {"interval": "30"}}}, ("/serviceMonitor/interval",)),
    "a priority class without value": ({"priorityClasses": [{"name": "low"}]}, ("/priorityClasses/0", "value")),
    "a priority above users' own": ({"priorityClasses": [{"name": "x", "value": 2000000000}]}, ("/priorityClasses/0",)),
    "a priority class of the system": (
        {"priorityClasses": [{"name": "system-x", "value": 1}]},
        ("/priorityClasses/0",),
    ),
    "an unknown peer": ({"networkPolicy": {"metricsFrom": [{"pods": {}}]}}, ("/networkPolicy/metricsFrom/0", "pods")),
    "a toleration's typo": ({"tolerations": [{"efect": "NoSchedule"}]}, ("/tolerations/0", "efect")),
    "no time for the test's job": ({"tests": {"trainSeconds": 1}}, ("/tests/trainSeconds", "10")),
    "a long name": ({"fullnameOverride": "x" * 51}, ("/fullnameOverride", "50")),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_value_is_refused_with_its_place(what: str):
    values, fragments = WRONG[what]
    result = helm("template", "rl", str(CHART), values=values)
    assert result.returncode != 0, result.stdout[:500]
    message = result.stderr.replace(".", "/")
    for fragment in fragments:
        assert fragment.replace(".", "/") in message, result.stderr
    assert "values don't meet the specifications of the schema" in result.stderr
    assert len(result.stderr) < 1000, result.stderr


def test_every_value_is_in_the_schema_and_every_name_of_the_schema_has_a_default():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(node: dict[str, Any], value: Any, path: str) -> None:
        assert node.get("additionalProperties") is False, f"{path or '/'} takes any name"
        assert set(value) == set(node["properties"]) - {"global"}, path
        for name, child in node["properties"].items():
            if "properties" in child:
                compare(child, value[name], f"{path}/{name}")

    def skip_quantities(node: dict[str, Any]) -> dict[str, Any]:
        return {
            **node,
            "properties": {n: c for n, c in node["properties"].items() if n not in ("affinity", "resources")},
        }

    trimmed = skip_quantities(schema)
    trimmed["properties"]["tests"] = skip_quantities(schema["properties"]["tests"])
    values["tests"].pop("resources")
    compare(trimmed, {k: v for k, v in values.items() if k not in ("affinity", "resources")}, "")


def test_the_chart_can_be_part_of_another(tmp_path: Path):
    outer = tmp_path / "outer"
    (outer / "charts").mkdir(parents=True)
    (outer / "charts" / "nemo-rl-operator").symlink_to(CHART)
    (outer / "Chart.yaml").write_text("apiVersion: v2\nname: outer\nversion: 1.0.0\n")
    result = helm("template", "rl", str(outer), values={"global": {"registry": "x"}})
    assert result.returncode == 0, result.stderr
    assert "kind: Deployment" in result.stdout
