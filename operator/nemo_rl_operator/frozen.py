"""The frozen job: what the pods of a job read, its digest in their arguments, and whether one that exists is the same."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from nemo_rl.job import names
from nemo_rl.job.changes import MUTABLE, MUTABLE_WHILE_SUSPENDED
from nemo_rl.job.reading import problems, read_frozen, read_spec
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl_operator.observe import Resource

Object = dict[str, Any]

JOB_VOLUME = "job"
"""Volume of a pod with the frozen job."""
LARGEST = 1024 * 1024
"""Bytes of a ConfigMap's data."""
SHORT = 32
"""Hexadecimal digits of a digest that stands in each status."""
MOST_STARTING = 2000
"""Jobs that start at once whose digests are kept."""
MOST_NAMED = 8
"""Fields that a message names."""


_ABSENT = object()

_started: OrderedDict[tuple[str, int], str] = OrderedDict()
"""Digests of jobs that start, by uid and generation."""

_newest: tuple[Resource, RLTrainingJobSpec, str] | None = None
"""The newest text: a start asks for it several times."""


def text(resource: Resource, spec: RLTrainingJobSpec) -> str:
    """The job as JSON: what its author said, and no defaults, so that a trainer image of another version has its own.

    What may change while the job lives is not in it: all attempts read the same.
    """
    global _newest
    if _newest is None or _newest[0] is not resource or _newest[1] is not spec:
        _newest = (resource, spec, _written(resource, spec))
    return _newest[2]


def _written(resource: Resource, spec: RLTrainingJobSpec) -> str:
    job = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": resource.name, "namespace": resource.namespace, "uid": resource.uid},
        "spec": _fixed(_said(json.loads(resource.spec), spec)),
    }
    return json.dumps(job, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def too_large(content: str) -> str:
    """Why the job fits into no ConfigMap, and the cure; empty where it does. The API server stores larger resources."""
    size = len(content.encode())
    if size <= LARGEST:
        return ""
    spec = json.loads(content)["spec"]
    field, part = max(spec.items(), key=lambda item: len(json.dumps(item[1])))
    where, cure = f"spec.{field}", "make it smaller"
    if isinstance(part, Mapping) and "inline" in part:
        where += ".inline"
        cure = f"put its rows into a file and name that in spec.{field}.path, or submit the job by nemo-rl train, which does so"
    return (
        f"the job takes {size} bytes, and its pods read at most {LARGEST} (a ConfigMap); most of it is {where}: {cure}"
    )


def digest(content: str) -> str:
    """By this a pod's program refuses any other content."""
    return hashlib.sha256(content.encode()).hexdigest()


def short_digest(content: str) -> str:
    """By this the operator knows again, by the status, what a job was when it started."""
    return digest(content)[:SHORT]


def started_digest(resource: Resource, spec: RLTrainingJobSpec) -> str:
    """That of a job that starts; asked for until the status has it, and computed once."""
    key = (resource.uid, resource.generation)
    if key not in _started:
        _started[key] = short_digest(text(resource, spec))
        if len(_started) > MOST_STARTING:
            _started.popitem(last=False)
    return _started[key]


def pin(body: Object, config_map: Object) -> Object:
    """A Job or pod that reads this ConfigMap: one of another version of the operator has other bytes, and that of a job
    that was changed meanwhile another name."""
    found = copy.deepcopy(body)
    pod = found["spec"]["template"]["spec"] if "template" in found["spec"] else found["spec"]
    volume = next(volume for volume in pod["volumes"] if volume["name"] == JOB_VOLUME)
    volume["configMap"]["name"] = config_map["metadata"]["name"]
    wanted, option = digest(config_map["data"][names.JOB_KEY]), f"{names.JOB_DIGEST_OPTION}="
    for container in pod["containers"]:
        if "args" in container:
            container["args"] = [option + wanted if a.startswith(option) else a for a in container["args"]]
        for variable in container["env"]:
            if variable["name"] == names.JOB_DIGEST_VARIABLE:
                variable["value"] = wanted
    return found


def difference(config_map: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """Where a ConfigMap that exists says something else than the one that the operator makes; empty where it does not.

    Both may be of different versions of the operator: what counts is what they mean here. A field that this version
    does not know counts where it is in the one that exists alone: then it did not come from the resource.
    """
    data = config_map.get("data") or {}
    if sorted(data) != [names.JOB_KEY] or config_map.get("binaryData"):
        return "its keys"
    if data == body["data"]:
        return ""
    try:
        found, wanted = json.loads(data[names.JOB_KEY]), json.loads(body["data"][names.JOB_KEY])
        if found["metadata"] != wanted["metadata"]:
            return "metadata"
        theirs, unknown = _meaning(found["spec"])
        ours, own_unknown = _meaning(wanted["spec"])
    except (ValueError, TypeError, KeyError, RecursionError, ValidationError):
        return "its form"
    place = _first_difference(theirs, ours)
    if place is not None:
        return f"spec{place}"
    strange = [path for path in unknown if path not in own_unknown or _at(found, path) != _at(wanted, path)]
    return strange[0] if strange else ""


def changed(config_map: Mapping[str, Any], body: Object) -> Object | None:
    """The frozen job of a job that was changed while it was suspended; None where what exists differs in something else.

    It is what exists, with what may change as the job has it now: so an attempt of a job that an earlier operator
    started goes on with all else. Its name has its digest.
    """
    try:
        found, wanted = json.loads(config_map["data"][names.JOB_KEY]), json.loads(body["data"][names.JOB_KEY])
        rest, other, now = found["spec"], copy.deepcopy(wanted["spec"]), wanted["spec"]
        for path in MUTABLE_WHILE_SUSPENDED:
            for spec in (rest, other):
                _replace(spec, path, _ABSENT)
        same = {**config_map, "data": {**config_map["data"], names.JOB_KEY: json.dumps(found)}}
        if difference(same, {**body, "data": {names.JOB_KEY: json.dumps(wanted | {"spec": other})}}):
            return None
        for path in MUTABLE_WHILE_SUSPENDED:
            _replace(rest, path, _value(now, path))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    content = json.dumps(found, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    name = names.frozen_job(found["metadata"]["name"], digest(content))
    return {**body, "metadata": body["metadata"] | {"name": name}, "data": {names.JOB_KEY: content}}


def unchanged(content: Mapping[str, Any], resource: Resource) -> tuple[Object | None, str]:
    """The specification with which a job goes on whose frozen job has this one, and what the resource has otherwise, in
    words. What may change is as the resource has it. None where nothing else was changed."""
    now, spec = json.loads(resource.spec), copy.deepcopy(dict(content))
    for path in (*MUTABLE, *MUTABLE_WHILE_SUSPENDED):
        if path != "spec.rollout.replicas" or _ABSENT not in (_value(spec, path), _value(now, path)):
            _replace(spec, path, _value(now, path))
    try:
        before = _meaning(spec)[0]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None, ""
    try:
        after = _fixed(read_spec(now).spec.model_dump(mode="json", by_alias=True))
    except ValidationError as error:
        return spec, problems(error)
    paths = _differences(before, after, "spec")
    named = ", ".join(paths[:MOST_NAMED]) + (f" and {more} more" if (more := len(paths) - MOST_NAMED) > 0 else "")
    return (spec, named) if paths else (None, "")


def _differences(one: Any, other: Any, path: str) -> list[str]:
    """Paths of all values that differ; a list counts as one value."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(name, one.get(name, _ABSENT), other.get(name, _ABSENT)) for name in sorted({*one, *other})]
        return [found for name, left, right in pairs for found in _differences(left, right, f"{path}.{name}")]
    return [] if one == other and type(one) is type(other) else [path]


def _value(spec: Any, path: str) -> Any:
    for name in path.split(".")[1:]:
        if not isinstance(spec, Mapping) or name not in spec:
            return _ABSENT
        spec = spec[name]
    return spec


def _replace(spec: Any, path: str, value: Any) -> None:
    """Set a field of the specification, or take it away."""
    *sections, last = path.split(".")[1:]
    for name in sections:
        if name not in spec and value is _ABSENT:
            return
        spec = spec.setdefault(name, {})
    if value is _ABSENT:
        spec.pop(last, None)
    else:
        spec[last] = value


def _meaning(content: Any) -> tuple[Object, tuple[str, ...]]:
    """A specification with all defaults, and the paths of fields in it that are not known here."""
    found = read_frozen(content)
    return _fixed(found.spec.model_dump(mode="json", by_alias=True)), found.unknown


def _at(job: Any, path: str) -> Any:
    found = job
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def _fixed(spec: Object) -> Object:
    """The specification without the fields that may change while the job lives."""
    found = copy.deepcopy(spec)
    for path in MUTABLE:
        *sections, last = path.split(".")[1:]
        section: Any = found
        for name in sections:
            section = section.get(name) or {}
        if section.pop(last, None) is not None and path == "spec.rollout.replicas":
            section[last] = 1  # that there are some never changes, and how many a trainer sees for itself
    return {name: value for name, value in found.items() if value != {} or spec.get(name) == {}}


def _first_difference(one: Any, other: Any) -> str | None:
    """Path of the first value that differs, beginning with a dot or bracket where it is not the whole; None if equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(f".{name}", one.get(name, _ABSENT), other.get(name, _ABSENT)) for name in sorted({*one, *other})]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"[{place}]", left, right) for place, (left, right) in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other and type(one) is type(other) else ""
    for name, left, right in pairs:
        below = _first_difference(left, right)
        if below is not None:
            return name + below
    return None


def _said(content: Mapping[str, Any], spec: RLTrainingJobSpec) -> dict[str, Any]:
    """What `content` says beyond the defaults, as camelCase JSON; `spec` is what was read from it.

    Fields that this version does not know stay as they are.
    """
    return _merged(
        spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        _unknown(content, spec.model_dump(mode="json", by_alias=True)),
    )


def _unknown(content: Any, known: Any) -> Any:
    """The part of `content` that is not in `known`, in the same shape; empty where there is none."""
    if not isinstance(content, Mapping) or not isinstance(known, Mapping):
        return {}
    found = {}
    for name, value in content.items():
        if name not in known:
            found[name] = value
        elif below := _unknown(value, known[name]):
            found[name] = below
    return found


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(one)
    for name, value in other.items():
        before = found.get(name)
        found[name] = _merged(before or {}, value) if isinstance(value, Mapping) and name in found else value
    return found
