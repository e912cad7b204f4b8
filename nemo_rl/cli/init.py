"""`nemo-rl init`: a commented job.yaml for an algorithm, from flags or answers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from nemo_rl.api.algorithms import algorithm_name
from nemo_rl.api.evaluation import data_source
from nemo_rl.cli.jobs import print_json
from nemo_rl.job import names
from nemo_rl.job.manifest import ManifestError, name_problem, parse_manifest
from nemo_rl.job.spec import (
    LEARNING_RATES,
    SECTIONS,
    Algorithm,
    DatasetSpec,
    RewardSpec,
    RLTrainingJobSpec,
    TrainingSpec,
)

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
_ROWS: dict[Algorithm, list[dict[str, str]]] = {
    "grpo": [
        {"prompt": "What is 2 + 2? Answer with a number.", "answer": "4"},
        {"prompt": "What is 3 * 5? Answer with a number.", "answer": "15"},
    ],
    "sft": [
        {"prompt": "What is 2 + 2?", "completion": "2 + 2 is 4."},
        {"prompt": "What is 3 * 5?", "completion": "3 * 5 is 15."},
    ],
    "dpo": [
        {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "It is hard to say."},
        {"prompt": "What is 3 * 5?", "chosen": "15", "rejected": "It is hard to say."},
    ],
}
_REWARD = """\
def reward(prompt: str, response: str, answer: str) -> float:
    return float(response.strip() == answer) - len(response) / 1000
"""
_SET: dict[str, dict[str, Any]] = {
    "training": {"max_steps": 100, "max_epochs": 100, "batch_size": 4, "save_every": 20},
    "grpo": {"num_generations_per_prompt": 8, "max_new_tokens": 64},
    "dpo": {"beta": 0.1},
    "sft": {},
}
"""What the file sets, by section; the rest of what it names is commented out."""
_NAMED: dict[str, tuple[str, ...]] = {
    "training": ("learning_rate", "max_sequence_length", "lora_rank", "eval_every", "tensorboard"),
    "grpo": ("temperature", "beta", "loss_type", "stop"),
    "dpo": ("preference_loss", "label_smoothing"),
    "sft": ("train_on_prompt",),
}
_SUGGESTED: dict[str, Any] = {"lora_rank": 16, "eval_every": 20, "tensorboard": True, "stop": ["\n\n"]}
"""Values of commented fields whose default would say nothing."""


def init_job(
    target: Path,
    *,
    algorithm: str | None,
    model: str | None,
    dataset: str | None,
    reward: str | None,
    name: str | None,
    gpus: int | None,
    force: bool,
    as_json: bool,
) -> int:
    """Writes the job's file; returns the exit code. On a terminal it asks for what is not given.

    Raises ManifestError for an answer that cannot be used, FileExistsError for a file that is there.
    """
    if target.exists() and not force:
        raise ManifestError(f"{target} is there already; give another file, or --force to write over it")
    ask = _ask if sys.stdin.isatty() and not as_json else _default
    try:
        chosen = algorithm_name(algorithm or ask("algorithm (grpo, sft or dpo)", "grpo"))
    except ValueError as error:
        raise ManifestError(str(error)) from None
    model = model or ask("model (a name on the hub or a folder)", DEFAULT_MODEL)
    dataset = dataset or ask("data set (a file or a name on the hub; empty for two example rows)", "")
    if chosen == "grpo":
        reward = reward or ask("reward (file.py:function, module:function or a built-in; empty for an example)", "")
    elif reward:
        raise ManifestError(f"found --reward with {chosen}, which uses none; leave it out, or choose --algorithm grpo")
    name = name or ask("name of the job", _name_of(model, chosen))
    if (problem := name_problem(name)) is not None:
        raise ManifestError(f"--name {name!r} {problem}")
    gpus = int(ask("GPUs (0 trains on the CPU)", "1")) if gpus is None else gpus
    text = job_text(chosen, model=model, dataset=dataset, reward=reward or "", name=name, gpus=gpus)
    parse_manifest(text, source=str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"file": str(target), "name": name, "algorithm": chosen, "model": model})
    else:
        print(f"wrote {target}; look at it with: nemo-rl train {target} --dry-run")
    return 0


def job_text(algorithm: Algorithm, *, model: str, dataset: str, reward: str, name: str, gpus: int) -> str:
    """The YAML of a job whose every setting has its meaning above it, taken from the specification."""
    lines = [
        f"# {algorithm.upper()} with nemo-rl. Lines that begin with # and a field are settings at your choice.",
        f"#   nemo-rl train {name}.yaml --dry-run   checks it and shows what would be applied (take this file's name)",
        f"#   nemo-rl train {name}.yaml             trains on this machine, or on the cluster of your context",
        f"#   kubectl apply -f {name}.yaml          gives it to the cluster",
        f"# All fields: kubectl explain {names.SHORT_NAME}.spec",
        f"apiVersion: {names.API_VERSION}",
        f"kind: {names.KIND}",
        "metadata:",
        f"  name: {name}",
        "spec:",
    ]
    lines += _field(RLTrainingJobSpec, "model", model, 2)
    lines += _field(RLTrainingJobSpec, "algorithm", algorithm, 2)
    data = _data(dataset, algorithm)
    lines += ["", *_section("dataset", RLTrainingJobSpec)]
    lines += [
        f"    {line}" for line in yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000).splitlines()
    ]
    if algorithm == "grpo":
        lines += ["", *_section("reward", RLTrainingJobSpec), *_reward(reward)]
    for section, fields in (("training", TrainingSpec), (algorithm, SECTIONS[algorithm])):
        lines += ["", *_section(section, RLTrainingJobSpec), *_settings(section, fields, algorithm)]
    resources: type[BaseModel] = RLTrainingJobSpec.model_fields["resources"].annotation  # type: ignore[assignment]
    lines += ["", *_section("resources", RLTrainingJobSpec), *_field(resources, "gpus_per_node", gpus, 4)]
    return "\n".join(lines) + "\n"


def _settings(section: str, fields: type[BaseModel], algorithm: Algorithm) -> list[str]:
    lines = []
    for field, value in _SET[section].items():
        lines += _field(fields, field, value, 4)
    commented = []
    for field in _NAMED[section]:
        rate = LEARNING_RATES[algorithm][0] if field == "learning_rate" else None
        value = _SUGGESTED.get(field, rate if rate is not None else fields.model_fields[field].default)
        commented += _field(fields, field, value, 4, comment=True)
    return [*(lines or ["    {}  # every setting at its default: remove {} where you set one"]), *commented]


def _section(name: str, owner: type[BaseModel]) -> list[str]:
    return [f"  # {owner.model_fields[name].description}", f"  {to_camel(name)}:"]


def _field(owner: type[BaseModel], field: str, value: Any, indent: int, comment: bool = False) -> list[str]:
    before, mark = " " * indent, "# " if comment else ""
    return [f"{before}# {owner.model_fields[field].description}", f"{before}{mark}{to_camel(field)}: {_scalar(value)}"]


def _scalar(value: Any) -> str:
    """A value as YAML on one line; floats with a point, for 1e-6 is a text in YAML 1.1."""
    if isinstance(value, float):
        text = repr(value)
        return re.sub(r"^(-?\d+)e", r"\1.0e", text)
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _data(dataset: str, algorithm: Algorithm) -> dict[str, Any]:
    if not dataset:
        return {"inline": _ROWS[algorithm]}
    found: DatasetSpec = data_source(dataset)
    return {to_camel(name): getattr(found, name) for name in found.model_fields_set}


def _reward(reference: str) -> list[str]:
    place, _, function = reference.rpartition(":")
    if reference and not place.endswith(".py"):
        return _field(RewardSpec, "function" if place else "builtin", reference, 4)
    source, entrypoint = _REWARD, None
    if reference:
        path = Path(place).expanduser()
        if not path.is_file():
            raise ManifestError(f"--reward {reference}: {place!r} is not a file here ({Path.cwd()})")
        source, entrypoint = path.read_text(encoding="utf-8"), function
    lines = [f"    # {RewardSpec.model_fields['source'].description}", "    source: |"]
    lines += [f"      {line}".rstrip() for line in source.splitlines()]
    return lines if entrypoint is None else [*lines, *_field(RewardSpec, "entrypoint", entrypoint, 4)]


def _name_of(model: str, algorithm: Algorithm) -> str:
    last = re.sub(r"[^a-z0-9]+", "-", [part for part in re.split(r"[/\\]", model.lower()) if part][-1]).strip("-")
    name = f"{last or 'model'}-{algorithm}"[: names.MAX_NAME_LENGTH].strip("-")
    return name if name[0].isalpha() else f"m-{name}"[: names.MAX_NAME_LENGTH]


def _ask(question: str, default: str) -> str:
    import typer

    return str(typer.prompt(question, default=default, show_default=bool(default)))


def _default(question: str, default: str) -> str:
    return default
