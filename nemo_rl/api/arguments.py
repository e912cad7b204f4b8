"""Types of what `train()` and the trainers take: data sets, rewards, names of algorithms. For type checkers alone."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsFloat, TypeAlias

if TYPE_CHECKING:
    from nemo_rl.data import DataModule
    from nemo_rl.environments import Environment
    from nemo_rl.job.spec import DatasetSpec, RewardSpec


class Table(Protocol):
    """A data frame of pandas or polars, a table of pyarrow, a `datasets.Dataset`."""

    @property
    def shape(self) -> Any: ...


AlgorithmName: TypeAlias = Literal["grpo", "sft", "dpo", "GRPO", "SFT", "DPO"]
Rows: TypeAlias = "str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Table | DataModule | DatasetSpec"
Score: TypeAlias = "SupportsFloat | Mapping[str, SupportsFloat]"
RewardFunction: TypeAlias = "Callable[..., Score | Sequence[Score] | Awaitable[Score] | Awaitable[Sequence[Score]]]"
OneReward: TypeAlias = "RewardFunction | Environment | str"
Reward: TypeAlias = "OneReward | Sequence[OneReward] | Mapping[str, OneReward] | RewardSpec"
