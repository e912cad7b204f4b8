"""The parts of the operator together: what happens when one of them ends."""

from __future__ import annotations

import asyncio

import pytest

from nemo_rl_operator.assembly import Operator, Options
from nemo_rl_operator.runtime.resync import Resync


async def test_a_part_that_ends_by_itself_shows_in_liveness(monkeypatch: pytest.MonkeyPatch) -> None:
    async def end(_: Resync) -> None:
        raise KeyError("metadata")

    monkeypatch.setattr(Resync, "run", end)
    operator = Operator(Options(health_port=0, metrics_port=0))
    await operator._start()
    assert operator._health.problems() == []
    async with asyncio.timeout(10):
        while not operator._health.problems():
            await asyncio.sleep(0)
    assert operator._health.problems() == ["resync ended: KeyError('metadata')"]
    await operator._stop()


async def test_parts_that_are_stopped_are_no_problem() -> None:
    operator = Operator(Options(health_port=0, metrics_port=0))
    await operator._start()
    await operator._stop()
    await asyncio.sleep(0)
    assert operator._health.problems() == []
