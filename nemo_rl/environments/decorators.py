"""The decorators of plain functions that are rewards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, overload

from nemo_rl.environments.environment import MARK, Reward, RewardMark
from nemo_rl.environments.signature import RewardSignature


@overload
def reward_function(fn: Reward, /) -> Reward: ...
@overload
def reward_function(fn: str, /, *, in_process: bool = False) -> Callable[[Reward], Reward]: ...
@overload
def reward_function(*, name: str | None = None, in_process: bool = False) -> Callable[[Reward], Reward]: ...
def reward_function(fn: Any = None, /, *, name: str | None = None, in_process: bool = False) -> Any:
    """Marks a function as a reward of one completion and checks its signature; TypeError if it cannot work.

    `name`, also as @reward_function("name"), is its name in the metrics. With `in_process=True` it runs in a thread of
    the training process: for what lives there only, at the price that a call which hangs cannot be ended.
    """
    if isinstance(fn, str):
        fn, name = None, fn
    if fn is None:
        return lambda function: _marked(function, RewardMark(name, in_process=in_process))
    return _marked(fn, RewardMark(name, in_process=in_process))


@overload
def batched_reward(fn: Reward, /) -> Reward: ...
@overload
def batched_reward(fn: str, /, *, in_process: bool = False) -> Callable[[Reward], Reward]: ...
@overload
def batched_reward(*, name: str | None = None, in_process: bool = False) -> Callable[[Reward], Reward]: ...
def batched_reward(fn: Any = None, /, *, name: str | None = None, in_process: bool = False) -> Any:
    """As `reward_function`, for a function of a list of prompts and a list of responses that returns a list."""
    if isinstance(fn, str):
        fn, name = None, fn
    if fn is None:
        return lambda function: _marked(function, RewardMark(name, True, in_process))
    return _marked(fn, RewardMark(name, True, in_process))


def _marked(fn: Any, mark: RewardMark) -> Any:
    try:
        setattr(fn, MARK, mark)
    except AttributeError:  # bound methods and built-in functions hold no attributes
        fn = partial(fn)
        setattr(fn, MARK, mark)
    RewardSignature.of(fn)
    return fn
