"""Writes nemo_rl/api/typed.py, the types of keywords, from the specification: `python docs/typed.py`.

A test checks that it is up to date.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from nemo_rl.api.keywords import Keyword, keywords

FILE = Path(__file__).parent.parent / "nemo_rl/api/typed.py"
ARGUMENTS = ("max_steps", "max_epochs", "learning_rate", "batch_size", "num_generations_per_prompt")
"""Keywords that `train()` has in its signature."""

WIDER = {
    "resume": 'bool | Literal["auto", "required", "never"]',
    "reward_weights": "Sequence[float] | Mapping[str, float]",
    "rollout": 'Literal["in_process", "vllm"] | Mapping[str, Any] | None',
    "rollout_python": "str | PathLike[str] | None",
    "report_to": 'Literal["tensorboard", "wandb", "mlflow", "trackio", "none"] | Sequence[str] | None',
    "env": "Mapping[str, str] | Sequence[Mapping[str, Any]]",
    "log_level": 'Literal["debug", "info", "warning", "error", "DEBUG", "INFO", "WARNING", "ERROR"]',
}
"""Keywords that take more in Python than their field in a file."""

HEAD = '''"""Types of the keywords of `train()` and the trainers. Generated from the specification by docs/typed.py; do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict


class Settings(TypedDict, total=False):
    """Settings that `train()` and the trainers take by name."""
'''
TAIL = '''

class TrainKeywords(Settings, total=False):
    """What `train()` takes by name beyond its signature."""

    backend: Literal["auto", "local", "kubernetes"] | None
    """Where to train; auto looks for a cluster. Default auto."""
    name: str | None
    """Name of the job on a cluster. Default: made from the model and the call."""
    namespace: str | None
    """Namespace of the job on a cluster. Default: that of the context."""
    secrets: list[str] | tuple[str, ...]
    """Secrets whose keys become environment variables: KEY, or name-of-secret/KEY."""
    tokenizer: Any
    """Tokenizer of a model that is given as an object; also a hub name or a folder. Default: the model's."""
    validation_dataset: Any
    """Rows that are only evaluated, in any form that the data set may have. Default none."""


class TrainerKeywords(Settings, total=False):
    """What `from_pretrained` of the trainers takes by name."""
'''


def text() -> str:
    """The whole module."""
    known = keywords()
    parts = [HEAD]
    parts += [_entry(name, homes) for name, homes in known.items() if name not in ARGUMENTS]
    parts.append('    gpus_per_node: int\n    """Another name of gpus."""')
    parts.append(TAIL)
    parts += [_entry(name, known[name]) for name in ARGUMENTS]
    return "\n".join(parts) + "\n"


def _entry(name: str, homes: tuple[Keyword, ...]) -> str:
    descriptions = dict.fromkeys(home.info.description for home in homes)
    if len(homes) > 1:
        described = " ".join(f"{str(home.algorithm).upper()}: {home.info.description}" for home in homes)
    else:
        described = next(iter(descriptions))
    typed = WIDER.get(name) or written(homes[0].info.annotation)
    return f'    {name}: {typed}\n    """{described}"""'


def written(annotation: Any) -> str:
    """A type as people write it, without pydantic's bounds; sections are mappings."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return written(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(written(part) for part in arguments)
    if origin is Literal:
        return "Literal[" + ", ".join(f'"{value}"' for value in arguments) + "]"
    if annotation is NoneType:
        return "None"
    if annotation is Any:
        return "Any"
    if origin is list:
        inner = written(arguments[0])
        return f"Sequence[{inner}]" if inner.startswith("Mapping") else f"list[{inner}] | tuple[{inner}, ...]"
    if origin is dict:
        return f"Mapping[{written(arguments[0])}, {written(arguments[1])}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "Mapping[str, Any]"
    return annotation.__name__


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
