"""What a reward is written with: the class `Environment`, and the mark that decorators leave on plain functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

Reward = TypeVar("Reward", bound=Callable[..., Any])

MARK = "__nemo_rl_reward__"
"""Attribute of a callable that holds its RewardMark."""


@dataclass(frozen=True)
class RewardMark:
    """What a decorator says of a reward beyond its signature.

    `one_of` are optional columns of which the data must have at least one.
    """

    name: str | None = None
    batched: bool = False
    in_process: bool = False
    one_of: tuple[str, ...] = ()


class Environment:
    """Base of rewards that keep something: a loaded model, a connection, counts. Override what you need.

    Of the scoring methods the most specific one that a subclass overrides is used: `score_async`, then `score_batch`,
    then `score`. Each may name columns of the data set as parameters, or take `**columns`.

    An environment runs in a process of its own, and starts anew there after a call that hung: load what is large
    in `setup`, not in `__init__`.
    """

    name: str | None = None
    """Name in the metrics; default the class's name."""
    in_process: bool = False
    """True runs it in a thread of the training process, where a call that hangs cannot be ended."""

    def __init__(self, name: str | None = None) -> None:
        """`name` in place of the class's; a subclass with an `__init__` of its own need not call this one."""
        if name is not None:
            self.name = name

    def setup(self) -> None:
        """Called once in the process that will score, before the first call."""

    if TYPE_CHECKING:  # a type checker lets these be overridden with any columns as parameters

        def score(self, *args: Any, **kwargs: Any) -> float | dict[str, float]: ...
        def score_batch(self, *args: Any, **kwargs: Any) -> list[Any]: ...
        async def score_async(self, *args: Any, **kwargs: Any) -> float | dict[str, float]: ...

    else:

        def score(self, prompt: str, response: str, **columns: Any) -> float | dict[str, float]:
            """The reward of one completion: a number, or named parts that are summed."""
            raise NotImplementedError(f"{type(self).__name__} overrides none of score, score_batch, score_async")

        def score_batch(self, prompts: list[str], responses: list[str], **columns: list[Any]) -> list[Any]:
            """One reward for each completion; each column is a list with one value for each completion."""
            return [
                self.score(prompt, response, **{name: values[i] for name, values in columns.items()})
                for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
            ]

        async def score_async(self, prompt: str, response: str, **columns: Any) -> float | dict[str, float]:
            """As `score`; the calls of a group run at the same time in one event loop."""
            return self.score(prompt, response, **columns)

    def get_metrics(self) -> dict[str, float]:
        """Numbers to log beside the rewards, read after each batch of calls."""
        return {}

    def teardown(self) -> None:
        """Called once at the end of the run."""


def requires_one_of(*columns: str) -> Callable[[Reward], Reward]:
    """Marks a reward with optional columns of which the data must have at least one."""

    def mark(fn: Reward) -> Reward:
        setattr(fn, MARK, RewardMark(one_of=columns))
        return fn

    return mark


def mark_of(fn: Any) -> RewardMark:
    """The mark of a reward, found through partial and bound methods; an empty one where there is none."""
    while fn is not None:
        mark = getattr(fn, MARK, None)
        if isinstance(mark, RewardMark):
            return mark
        fn = getattr(fn, "func", None) if isinstance(fn, partial) else None
    return RewardMark()
