"""What a checkpoint says about itself: nemo_rl.json for programs, and from it README.md, the model card, for people.

Neither holds a secret, a folder of a machine or a time: equal runs write equal files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_rl.job.spec import DatasetSpec, RLTrainingJobSpec

RECORD_FILE = "nemo_rl.json"
CARD_FILE = "README.md"
FORMAT = 1
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LONG = 200
_HIDDEN = ("log_level", "log_every", "resume")
_OF_SAMPLING = ("temperature", "top_k", "top_p", "max_new_tokens", "stop", "stop_token_ids")
_NAMES = {"grpo": "GRPO", "sft": "supervised fine-tuning (SFT)", "dpo": "DPO"}


def make_record(
    spec: RLTrainingJobSpec, *, base_model: str, rewards: list[str], step: int, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """What a program needs to know of a checkpoint: how it was made, and how its model is asked as in training.

    `base_model`: the name that the run has for it. `metrics`: those of the step; how long things took is left out.
    """
    own = {name: getattr(spec.settings, name) for name in spec.settings.model_fields_set}
    given = {name: getattr(spec.training, name) for name in spec.training.model_fields_set} | own
    template = given.pop("chat_template", None) is not None
    sampling = {n: getattr(spec.settings, n) for n in _OF_SAMPLING} if spec.algorithm == "grpo" else {}
    record = {
        "format": FORMAT,
        "algorithm": spec.algorithm,
        "base_model": base_model,
        "dataset": describe_data(spec.dataset),
        "validation_dataset": describe_data(spec.validation_dataset) if spec.validation_dataset else None,
        "rewards": rewards,
        "settings": {n: _without_places(v) for n, v in given.items() if n not in _HIDDEN},
        "own_chat_template": template,
        "chat_template_kwargs": spec.training.chat_template_kwargs,
        "sampling": sampling,
        "step": step,
        "metrics": {n: v for n, v in metrics.items() if _is_measured(n, v)},
    }
    found: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return found


def describe_data(data: DatasetSpec) -> dict[str, Any]:
    """A data set by its name on the hub, or by its file without the folder."""
    if data.name is not None:
        given = {name: getattr(data, name) for name in ("subset", "data_dir") if getattr(data, name) is not None}
        return {"hub": data.name, "split": data.split, **given}
    if data.path is not None and not data.path.startswith("python:"):
        return {"file": _last_part(data.path)}
    return {"rows": "given by the job or the program"}


def is_hub_name(reference: str) -> bool:
    """Whether a model or data set is named as on the hub (owner/name), and no folder here has that name."""
    return bool(_HUB_NAME.fullmatch(reference)) and not Path(reference).exists()


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of a checkpoint's folder; {} where there is none, or one of another version."""
    try:
        found = json.loads((Path(folder) / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}


def texts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The files that a checkpoint holds about itself, by name."""
    return {RECORD_FILE: json.dumps(record, indent=1, ensure_ascii=False) + "\n", CARD_FILE: model_card(record)}


def model_card(record: Mapping[str, Any]) -> str:
    """The model card: Markdown behind the metadata that the Hugging Face hub reads."""
    algorithm, base, data = record["algorithm"], record["base_model"], record["dataset"]
    about: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemo-rl", algorithm],
    }
    if is_hub_name(base):
        about["base_model"] = base
    if is_hub_name(data.get("hub", "")):
        about["datasets"] = [data["hub"]]
    lines = [
        "---",
        yaml.safe_dump(about, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {_plain(base)}, {_NAMES[algorithm]}",
    ]
    lines += [
        "",
        f"Trained with nemo-rl by {_NAMES[algorithm]}; this is the checkpoint after step {record['step']}.",
        "",
    ]
    lines += [f"- Base model: {_code(base)}", f"- Training data: {_data_in_words(data)}"]
    if record["validation_dataset"]:
        lines.append(f"- Validation data: {_data_in_words(record['validation_dataset'])}")
    if record["rewards"]:
        lines.append(f"- Rewards: {', '.join(map(_code, record['rewards']))}")
    lines += ["", "## Settings", "", *_table("Setting", record["settings"], "No setting was changed from its default.")]
    if record["own_chat_template"]:
        lines += ["", "The chat template was given for the run; it is saved with the tokenizer."]
    lines += [
        "",
        "## Metrics",
        "",
        *_table("Metric", record["metrics"], "No step was measured before this checkpoint."),
    ]
    return "\n".join([*lines, "", *_how_to_load(record)])


def _how_to_load(record: Mapping[str, Any]) -> list[str]:
    extra = "".join(
        f", {name}={value!r}" for name, value in record["chat_template_kwargs"].items() if name.isidentifier()
    )
    asked = f'messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{extra}'
    return [
        "## How to use it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "path/of/this/folder"',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'messages = [{"role": "user", "content": "Hello"}]',
        f"inputs = tokenizer.apply_chat_template({asked})",
        "answer = model.generate(**inputs, max_new_tokens=100)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
        "A tokenizer without a chat template is given the bare text: `tokenizer(\"Hello\", return_tensors=\"pt\")`. In a terminal, "
        "`nemo-rl chat path/of/this/folder` writes prompts as training did.",
        "",
    ]  # fmt: skip


def _table(head: str, values: Mapping[str, Any], nothing: str) -> list[str]:
    if not values:
        return [nothing]
    rows = [f"| {_code(name)} | {_code(_shown(value))} |" for name, value in sorted(values.items())]
    return [f"| {head} | Value |", "| --- | --- |", *rows]


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _data_in_words(data: Mapping[str, Any]) -> str:
    if "hub" in data:
        more = ", ".join(f"{name} {_plain(str(value))}" for name, value in data.items() if name != "hub")
        return f"{_code(data['hub'])} ({more})"
    return f"the file {_code(data['file'])}" if "file" in data else f"rows {data['rows']}"


def _is_measured(name: str, value: Any) -> bool:
    timed = name.endswith(("_seconds", "_per_second"))
    return isinstance(value, int | float) and not isinstance(value, bool) and not timed and name != "step"


def _without_places(value: Any) -> Any:
    """A value without the folders of this machine: of a path or an address the last part."""
    if isinstance(value, str) and (value.startswith(("/", "~")) or re.match(r"[A-Za-z]:\\|\w+://", value)):
        return _last_part(value)
    if isinstance(value, Mapping):
        return {name: _without_places(item) for name, item in value.items()}
    return [_without_places(item) for item in value] if isinstance(value, list | tuple) else value


def _last_part(path: str) -> str:
    return [part for part in re.split(r"[/\\]", path) if part][-1] if path.strip("/\\") else ""


def _plain(text: str) -> str:
    """A text on one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]#|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
