"""Ways of decoding a model, from fast to slow, and the state that each keeps."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process.decode import DecodeState
from nemo_rl.rollout.in_process.generic import CachedState, UncachedState
from nemo_rl.rollout.in_process.packed import PackedState

PACKED, CACHE, ONE_LENGTH = "packed", "cache", "cache, one length at a time"
NO_CACHE, ONE_ROW = "no cache, one length at a time", "no cache, one row at a time"
WAYS = (CACHE, ONE_LENGTH, NO_CACHE, ONE_ROW)
"""Ways of decoding through transformers' own forward, from fast to slow."""


@dataclass(frozen=True)
class Rollout:
    """How a model is decoded. cache_bytes: the size of one row's cache is [0] + [1] * its length."""

    way: str
    cache_bytes: tuple[float, float] = (0.0, 0.0)


def new_state(policy: Policy) -> DecodeState:
    """Returns the decode state of the way that `policy.rollout` names."""
    way = policy.rollout.way
    if way == PACKED:
        return PackedState(policy)
    if way in (CACHE, ONE_LENGTH):
        return CachedState(policy, one_length=way == ONE_LENGTH)
    return UncachedState(policy, one_row=way == ONE_ROW)
