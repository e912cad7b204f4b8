"""Callbacks that the worker's tests name in jobs, as a user's image would hold them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


class Gate:
    """After step HOLD_AT the run waits until the test opens the gate."""

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        if step != int(os.environ.get("HOLD_AT", "0")):
            return
        folder = Path(os.environ["GATE"])
        (folder / "reached").touch()
        deadline = time.monotonic() + float(os.environ.get("HOLD_SECONDS", "60"))
        while not (folder / "open").exists():
            assert time.monotonic() < deadline, "nobody opened the gate"
            time.sleep(0.01)


class Broken:
    """A user's mistake in a callback."""

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        print(metrics["rewrad"])


class Hungry:
    """More memory than there is."""

    def on_step_begin(self, trainer: Any, step: int) -> None:
        bytearray(1 << 62)


class BrokenOnRank1:
    """A user's mistake that only one of the ranks makes."""

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        if trainer.ranks.rank == 1 and step == 2:
            print(metrics["rewrad"])
