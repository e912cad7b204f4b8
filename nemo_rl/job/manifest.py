"""The YAML form of a job: reading an RLTrainingJob with errors that say where, overriding fields, and printing it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from nemo_rl.job import decode, names
from nemo_rl.job.foreign import meaning_of, nearest
from nemo_rl.job.spec import SECTIONS, ResourcesSpec, RLTrainingJobSpec, TrainingSpec
from nemo_rl.job.text import problem_of

_TOP_LEVEL = ("apiVersion", "kind", "metadata", "spec", "status")
_METADATA = ("name", "namespace", "labels", "annotations")
# Written by the API server; present in what `kubectl get -o yaml` prints, and of no meaning in a manifest.
_SERVER_METADATA = {
    "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp", "finalizers", "generateName", "generation",
    "managedFields", "ownerReferences", "resourceVersion", "selfLink", "uid",
}  # fmt: skip
_PATH = tuple[str | int, ...]


class ManifestError(ValueError):
    """A manifest cannot be used. One line per problem: file:line: path: what was found, what was expected."""


@dataclass(frozen=True)
class Manifest:
    """One RLTrainingJob, checked."""

    name: str
    spec: RLTrainingJobSpec
    namespace: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The resource as the API server takes it: camelCase, only the fields that were given, null only where it says more."""
        metadata: dict[str, Any] = {"name": self.name}
        given = {"namespace": self.namespace, "labels": self.labels, "annotations": self.annotations}
        metadata.update({key: value for key, value in given.items() if value})
        spec = _said(self.spec, self.spec.model_dump(mode="json", by_alias=True, exclude_unset=True))
        return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata, "spec": spec}

    def to_yaml(self) -> str:
        """The resource as YAML that `kubectl apply -f -` takes; texts of several lines are written as blocks."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _said(model: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
    """What was dumped of a model, without nulls that say what absence says."""
    found = {}
    for name, about in type(model).model_fields.items():
        alias = about.alias or name
        if alias not in dumped or (dumped[alias] is None and about.default is None):
            continue
        value, given = getattr(model, name), dumped[alias]
        if isinstance(value, BaseModel):
            given = _said(value, given)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            given = [_said(one, written) for one, written in zip(value, given, strict=True)]
        found[alias] = given
    return found


def load_manifest(path: str | Path, overrides: Iterable[str] = ()) -> Manifest:
    """Reads the one RLTrainingJob of a YAML or JSON file. ManifestError with file, line and field of each problem."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}; give the path of a job's YAML file") from None
    except UnicodeDecodeError:
        raise ManifestError(f"{path}: is not UTF-8 text; give the path of a job's YAML file") from None
    return parse_manifest(text, source=str(path), overrides=overrides)


def parse_manifest(text: str, *, source: str = "job.yaml", overrides: Iterable[str] = ()) -> Manifest:
    """Reads the one RLTrainingJob of a YAML or JSON text.

    `overrides` are "training.maxSteps=10" texts: a path within spec (or metadata.…) and a YAML value. ManifestError
    with line and field of each problem.
    """
    document, lines = _the_job(text, source)
    reader = _Reader(source, document, lines)
    for override in overrides:
        reader.override(override)
    return reader.manifest()


def name_problem(name: object) -> str | None:
    """Why `name` cannot name a job, or None: a DNS-1035 label of at most 50 characters."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        return "must be lower-case letters, digits and '-', starting with a letter and not ending with '-'"
    if len(name) > names.MAX_NAME_LENGTH:
        return f"has {len(name)} characters; at most {names.MAX_NAME_LENGTH} are allowed"
    return None


def namespace_problem(namespace: object) -> str | None:
    """Why `namespace` cannot name a namespace, or None: a DNS-1123 label."""
    if not isinstance(namespace, str) or not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", namespace):
        return "must be at most 63 lower-case letters, digits and '-', not starting or ending with '-'"
    return None


@dataclass
class _Reader:
    """One document on its way to a Manifest, with the line of each of its fields."""

    source: str
    document: dict[str, Any]
    lines: dict[_PATH, int]
    overridden: set[_PATH] = field(default_factory=set)

    def fail(self, path: _PATH, problem: str) -> ManifestError:
        return ManifestError(self.say(path, problem))

    def say(self, path: _PATH, problem: str) -> str:
        """`file:line: path: problem`, with the line of the nearest field that is in the file."""
        where = self.source
        if any(path[: len(o)] == o for o in self.overridden):
            where = "--set"
        else:
            known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)
            where += f":{self.lines[known]}" if known is not None else ""
        return f"{where}: {_dotted(path)}: {problem}" if path else f"{where}: {problem}"

    def override(self, text: str) -> None:
        """Applies one `path=value`; missing sections on the way are made."""
        dotted, equals, value = text.partition("=")
        if not equals or not all(dotted.split(".")):
            raise ManifestError(f"--set {text}: expected path=value, like training.maxSteps=10")
        path: list[str | int] = [int(part) if part.isdigit() else part for part in dotted.strip().split(".")]
        if path[0] not in ("spec", "metadata"):
            path.insert(0, "spec")
        try:
            parsed = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError:
            raise ManifestError(f"--set {text}: the value is no YAML; quote it, like {dotted}='\"…\"'") from None
        here: Any = self.document
        for depth, part in enumerate(path[:-1]):
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
            here = self._step(here, part, tuple(path[: depth + 1]), text)
        if isinstance(here, list):
            self._step(here, path[-1], tuple(path), text)
        elif not isinstance(here, dict):
            raise ManifestError(f"--set {text}: {_dotted(tuple(path[:-1]))} has no fields")
        here[path[-1]] = parsed
        self.overridden.add(tuple(path))

    @staticmethod
    def _step(here: Any, part: str | int, path: _PATH, text: str) -> Any:
        try:
            return here[part]
        except (KeyError, IndexError, TypeError):
            raise ManifestError(f"--set {text}: there is no {_dotted(path)} in the job") from None

    def manifest(self) -> Manifest:
        for key in self.document:
            if key not in _TOP_LEVEL:
                raise self.fail((key,), f"unknown field{_nearest(key, _TOP_LEVEL)}")
        metadata = self.document.get("metadata")
        if not isinstance(metadata, dict):
            raise self.fail(("metadata",), "missing; give metadata with a name")
        self._check_metadata(metadata)
        if not isinstance(self.document.get("spec"), dict):
            raise self.fail(("spec",), "missing; give spec with at least model and dataset")
        return Manifest(
            name=metadata["name"],
            namespace=metadata.get("namespace"),
            labels=metadata.get("labels") or {},
            annotations=metadata.get("annotations") or {},
            spec=self._spec(self.document["spec"]),
        )

    def _check_metadata(self, metadata: dict[str, Any]) -> None:
        for key in metadata:
            if key not in _METADATA and key not in _SERVER_METADATA:
                raise self.fail(("metadata", key), f"unknown field{_nearest(key, _METADATA)}")
        if "name" not in metadata:
            raise self.fail(("metadata", "name"), "missing; every job has a name")
        if problem := name_problem(metadata["name"]):
            raise self.fail(("metadata", "name"), f"{metadata['name']!r} {problem}")
        namespace = metadata.get("namespace")
        if namespace is not None and (problem := namespace_problem(namespace)):
            raise self.fail(("metadata", "namespace"), f"{namespace!r} {problem}")
        for key in ("labels", "annotations"):
            value = metadata.get(key) or {}
            if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
                raise self.fail(("metadata", key), "must map names to texts; quote numbers and true or false")

    def _spec(self, spec: dict[str, Any]) -> RLTrainingJobSpec:
        try:
            return RLTrainingJobSpec.model_validate(spec, by_alias=True, by_name=False)
        except ValidationError as error:
            problems = [self._explain(item) for item in error.errors(include_url=False)]
            raise ManifestError("\n".join(dict.fromkeys(problems))) from None

    def _explain(self, error: Any) -> str:
        path: _PATH = ("spec", *(part for part in error["loc"] if part != "[key]"))
        if error["type"] == "extra_forbidden":
            owner = _model_at(error["loc"][:-1])
            known = [info.alias or name for name, info in owner.model_fields.items()] if owner else []
            return self.say(path, f"unknown field{_elsewhere(path, known) or _nearest(str(path[-1]), known)}")
        if error["type"] == "missing":
            return self.say(path, "missing; it is required")
        if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
            return self.say(path, _not_a_section(path, error["input"]))
        problem = problem_of(error)
        found = "" if error["type"] == "value_error" or "env" in path else f"found {_short(error['input'])}, "
        return self.say(path, f"{found}{problem}")


_TEXT_MEANS = {"dataset": "name", "validationDataset": "name", "reward": "builtin", "output": "claim"}
"""The field of a section that somebody most likely means who writes a text in place of the section."""


def _not_a_section(path: _PATH, value: Any) -> str:
    """What was found where a mapping of fields belongs, and how to write it."""
    owner = _model_at(path[1:])
    fields = [info.alias or name for name, info in owner.model_fields.items()] if owner else []
    name = str(path[-1])
    meant = _TEXT_MEANS.get(name)
    if isinstance(value, str) and meant == "name" and re.search(r"^[./~]|://|\.(jsonl|json|parquet|csv)$", value):
        meant = "path"
    elif isinstance(value, str) and meant == "builtin" and ":" in value:
        meant = "function"
    elif isinstance(value, str) and meant == "claim" and "://" in value:
        meant = "uri"
    elif isinstance(value, list) and meant == "name":
        meant, value = "inline", "[...]"
    shown = f"; write {name}: {{{meant}: {value}}}" if meant and isinstance(value, str) else ""
    listed = f" of these fields: {', '.join(fields)}" if fields else ""
    return f"found {_short(value)}, expected a mapping{listed}{shown}"


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: 1e-6 is a number and a date is a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, lists indented under their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _the_job(text: str, source: str) -> tuple[dict[str, Any], dict[_PATH, int]]:
    """The one RLTrainingJob among the documents, as plain data, and the line of each of its fields."""
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=_Loader) if node is not None]
        documents = [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
        positions = [dict(_positions(node, (), source, set())) for node in nodes]
    except yaml.YAMLError as error:
        if text.lstrip().startswith("{"):  # JSON may be indented with tabs, which YAML refuses
            return _from_json(text, source), {}
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ManifestError(f"{source}{line}: no valid YAML: {getattr(error, 'problem', None) or error}") from None
    except ManifestError:
        raise
    except ValueError as error:
        raise ManifestError(f"{source}: no valid YAML: {error}") from None
    except RecursionError:
        raise ManifestError(
            f"{source}: lists and mappings are nested too deep to read; at most {names.MAX_NESTING} levels are allowed"
        ) from None
    jobs = [i for i, d in enumerate(documents) if isinstance(d, dict) and d.get("kind") == names.KIND]
    if len(jobs) != 1:
        kinds = [d.get("kind", "no kind") if isinstance(d, dict) else type(d).__name__ for d in documents]
        raise ManifestError(
            f"{source}: found {len(jobs)} documents of kind {names.KIND}"
            f" (of kinds: {', '.join(map(str, kinds)) or 'none, the file is empty'}); expected exactly one"
        )
    document = documents[jobs[0]]
    _check_version(document, source, positions[jobs[0]])
    return document, positions[jobs[0]]


def _from_json(text: str, source: str) -> dict[str, Any]:
    try:
        document = decode.loads(text)
    except ValueError as error:
        raise ManifestError(f"{source}: no valid JSON: {error}") from None
    if not isinstance(document, dict) or document.get("kind") != names.KIND:
        raise ManifestError(f"{source}: expected an object of kind {names.KIND}")
    _check_version(document, source, {})
    return document


def _check_version(document: Mapping[str, Any], source: str, lines: Mapping[_PATH, int]) -> None:
    found = document.get("apiVersion")
    if found != names.API_VERSION:
        line = lines.get(("apiVersion",)) or lines.get(())
        raise ManifestError(
            f"{source}{f':{line}' if line else ''}: apiVersion: found {found!r}, expected {names.API_VERSION!r}"
        )


def _positions(node: yaml.Node, path: _PATH, source: str, visited: set[int]) -> Iterator[tuple[_PATH, int]]:
    """Every path in the document with its line, counted from 1. ManifestError for a key given twice."""
    yield path, node.start_mark.line + 1
    if id(node) in visited:  # an alias: its anchor has been walked, and it may contain itself
        return
    visited.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                where = _dotted((*path, key.value))
                raise ManifestError(f"{source}:{line}: {where}: given twice, first in line {seen[key.value]}; keep one")
            seen[key.value] = line
            yield from _positions(value, (*path, key.value), source, visited)
            yield (*path, key.value), line
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _positions(item, (*path, index), source, visited)


def _model_at(loc: Iterable[str | int]) -> type[BaseModel] | None:
    """The section that a path of the specification leads to."""
    model: type[BaseModel] | None = RLTrainingJobSpec
    for part in loc:
        if isinstance(part, int) or model is None:
            continue
        info = next((i for n, i in model.model_fields.items() if part in (n, i.alias)), None)
        model = _section_in(info.annotation) if info else None
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _elsewhere(path: _PATH, known: Iterable[str]) -> str:
    """Where a field belongs that is not one of its section: another section, or what other libraries call so; else ""."""
    name = str(path[-1])
    if name in known:
        return ""
    homes = [place for place in _places().values() if place.rpartition(".")[2] == name]
    if homes:
        return f"; it belongs to {' or '.join(f'spec.{home}' for home in homes)}"
    snake = re.sub(r"(?<=[a-z0-9])([A-Z])", lambda match: "_" + match[1].lower(), name)
    meaning = meaning_of(snake, write={**_places(), **_IN_FILES})
    return f"; {meaning}" if meaning else ""


_IN_FILES = {
    "reward_fn": "reward",
    "gpus": "resources.gpusPerNode",
    "name": "metadata.name",
    "output_dir": "the option --output-dir",
    "validation_dataset": "validationDataset",
    "split": "dataset.split",
    "subset": "dataset.subset",
}
"""Keywords of Python whose field of a job has another name, or that are no field."""


def _places() -> dict[str, str]:
    """The fields of training, of the algorithms and of resources by their Python names, as paths below `spec`."""
    found: dict[str, str] = {}
    sections: list[tuple[str, type[BaseModel]]] = [("training", TrainingSpec), *SECTIONS.items()]
    sections.append(("resources", ResourcesSpec))
    for section, model in sections:
        for name, info in model.model_fields.items():
            found.setdefault(name, f"{section}.{info.alias or name}")
    return found


def _nearest(name: object, known: Iterable[str]) -> str:
    candidates = list(known)
    if near := nearest(str(name), candidates):
        return f"; did you mean {near}?"
    return f"; expected one of {', '.join(candidates)}" if candidates else ""


def _dotted(path: _PATH) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
