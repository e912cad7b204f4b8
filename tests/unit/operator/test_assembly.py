"""The parts of the operator together: what happens when one of them ends."""

from __future__ import annotations

import asyncio
import logging
import re
import sys

import pytest

from nemo_rl_operator import main
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


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_text_of_a_pod_looks_like_a_line_of_the_log(form: str) -> None:
    formatter = main._TextLines() if form == "text" else main._JsonLines()
    evil = "first\n2026-11-28 INFO nemo_rl_operator: ns/victim: Failed: forged\x1b[2J\u202e\ud800"
    record = logging.LogRecord("nemo_rl_operator", logging.INFO, __file__, 1, "%s/x: %s", ("ns", evil), None)
    line = formatter.format(record)
    assert len(line.splitlines()) == 1
    assert not re.search("[\x00-\x1f\u202e\ud800]", line)
    assert "forged" in line
    line.encode()


def test_the_lines_of_a_traceback_are_indented() -> None:
    try:
        raise ValueError("a\n2026-11-28 INFO forged")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    first, *rest = main._TextLines().format(record).splitlines()
    assert first.endswith("failed")
    assert rest
    assert all(line.startswith("    ") for line in rest)
