"""The algorithms by name: which there are, the trainer class of one, and a trainer made by name."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Unpack

from nemo_rl.extras import explained
from nemo_rl.job.foreign import algorithm_meaning, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nemo_rl.api.typed import TrainerKeywords
    from nemo_rl.job.spec import Algorithm
    from nemo_rl.trainers.base import Trainer

_TRAINERS: dict[Algorithm, tuple[str, str]] = {
    "grpo": ("nemo_rl.trainers.grpo", "GRPOTrainer"),
    "sft": ("nemo_rl.trainers.sft", "SFTTrainer"),
    "dpo": ("nemo_rl.trainers.dpo", "DPOTrainer"),
}


def list_algorithms() -> list[str]:
    """Names that `algorithm` takes: ["grpo", "sft", "dpo"]."""
    return list(_TRAINERS)


def algorithm_name(name: object) -> Algorithm:
    """`name` in lower case. ValueError ("Unknown algorithm …") with the nearest known name for anything else."""
    known = list_algorithms()
    if isinstance(name, str) and name.strip().lower() in known:
        return name.strip().lower()  # type: ignore[return-value]
    near = nearest(str(name), known)
    other = algorithm_meaning(str(name))
    hint = f"; {other}" if other else f"; did you mean {near!r}?" if near else ""
    raise ValueError(f"Unknown algorithm {name!r}: expected one of {', '.join(known)}{hint}")


def get_algorithm(name: str) -> type[Trainer]:
    """The trainer class of an algorithm, in any case of letters. ValueError for an unknown one. Loads torch."""
    module, trainer = _TRAINERS[algorithm_name(name)]
    with explained("training on this machine"):
        return getattr(importlib.import_module(module), trainer)


def create_trainer(
    name: str,
    *,
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    **kwargs: Unpack[TrainerKeywords],
) -> Trainer:
    """A trainer of the algorithm `name` around `model`; `kwargs` are the flat keywords of `train()`.

    ValueError for an unknown algorithm or a value out of range, TypeError for an unknown keyword.
    """
    return get_algorithm(name).from_pretrained(model, tokenizer=tokenizer, output_dir=output_dir, **kwargs)
