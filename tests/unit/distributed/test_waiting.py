"""A rank that waits for its GPU, played by an event that comes or does not, sees whether another one left the pass."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.run import ranks
from nemo_rl.run.ranks import Ranks


class Event:
    """Of a stream that gets there after some looks, or never."""

    def __init__(self, looks: float) -> None:
        self.looks = looks

    def record(self) -> None: ...

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


class Store:
    """What ranks told each other."""

    def __init__(self, *told: str) -> None:
        self.told = told

    def check(self, names: list[str]) -> bool:
        return all(any(word in name for word in self.told) for name in names)

    def get(self, name: str) -> str:
        return "rank 1: it failed"


def waits(monkeypatch: pytest.MonkeyPatch, looks: float, *told: str) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(looks))
    Ranks(0, 2, Store(*told)).settle(torch.device("cuda", 0))


def test_it_goes_on_when_the_gpu_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    waits(monkeypatch, 3)


def test_it_leaves_the_pass_that_another_rank_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ranks._Asked):
        waits(monkeypatch, float("inf"), "asked")


def test_it_ends_with_the_words_of_a_rank_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ranks.RankFailed, match="rank 1: it failed"):
        waits(monkeypatch, float("inf"), "left")
