"""Rewards: how they may be written, how they are checked, and the processes that run them with a time limit.

Importing this package loads neither torch nor numpy; names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.environments.builtin import (
        BUILTINS,
        exact_match,
        format_reward,
        length_reward,
        math_answer,
        overlong_penalty,
    )
    from nemo_rl.environments.decorators import batched_reward, reward_function
    from nemo_rl.environments.environment import Environment
    from nemo_rl.environments.load import load_reward
    from nemo_rl.environments.runner import RewardCall, RewardOutcome, RewardRunner, preflight
    from nemo_rl.environments.signature import RewardSet, RewardSignature, bind_rewards, validate_reward_callable

_HOMES = {
    "nemo_rl.environments.builtin": (
        "BUILTINS",
        "exact_match",
        "format_reward",
        "length_reward",
        "math_answer",
        "overlong_penalty",
    ),
    "nemo_rl.environments.decorators": ("batched_reward", "reward_function"),
    "nemo_rl.environments.environment": ("Environment",),
    "nemo_rl.environments.load": ("load_reward",),
    "nemo_rl.environments.runner": ("RewardCall", "RewardOutcome", "RewardRunner", "preflight"),
    "nemo_rl.environments.signature": ("RewardSet", "RewardSignature", "bind_rewards", "validate_reward_callable"),
}
_HOME_OF = {name: module for module, public in _HOMES.items() for name in public}

__all__ = [
    "BUILTINS",
    "Environment",
    "RewardCall",
    "RewardOutcome",
    "RewardRunner",
    "RewardSet",
    "RewardSignature",
    "batched_reward",
    "bind_rewards",
    "exact_match",
    "format_reward",
    "length_reward",
    "load_reward",
    "math_answer",
    "overlong_penalty",
    "preflight",
    "reward_function",
    "validate_reward_callable",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
