"""The Python front door: train(), its result, and the helpers that list and create trainers. Loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.api.algorithms import create_trainer, get_algorithm, list_algorithms
    from nemo_rl.api.remote import attach, jobs
    from nemo_rl.api.result import TrainResult
    from nemo_rl.api.training import train

_HOME_OF = {
    "train": "nemo_rl.api.training",
    "TrainResult": "nemo_rl.api.result",
    "attach": "nemo_rl.api.remote",
    "jobs": "nemo_rl.api.remote",
    "list_algorithms": "nemo_rl.api.algorithms",
    "get_algorithm": "nemo_rl.api.algorithms",
    "create_trainer": "nemo_rl.api.algorithms",
}

__all__ = ["TrainResult", "attach", "create_trainer", "get_algorithm", "jobs", "list_algorithms", "train"]


if not TYPE_CHECKING:  # for a type checker every name would be one otherwise

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'nemo_rl.api' has no attribute {name!r}; public names: {', '.join(__all__)}")
        value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
