"""What the tests of the engine share: tiny models, on the CPU, and one thread, which is fastest for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import nn

from unit.engine import tiny


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # also where there is a GPU: the comparisons are of float32 sums
    monkeypatch.setattr("nemo_rl.model.choose_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("nemo_rl.trainers.base.choose_device", lambda: torch.device("cpu"))
    with tiny.one_thread():
        yield


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], nn.Module]:
    """Returns the one model of a family that tests share; they leave its weights as they are."""
    return cache(tiny.make_model)
