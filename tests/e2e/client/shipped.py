"""Rewards and callbacks that the tests ship. Of their own, since a module travels whole, with all that it imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import nemo_rl


def right(prompt: str, response: str, answer: str) -> float:
    return sum(given == wanted for given, wanted in zip(response, answer, strict=False)) / len(answer)


async def short(prompt: str, response: str) -> float:
    return -len(response) / 10


class Watch(nemo_rl.Callback):
    """Prints every step and ends the run after the fourth."""

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        print(f"watched step {step} of {trainer.total_steps}")
        if step == 4:
            trainer.should_stop = True


def fails_later(calls: int = 40) -> Callable[[str, str], float]:
    """A reward that is well for its first calls, preflight included."""

    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, prompt: str, response: str) -> float:
            self.calls += 1
            if self.calls > calls:
                raise ZeroDivisionError("this reward divides by nothing")
            return self.calls % 7 / 7

    return Counting()


def returns_nothing(prompt: str, response: str) -> None:
    return None


def raises(prompt: str, response: str) -> float:
    raise KeyError("no such key")


def names_a_column_that_is_not_there(prompt: str, response: str, truth: str) -> float:
    return 1.0


def by_length(prompt: str, response: str) -> float:
    return len(response) / 10


class Rubbish(nemo_rl.Callback):
    """Prints what no terminal should get and what no parser expects, and serves a gigabyte as its progress."""

    def on_train_begin(self, trainer: Any) -> None:
        from nemo_rl.worker import server

        def endless(handler: Any, *_: Any) -> None:
            handler.send_response(200)
            handler.end_headers()
            for _ in range(1024):
                handler.wfile.write(b"x" * (1 << 20))

        server._Handler._answer = endless  # type: ignore[method-assign]

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        for _ in range(200):
            os.write(sys.stdout.fileno(), os.urandom(500) + b"\n")
        os.write(sys.stdout.fileno(), b"A" * 3_000_000 + b"\n")
        print("\x1b]0;owned\x07\x1b[2J\x1b[31mred", flush=True)
        print('step=999999/3 reward=1e308 kl={"a":', flush=True)
        print('step=77/4 reward="<script>alert(1)</script>"', flush=True)
        print('sample step=1 reward=[1,2] prompt="x" completion=7', flush=True)
