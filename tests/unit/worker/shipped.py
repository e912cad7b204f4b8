"""Code of a user that no image has: it travels in bundles."""

from __future__ import annotations

from typing import Any

MOST = 4


def many_words(prompt: str, response: str) -> float:
    return len(set(response.split())) / MOST


class Counting:
    """A callback with a state of its own, and without a base class."""

    def __init__(self, start: int) -> None:
        self.count = start

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        self.count += 1
        print(f"counted {self.count}", flush=True)
