"""What a run does at this moment, and how long it will take: what displays show between two steps."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

PACE_STEPS = 20
"""Steps whose duration the estimate of the time left follows."""
MARK = "… "
"""How a plain line about a phase begins."""
_LINE = re.compile(rf"{MARK}(?P<name>[^:]+): (?P<rest>.*)")


class Phase:
    """A stretch of work within a run. Counting is cheap, so that inner loops may do it; displays look when they draw.

    Attributes: name; done and total, of units (total None where nobody knows); tokens so far; began (time.monotonic()).
    """

    def __init__(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.tokens = 0
        self.began = time.monotonic()
        self.said = ""
        """Further words, of a phase that goes on elsewhere."""
        self.on_change: Callable[[], None] | None = None

    def add(self, done: int = 0, tokens: int = 0) -> None:
        """Counts what has been done since."""
        self.done += done
        self.tokens += tokens
        if self.on_change is not None:
            self.on_change()

    def words(self) -> str:
        """ "rollout: 12,345 tokens, 3 of 8 prompts, 14 s": what is known and not zero."""
        if self.said:
            return f"{self.name}: {self.said}"
        parts = [f"{self.tokens:,} tokens"] if self.tokens else []
        if self.total is not None:
            parts.append(f"{min(self.done, self.total):,} of {self.total:,} {self.unit}".rstrip())
        parts.append(duration(time.monotonic() - self.began))
        return f"{self.name}: {', '.join(parts)}"


def phase_of_line(line: str) -> Phase | None:
    """The phase that a plain line speaks of, as a display elsewhere wrote it; None for any other line."""
    found = _LINE.fullmatch(line.rstrip())
    if found is None:
        return None
    phase = Phase(found["name"])
    phase.said = found["rest"]
    return phase


class Pace:
    """Estimates the time left from the last steps of this process, with what was measured between them."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=PACE_STEPS)
        self._step: int | None = None

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Sees a step's metrics; the same step again counts once."""
        if not _is_number(metrics.get("step_seconds")) or metrics["step"] == self._step:
            return
        self._step = metrics["step"]
        measured = metrics.get("validation_seconds")
        self._seconds.append(float(metrics["step_seconds"]) + (float(measured) if _is_number(measured) else 0.0))

    def left(self, steps: int) -> float | None:
        """Seconds that so many steps will take; None before the first step, and where none is left."""
        return steps * sum(self._seconds) / len(self._seconds) if self._seconds and steps > 0 else None


class Best:
    """The best value so far of what a run is judged by: a validation metric where there is one, else its training metric."""

    def __init__(self) -> None:
        self.name, self.value, self.step = "", 0.0, 0

    def see(self, metrics: Mapping[str, Any]) -> None:
        name = next((n for n in _JUDGED if _is_number(metrics.get(n))), None)
        if name is None or (self.name.startswith("validation_") and not name.startswith("validation_")):
            return
        value = float(metrics[name])
        better = value < self.value if name.endswith("loss") else value > self.value
        if name != self.name or better:
            self.name, self.value, self.step = name, value, int(metrics["step"])

    def words(self) -> tuple[str, str] | None:
        """(what it is, the value and its step), or None before anything was measured."""
        return (f"best {self.name.replace('_', ' ')}", f"{self.value:.4g} at {self.step}") if self.name else None


_JUDGED = ("validation_reward", "validation_accuracy", "validation_loss", "reward", "preference_accuracy", "loss")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def duration(seconds: float) -> str:
    """12 s, 14 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
