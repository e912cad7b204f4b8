"""The training loops: GRPO, SFT and DPO, each readable from top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.trainers.base import Trainer
    from nemo_rl.trainers.dpo import DPOTrainer
    from nemo_rl.trainers.grpo import GRPOTrainer
    from nemo_rl.trainers.sft import SFTTrainer

__all__ = ["DPOTrainer", "GRPOTrainer", "SFTTrainer", "Trainer"]

_MODULES = {"DPOTrainer": "dpo", "GRPOTrainer": "grpo", "SFTTrainer": "sft", "Trainer": "base"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"nemo_rl.trainers.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
