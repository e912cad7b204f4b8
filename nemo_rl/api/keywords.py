"""Flat keywords of `train()` and the trainers, from and to the specification: one name for each of its settings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from nemo_rl.api.algorithms import algorithm_name
from nemo_rl.job import names, uris
from nemo_rl.job.foreign import meaning_of, nearest
from nemo_rl.job.spec import (
    ALGORITHMS,
    SECTIONS,
    Algorithm,
    DatasetSpec,
    OutputSpec,
    ResourcesSpec,
    RewardSpec,
    RLTrainingJobSpec,
    RolloutSpec,
    TrainingSpec,
)
from nemo_rl.job.text import problem_of

LIVE_DATASET = "python://dataset"
LIVE_VALIDATION = "python://validation_dataset"
LIVE_MODEL = "python://model"
LIVE_REWARD = "python:reward"
"""What a specification says where rows, model or reward are objects of this process, which travel beside it."""

_FLAT: dict[str, type[BaseModel]] = {
    "training": TrainingSpec,
    **SECTIONS,
    "reward": RewardSpec,
    "dataset": DatasetSpec,
    "resources": ResourcesSpec,
    "output": OutputSpec,
}
_RENAMED = {
    ("reward", "timeout_seconds"): "reward_timeout",
    ("reward", "on_error"): "on_reward_error",
    ("reward", "weights"): "reward_weights",
    ("reward", "workers"): "reward_workers",
    ("resources", "gpus_per_node"): "gpus",
    ("resources", "extra"): "extra_resources",
    ("resources", "claims"): "device_claims",
}
_ALIASES = {"gpus_per_node": "gpus"}
# Said by the arguments dataset, reward_fn, model, algorithm, callbacks, not by keywords.
_NOT_FLAT = {
    "dataset": {"name", "inline", "path"},
    "reward": {"function", "source", "bundle", "builtin", "entrypoint"},
}
_ARGUMENTS = {"model", "algorithm", "dataset", "validation_dataset", "reward", "callbacks", "bundles"}


@dataclass(frozen=True)
class Keyword:
    """One flat keyword: where its value lives in the specification. `section` is "" for fields of the job itself."""

    name: str
    section: str
    field: str

    @property
    def info(self) -> Any:
        """The pydantic field: default and description."""
        sections = {**_FLAT, "": RLTrainingJobSpec, "rollout": RolloutSpec}
        return sections[self.section].model_fields[self.field]

    @property
    def algorithm(self) -> str | None:
        """The algorithm it belongs to, or None where every algorithm takes it."""
        if self.section == "reward" or "rollout" in (self.section, self.field):
            return "grpo"
        return self.section if self.section in ALGORITHMS else None


@cache
def keywords() -> dict[str, tuple[Keyword, ...]]:
    """Every flat keyword by name. Only `beta` has two homes: the sections of GRPO and of DPO."""
    found: dict[str, tuple[Keyword, ...]] = {}
    for section, model in _FLAT.items():
        for field in model.model_fields:
            if field not in _NOT_FLAT.get(section, ()):
                name = _RENAMED.get((section, field), field)
                found[name] = (*found.get(name, ()), Keyword(name, section, field))
    found["rollout_python"] = (Keyword("rollout_python", "rollout", "python"),)
    for field in RLTrainingJobSpec.model_fields:
        if field not in _ARGUMENTS and field not in _FLAT:
            found[field] = (*found.get(field, ()), Keyword(field, "", field))
    return found


def build_spec(
    model: Any,
    dataset: Any = None,
    reward_fn: Any = None,
    algorithm: str = "grpo",
    *,
    validation_dataset: Any = None,
    secrets: Iterable[str] = (),
    caller: str = "train",
    also_known: Iterable[str] = (),
    **flat: Any,
) -> RLTrainingJobSpec:
    """The specification that the arguments of a call mean.

    A model, data set or reward that is an object of this process stands in it as a `python:` placeholder; None stands
    for the same, so that a trainer can be made before `fit()` gets its data. `also_known` are further names that the
    caller takes, only for suggestions. Raises ValueError for an unknown algorithm or a value out of range, TypeError
    for an unknown keyword or one of another algorithm; the message starts with the caller's name.
    """
    chosen = algorithm_name(algorithm)
    problems: list[str] = []
    sections = _sort_into_sections(flat, chosen, caller, set(also_known))
    _check_dataset_options(dataset, sections.get("dataset", {}), caller)
    values: dict[str, Any] = {**sections.pop("", {})}
    values["model"] = model_reference(model, caller)
    values["algorithm"] = chosen
    dataset_options = sections.pop("dataset", {})
    dataset_values = {**_dataset_values(dataset, LIVE_DATASET), **dataset_options}
    values["dataset"] = _section(DatasetSpec, dataset_values, caller, problems)
    if validation_dataset is not None:
        shared = {k: v for k, v in dataset_options.items() if k in ("subset", "data_dir")}
        held_out = _dataset_values(validation_dataset, LIVE_VALIDATION)
        if "name" in held_out:
            held_out = {**shared, **held_out}
        values["validation_dataset"] = _section(DatasetSpec, held_out, caller, problems)
    reward_options = sections.pop("reward", {})
    if chosen == "grpo":
        reward_options = {**_reward_values(reward_fn), **reward_options}
        if "weights" in reward_options:
            reward_options["weights"] = _weights_in_order(reward_options["weights"], reward_fn, caller)
        reward_options = {option: value for option, value in reward_options.items() if value is not None}
        values["reward"] = _section(RewardSpec, reward_options, caller, problems)
    rollout = _rollout_values(values.pop("rollout", None), sections.pop("rollout", {}), caller)
    if rollout is not None:
        values["rollout"] = _section(RolloutSpec, rollout, caller, problems)
    for section, given in sections.items():
        values[section] = _section(_FLAT[section], given, caller, problems)
    _add_environment(values, secrets, caller)
    spec = None if problems else _section(RLTrainingJobSpec, values, caller, problems)
    if problems:
        raise ValueError("\n".join(problems))
    return spec


def flat_keywords(spec: RLTrainingJobSpec) -> dict[str, Any]:
    """The flat keywords that were set in `spec`: what `build_spec` got beside model, data set, reward and algorithm."""
    found: dict[str, Any] = {}
    for name, homes in keywords().items():
        for home in homes:
            owner = getattr(spec, home.section) if home.section else spec
            if owner is not None and home.field in owner.model_fields_set:
                found[name] = getattr(owner, home.field)
    return found


def model_reference(model: Any, caller: str = "train") -> str:
    """How the specification names a model: its hub name or path, or a placeholder for a live one."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    if not (hasattr(model, "config") and callable(getattr(model, "forward", None))):
        raise TypeError(
            f"{caller}(): model has type {type(model).__name__}; expected a hub name, a path or a transformers model"
        )
    return LIVE_MODEL


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known name that `name` misspells, or nothing where there is none."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def _sort_into_sections(
    flat: Mapping[str, Any], algorithm: Algorithm, caller: str, also_known: set[str]
) -> dict[str, dict[str, Any]]:
    known = keywords()
    sections: dict[str, dict[str, Any]] = {}
    for given, value in flat.items():
        name = _ALIASES.get(given, given)
        if name != given and name in flat:
            raise TypeError(f"{caller}(): found both {given} and {name}, which mean the same; give one of them")
        homes = known.get(name)
        if homes is None:
            if name in _FLAT:
                example = next(k for k, (home, *_) in known.items() if home.section == name)
                raise TypeError(f"{caller}(): {name} is a section; give its fields by themselves, like {example}=…")
            raise TypeError(f"{caller}(): unknown keyword {name!r}{_what_it_is(name, algorithm, also_known)}")
        fitting = [home for home in homes if home.algorithm in (None, algorithm)]
        if not fitting:
            owners = " and ".join(str(home.algorithm) for home in homes)
            raise TypeError(
                f"{caller}(): {name} belongs to algorithm {owners}, but algorithm is {algorithm}; "
                f"remove it or choose algorithm={homes[0].algorithm!r}"
            )
        sections.setdefault(fitting[0].section, {})[fitting[0].field] = _plain(value)
    return sections


def _what_it_is(name: str, algorithm: Algorithm, also_known: set[str]) -> str:
    """What an unknown keyword is here, or of which it is a misspelling, or which there are."""
    known = keywords()
    of_others = [n for n, homes in known.items() if all(home.algorithm not in (None, algorithm) for home in homes)]
    if (meaning := meaning_of(name, skip=of_others)) is not None:
        return f"; {meaning}"
    if hint := suggestion(name, {*known, *also_known, *_ALIASES}):
        return hint
    shown = [n for n, (home, *_) in known.items() if home.section in ("training", algorithm, "dataset", "reward")]
    return f"; of {algorithm} there are {', '.join(n for n in shown if n not in of_others)}, and those of the cluster"


def _plain(value: Any) -> Any:
    """A numpy scalar as the Python number it is; everything else as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def dataset_values(reference: str) -> dict[str, Any]:
    """The fields of a DatasetSpec that a text means: the path of a file or an address, or the name on the hub."""
    return _dataset_values(reference, LIVE_DATASET)


def _dataset_values(dataset: Any, placeholder: str) -> dict[str, Any]:
    if isinstance(dataset, DatasetSpec):
        return {field: getattr(dataset, field) for field in dataset.model_fields_set}
    if isinstance(dataset, os.PathLike) or (isinstance(dataset, str) and _is_file(dataset)):
        return {"path": os.fspath(dataset)}
    return {"name": dataset} if isinstance(dataset, str) else {"path": placeholder}


def _is_file(dataset: str) -> bool:
    if dataset.startswith(("pvc://", "bundle://", "/", "./", "../", "~")) or dataset.lower().endswith(
        names.DATA_FILE_NAMES
    ):
        return True
    if uris.is_readable(dataset):
        return True
    path = Path(
        dataset
    )  # a folder is one only if `save_to_disk` wrote it: a name on the hub may be that of a folder here
    return path.is_file() or any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _check_dataset_options(dataset: Any, options: Mapping[str, Any], caller: str) -> None:
    """Options that the data set cannot obey raise TypeError rather than being ignored."""
    values = _dataset_values(dataset, LIVE_DATASET)
    allowed = set(DatasetSpec.model_fields) if "name" in values else {"max_rows"}
    if values.get("path") == LIVE_DATASET:
        allowed = set()
    if refused := [name for name in options if name not in allowed]:
        folder = bool(allowed) and Path(str(values.get("path"))).is_dir()
        kind = "rows of this process" if not allowed else "a folder" if folder else "a file"
        cure = "choose the rows before the call" if dataset is not None else "give fit() a DatasetSpec with them"
        raise TypeError(
            f"{caller}(): {refused[0]} is for data sets of the hub{' and files' if refused[0] == 'max_rows' else ''}, "
            f"but the data set is {kind if dataset is not None else 'not given here'}; {cure}"
        )


def _reward_values(reward_fn: Any) -> dict[str, Any]:
    if isinstance(reward_fn, RewardSpec):
        return {field: getattr(reward_fn, field) for field in reward_fn.model_fields_set}
    if isinstance(reward_fn, str):
        return {"function" if ":" in reward_fn else "builtin": reward_fn}
    return {"function": LIVE_REWARD}


def _rollout_values(rollout: Any, flat: Mapping[str, Any], caller: str) -> dict[str, Any] | None:
    """`rollout` is a mapping of the section's fields, or the name of an engine; `rollout_python` means engine vllm."""
    if rollout is None and not flat:
        return None
    if isinstance(rollout, RolloutSpec):
        values = {field: getattr(rollout, field) for field in rollout.model_fields_set}
    elif isinstance(rollout, Mapping):
        values = dict(rollout)
    elif isinstance(rollout, str) or rollout is None:
        values = {"engine": rollout or "vllm"}
    else:
        raise TypeError(
            f"{caller}(): rollout has type {type(rollout).__name__}; expected a mapping such as "
            '{"engine": "vllm", "urls": ["http://10.0.0.7:8000"]}, or the name of an engine'
        )
    python = values.pop("rollout_python", None)
    if flat.get("python") is not None or python is not None:
        values["python"] = os.fspath(flat["python"] if flat.get("python") is not None else python)
        values.setdefault("engine", "vllm")
    if isinstance(values.get("urls"), str):
        values["urls"] = [values["urls"]]
    return values


def _weights_in_order(weights: Any, reward_fn: Any, caller: str) -> Any:
    """Weights as a list in the order of the rewards; a mapping goes by the rewards' names, 1 where it is silent."""
    if isinstance(weights, Mapping):
        if not isinstance(reward_fn, Mapping):
            raise TypeError(
                f"{caller}(): reward_weights maps names to weights, but reward_fn has no names; "
                "give reward_fn as a dict of name to reward, or reward_weights as a list"
            )
        for name in weights:
            if name not in reward_fn:
                hint = suggestion(str(name), map(str, reward_fn))
                raise ValueError(
                    f"{caller}(): reward_weights names {name!r}, which is no reward; "
                    f"rewards are {', '.join(map(str, reward_fn))}{hint}"
                )
        return [weights.get(name, 1.0) for name in reward_fn]
    if weights is not None and isinstance(reward_fn, Mapping | list | tuple) and len(weights) != len(reward_fn):
        raise ValueError(
            f"{caller}(): reward_weights has {len(weights)} entries for {len(reward_fn)} rewards; give one for each"
        )
    return None if weights is None else [_plain(weight) for weight in weights]


_SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"^(hf_|sk-|ghp_|github_pat_|xox[bp]-|AKIA)\w{8,}")


def _add_environment(values: dict[str, Any], secrets: Iterable[str], caller: str) -> None:
    """Puts `env` (also a mapping of name to text) and `secrets` into the specification's environment.

    The secret "HF_TOKEN" is the key HF_TOKEN of the Secret hf-token; "name/KEY" names another Secret.
    """
    env = values.get("env")
    if isinstance(env, Mapping):
        env = [{"name": name, "value": str(value)} for name, value in env.items()]
    for entry in env or ():
        if not isinstance(entry, Mapping) and not hasattr(entry, "name"):
            raise TypeError(
                f"{caller}(): found {type(entry).__name__} as an entry of env; expected a mapping of name to text; write "
                'env={"NAME": "text"}'
            )
        name, value = (
            (entry.get("name"), entry.get("value")) if isinstance(entry, Mapping) else (entry.name, entry.value)
        )
        if value and (_SECRET_NAME.search(str(name)) or _SECRET_VALUE.match(str(value))):
            raise ValueError(
                f"{caller}(): env {name} looks like a secret and would be readable in the job; "
                f"put it into a Secret and give secrets=['{name}'] or secrets=['name-of-secret/{name}']"
            )
    if isinstance(secrets, str):
        raise TypeError(f"{caller}(): secrets is a text; expected a list of names, like secrets=['HF_TOKEN']")
    references = []
    for secret in secrets:
        name, _, key = secret.rpartition("/")
        if not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise ValueError(f"{caller}(): secrets: expected 'KEY' or 'name-of-secret/KEY', not a secret's value")
        reference = {"name": name or key.lower().replace("_", "-"), "key": key}
        references.append({"name": key, "value_from": {"secret_key_ref": reference}})
    if env or references:
        values["env"] = [*(env or ()), *references]


def _section(model: type[BaseModel], given: Mapping[str, Any], caller: str, problems: list[str]) -> Any:
    """The section with these values, or None and its problems in words added to `problems`."""
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        problems += [_explain(model, item, caller) for item in error.errors()]
        return None


def _explain(model: type[BaseModel], error: Any, caller: str) -> str:
    """found → expected → meaning of the setting, for one error of pydantic."""
    expected = problem_of(error)
    if not error["loc"]:
        return f"{caller}(): {expected}"
    where = error["loc"][0]
    field = next((n for n, info in model.model_fields.items() if where in (n, info.alias)), str(where))
    section = next((name for name, known in _FLAT.items() if known is model), "")
    field_prefix = "rollout." if model is RolloutSpec else ""
    name = field_prefix + (
        "reward_fn" if field in _NOT_FLAT["reward"] and section == "reward" else _RENAMED.get((section, field), field)
    )
    inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][1:])
    # Environment variables may be secrets, so their values are never repeated.
    found = "" if field in ("env", "env_from") else f"={_short(error['input'])}"
    meaning = model.model_fields[field].description if field in model.model_fields else ""
    if error["input"] is None and len(error["loc"]) == 1:
        expected += "; leave it out for its default"
    return f"{caller}(): {name}{inner}{found}: {expected}. {meaning or ''}".rstrip()


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
