"""What the tests of the engine share: tiny models, on the CPU, and one thread, which is fastest for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from torch import nn

from unit.engine import tiny


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], nn.Module]:
    """Returns the one model of a family that tests share; they leave its weights as they are."""
    return cache(tiny.make_model)
