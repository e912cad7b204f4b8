"""Post-training of language models with GRPO, SFT and DPO: `nemo_rl.train()`, the trainers, callbacks and rewards.

Every public name is loaded when it is first used, so that `import nemo_rl` loads neither torch nor a cluster client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.api.remote import attach, jobs
    from nemo_rl.api.result import TrainResult
    from nemo_rl.api.training import train
    from nemo_rl.data import DataModule
    from nemo_rl.environments import Environment, batched_reward, reward_function
    from nemo_rl.errors import (
        DatasetError,
        NonFiniteTraining,
        RewardError,
        RolloutLost,
        TrainingFailed,
        TrainingInterrupted,
        WeightSyncMismatch,
    )
    from nemo_rl.trainers.callbacks import Callback, CheckpointCallback, EarlyStoppingCallback, LoggingCallback
    from nemo_rl.trainers.dpo import DPOTrainer
    from nemo_rl.trainers.grpo import GRPOTrainer
    from nemo_rl.trainers.sft import SFTTrainer

    __version__: str

_HOMES = {
    "nemo_rl.api.training": ("train",),
    "nemo_rl.api.remote": ("attach", "jobs"),
    "nemo_rl.api.result": ("TrainResult",),
    "nemo_rl.errors": (
        "DatasetError",
        "NonFiniteTraining",
        "RewardError",
        "RolloutLost",
        "TrainingFailed",
        "TrainingInterrupted",
        "WeightSyncMismatch",
    ),
    "nemo_rl.data": ("DataModule",),
    "nemo_rl.environments": ("Environment", "batched_reward", "reward_function"),
    "nemo_rl.trainers.callbacks": ("Callback", "CheckpointCallback", "EarlyStoppingCallback", "LoggingCallback"),
    "nemo_rl.trainers.grpo": ("GRPOTrainer",),
    "nemo_rl.trainers.sft": ("SFTTrainer",),
    "nemo_rl.trainers.dpo": ("DPOTrainer",),
}
_HOME_OF = {name: module for module, public in _HOMES.items() for name in public}

__all__ = [
    "Callback",
    "CheckpointCallback",
    "DPOTrainer",
    "DataModule",
    "DatasetError",
    "EarlyStoppingCallback",
    "Environment",
    "GRPOTrainer",
    "LoggingCallback",
    "NonFiniteTraining",
    "RewardError",
    "RolloutLost",
    "SFTTrainer",
    "TrainResult",
    "TrainingFailed",
    "TrainingInterrupted",
    "WeightSyncMismatch",
    "__version__",
    "attach",
    "batched_reward",
    "jobs",
    "reward_function",
    "train",
]


if not TYPE_CHECKING:  # for a type checker every name would be one otherwise

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            value: Any = version("nemo-rl")
        elif name in _HOME_OF:
            from nemo_rl.extras import explained

            with explained(f"nemo_rl.{name}"):
                value = getattr(importlib.import_module(_HOME_OF[name]), name)
        else:
            raise AttributeError(f"module 'nemo_rl' has no attribute {name!r}; public names: {', '.join(__all__)}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
