"""Readers tolerate what another version wrote; nothing that a user writes is nested too deep to read."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nemo_rl.job import decode, names
from nemo_rl.job.manifest import ManifestError, parse_manifest
from nemo_rl.job.reading import problems, read_spec, salvage_spec
from nemo_rl.job.spec import RLTrainingJobSpec

SPEC: dict[str, Any] = {
    "model": "org/model",
    "dataset": {"inline": [{"prompt": "1", "answer": "2"}]},
    "reward": {"builtin": "exact_match"},
    "training": {"maxSteps": 5},
    "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
    "bundles": [{"name": "b", "sha256": "0" * 64, "configMaps": ["b-0"]}],
    "tolerations": [{"key": "gpu"}],
    "resources": {"nodes": 2},
}
PLACES: list[tuple[str | int, ...]] = [
    (),
    ("dataset",),
    ("reward",),
    ("training",),
    ("env", 0),
    ("env", 0, "valueFrom"),
    ("env", 0, "valueFrom", "secretKeyRef"),
    ("bundles", 0),
    ("tolerations", 0),
    ("resources",),
]


def with_field(places: list[tuple[str | int, ...]], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(SPEC)
    for path in places:
        here: Any = found
        for part in path:
            here = here[part]
        here["fromTheFuture"] = value
    return found


@given(
    places=st.lists(st.sampled_from(PLACES), unique=True),
    value=st.none() | st.booleans() | st.integers() | st.text() | st.dictionaries(st.text(), st.text()),
)
def test_unknown_fields_are_left_out_and_named_wherever_they_stand(
    places: list[tuple[str | int, ...]], value: Any
) -> None:
    given_spec = with_field(places, value)
    before = copy.deepcopy(given_spec)
    found = read_spec(given_spec)
    assert found.spec == RLTrainingJobSpec.model_validate(SPEC)
    assert set(found.unknown) == {".".join(["spec", *map(str, path), "fromTheFuture"]) for path in places}
    assert given_spec == before, "what was given is not changed"


def test_a_writer_refuses_what_a_reader_tolerates() -> None:
    with pytest.raises(ValidationError, match="fromTheFuture"):
        RLTrainingJobSpec.model_validate(with_field([()], 1))


def test_an_unknown_field_does_not_hide_a_wrong_one() -> None:
    with pytest.raises(ValidationError) as caught:
        read_spec(with_field([("training",)], 1) | {"backoffLimit": -1})
    assert "spec.backoffLimit: Input should be greater than or equal to 0" in problems(caught.value)
    assert "fromTheFuture" not in problems(caught.value)


def test_a_running_job_with_values_of_the_future_keeps_what_can_be_read() -> None:
    future = copy.deepcopy(SPEC) | {"algorithm": "newest", "backoffLimit": 7, "suspend": True, "output": "elsewhere"}
    with pytest.raises(ValidationError):
        read_spec(future)
    kept = salvage_spec(future)
    assert (kept.resources.nodes, kept.backoff_limit, kept.suspend) == (2, 7, True)
    assert kept.output == RLTrainingJobSpec.model_validate(SPEC).output


@pytest.mark.parametrize("value", [[], "text", None, {"resources": None}, {"": {}}])
def test_nothing_that_is_salvaged_raises(value: Any) -> None:
    assert salvage_spec(value if isinstance(value, dict) else {"training": value}).model == "unreadable"


def test_limits_on_writers_do_not_hold_for_what_is_there() -> None:
    many = [{"name": f"b{i}", "sha256": "0" * 64, "configMaps": [f"b{i}-{j}" for j in range(32)]} for i in range(3)]
    with pytest.raises(ValidationError, match=f"96 parts together; at most {names.MAX_BUNDLE_PARTS}"):
        RLTrainingJobSpec.model_validate(SPEC | {"bundles": many})
    assert len(read_spec(SPEC | {"bundles": many}).spec.bundles) == 3


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize("depth", [10, 500, 990, 1500, 5000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"]":', "}]")])
def test_any_depth_is_decoded(depth: int, opening: str, closing: str) -> None:
    text = '{"before":"]}\\"[","deep":' + nested(depth, opening, closing) + ',"after":[1,{"b":"{["}]}'
    found = decode.loads(text.encode())
    assert (found["before"], found["after"]) == (']}"[', [1, {"b": "{["}])
    assert decode.too_deep(found["deep"]) is (depth > names.MAX_NESTING // 2 + 5)
    assert decode.loads(text) == found


def test_several_deep_values_are_cut_and_the_rest_is_whole() -> None:
    text = "[" + ",".join([nested(3000), '"x"', nested(3000), "2"]) + "]"
    found = decode.loads(text)
    assert (found[1], found[3]) == ("x", 2)


def levels(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(levels, inner), default=0)


TEXT = st.text() | st.text('{}[]\\"')


@given(st.recursive(st.none() | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x), max_leaves=30))
def test_what_is_not_deep_is_decoded_as_ever(value: Any) -> None:
    text = json.dumps(value, separators=(",", ":"))
    assert decode.loads(text) == value
    assert b"".join(decode._cut(text.encode(), 1000)).decode() == text


@given(
    st.recursive(st.none() | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x), max_leaves=30), st.integers(0, 9)
)
def test_how_deep_a_text_is_nested_is_told_without_reading_it(value: Any, limit: int) -> None:
    assert decode.deeper(json.dumps(value).encode(), limit) is (levels(value) > limit)


@pytest.mark.parametrize("text", ["", "{", "[1,", nested(2000)[:-5], '"'])
def test_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode.loads(text)


@pytest.mark.parametrize("where", ["inline", "affinity"])
def test_rows_and_affinity_may_not_be_nested_without_bound(where: str) -> None:
    def spec(depth: int) -> dict[str, Any]:
        value = {"a": json.loads(nested(depth))}
        return SPEC | ({"affinity": value} if where == "affinity" else {"dataset": {"inline": [{"p": 1}, value]}})

    RLTrainingJobSpec.model_validate(spec(names.MAX_NESTING - 1))
    with pytest.raises(ValidationError, match="nested more than 32 levels deep"):
        RLTrainingJobSpec.model_validate(spec(names.MAX_NESTING + 1))


HEAD = "apiVersion: nemo-rl.io/v1alpha1\nkind: RLTrainingJob\nmetadata: {name: x}\nspec:\n  model: m\n  reward: {builtin: length}\n"


@pytest.mark.parametrize("depth", [40, 300, 1500, 20_000])
def test_a_deep_manifest_is_told_in_a_sentence(depth: int) -> None:
    text = HEAD + "  dataset:\n    inline:\n    - a: " + nested(depth)
    with pytest.raises(ManifestError, match=r"nested .*(too deep|more than 32 levels)"):
        parse_manifest(text)
    document = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": "x"}}
    as_json = json.dumps(document | {"spec": SPEC | {"dataset": {"inline": [{"a": 0}]}}})
    with pytest.raises(ManifestError, match=r"nested .*(too deep|more than 32 levels)"):
        parse_manifest("{\t" + as_json[1:].replace('"a": 0', '"a": ' + nested(depth)))
