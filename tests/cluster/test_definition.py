"""Words and null in the definition: what the API server says to them, and kubectl where it validates by itself.

kubectl leaves validation to the server, but where it cannot tell that the server does it: while a server publishes no schema of a
kind that is new to it, and always for a manifest of the kind `List`, by which it is made to here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster.api import ApiError, Object, eventually, path
from cluster.manifests import job
from cluster.scene import Scene
from cluster.server import CRDS, Cluster
from nemo_rl.job import names
from nemo_rl.job.crd import crd, spec_schema
from nemo_rl.job.spec import RLTrainingJobSpec

Place = tuple[str, ...]
DEFINITION = [document for file in CRDS.glob("*.yaml") for document in yaml.safe_load_all(file.read_text())]


def enums(node: Object, at: Place = ()) -> Iterator[tuple[Place, Object]]:
    """Every field of the schema that takes one of several words; `[]` stands for the items of a list."""
    if "enum" in node:
        yield at, node
    for name, child in node.get("properties", {}).items():
        yield from enums(child, (*at, name))
    if isinstance(node.get("items"), dict):
        yield from enums(node["items"], (*at, "[]"))


ENUMS = list(enums(spec_schema()))
FIRST = {"tolerations": {"key": "gpu"}, "topologySpreadConstraints": {"topologyKey": "zone"}, "volumes": {"name": "v"}}
"""What an item of these lists has besides."""
NULLED = {
    "reward": {"builtin": None, "source": "def reward(p):\n    return 0.0\n", "entrypoint": "reward"},
    "grpo": {"advantageStatistics": None, "lossType": None},
    "output": {"accessMode": None},
    "imagePullPolicy": None,
    "onNodeLost": None,
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": None}],
}
"""Null where Python has None, and where there is a default."""


def put(spec: Object, at: Place, value: Any) -> Object:
    """The specification with this value at this place, and what must stand beside it."""
    head, *rest = at
    if not rest:
        return {**spec, head: value}
    if rest[0] == "[]":
        item = put(FIRST[head], tuple(rest[1:]), value) if rest[1:] else value
        return {**spec, head: [item]}
    return {**spec, head: put(spec.get(head) or {}, tuple(rest), value)}


def by_kubectl(cluster: Cluster, *documents: Object) -> str:
    """What kubectl says that looks at these objects by itself, by the schemas that the server publishes."""
    text = yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [*documents]})
    words = ("create", "--dry-run=client", "--validate=strict", "-f", "-")
    return cluster.kubectl(*words, stdin=text, check=False)


@pytest.fixture(scope="module")
def enum_scene(new_scene: Any) -> Iterator[Scene]:
    made = new_scene("enums")
    yield made
    made.close()


def nulled(name: str) -> Object:
    made = job(name, suspend=True)
    made["spec"] |= copy.deepcopy(NULLED)
    return made


def test_kubectl_finds_nothing_wrong_with_the_definition(cluster: Cluster) -> None:
    said = by_kubectl(cluster, *DEFINITION)
    for document in DEFINITION:
        kind, name = document["kind"], document["metadata"]["name"]
        assert re.search(rf"^{kind.lower()}\.\S+/{re.escape(name)} created \(dry run\)$", said, re.MULTILINE), said


def test_kubectl_would_refuse_null_among_words(cluster: Cluster) -> None:
    """The control of the test above: this is what it would have said."""
    definition = crd()
    properties = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    properties["imagePullPolicy"]["enum"].append(None)
    said = by_kubectl(cluster, definition)
    assert 'unknown object type "nil"' in said
    assert "imagePullPolicy.enum[3]" in said


def test_kubectl_takes_null_for_a_word(cluster: Cluster) -> None:
    wrong = nulled("null")
    wrong["spec"]["training"] = {"maxStep": 5}
    # until the schema is published, kubectl would take anything
    eventually(lambda: 'unknown field "maxStep"' in by_kubectl(cluster, wrong), "kubectl knows the schema")
    said = by_kubectl(cluster, nulled("null"))
    assert "null created (dry run)" in said, said


def test_the_server_takes_null_for_a_word_as_nothing(enum_scene: Scene) -> None:
    where = path(names.PLURAL, enum_scene.namespace) + "?fieldValidation=Strict"
    created = enum_scene.api.request("POST", where, nulled("null"))["spec"]
    assert "builtin" not in created["reward"]
    assert "advantageStatistics" not in created["grpo"]
    assert "accessMode" not in created["output"]
    assert "imagePullPolicy" not in created
    assert created["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert (created["grpo"]["lossType"], created["onNodeLost"]) == ("dapo", "wait"), "the defaults"
    read = RLTrainingJobSpec.model_validate(created)
    assert (read.image_pull_policy, read.output.access_mode, read.tolerations[0].effect) == (None, None, None)


@pytest.mark.parametrize(("at", "node"), ENUMS, ids=[".".join(at) for at, _ in ENUMS])
def test_another_word_is_refused_with_those_that_there_are(enum_scene: Scene, at: Place, node: Object) -> None:
    body = job("words", suspend=True)
    body["spec"] = put(body["spec"], at, "nonsense")
    where = path(names.PLURAL, enum_scene.namespace) + "?dryRun=All&fieldValidation=Strict"
    with pytest.raises(ApiError) as caught:
        enum_scene.api.request("POST", where, body)
    field = re.escape(".".join(("spec", *at))).replace(r"\.\[\]", r"\[0\]")
    supported = ", ".join(f'"{word}"' for word in node["enum"])
    assert re.search(
        rf'{field}: Unsupported value: "nonsense": supported values: {re.escape(supported)}', str(caught.value)
    )


def test_no_word_of_the_definition_is_null() -> None:
    """Which kubectl and the API server would find for no null: both take it where nothing says that it is allowed, as nothing."""
    found = [*ENUMS, *enums(crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"])]
    assert len(found) > 30
    assert [at for at, node in found if None in node["enum"] or node.get("nullable")] == []
