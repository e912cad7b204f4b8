"""SIGTERM and SIGINT as a flag that the loops poll, so that a run saves its state before it ends."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A stop was requested; raised by `StopSignals.check` between two steps of work. `signal` is its name."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(f"{signal_name} was received")
        self.signal = signal_name


class StopSignals:
    """Context manager: the first SIGTERM or SIGINT sets `requested`, the second one ends the process at once.

    Handlers are set in the main thread only (Python allows no other) and restored on exit; elsewhere the object works
    and never reports a request. A SIGINT that the process was started to ignore (nohup) stays ignored.
    """

    def __init__(self) -> None:
        # A plain attribute: threading.Event takes a lock in set(), and a handler that interrupts the holder deadlocks.
        self._requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    @property
    def requested(self) -> str | None:
        """None, "SIGTERM" or "SIGINT": the first signal that came."""
        return self._requested

    def check(self) -> None:
        """Raise Interrupted when a stop was requested. Costs an attribute read: call it in the innermost loops."""
        if self._requested is not None:
            raise Interrupted(self._requested)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._pid = os.getpid()
            for number in _WATCHED:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            # None: a handler that was not set from Python and cannot be put back from here.
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked worker inherits this handler; there the signal must do what it does without us.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._requested = self._requested or signal.Signals(number).name
        # The next one is the kernel's: it ends the process even while it is inside a long native call. The second
        # Ctrl-C is Python's KeyboardInterrupt instead, which a notebook survives.
        for watched in self._previous:
            urgent = signal.default_int_handler if watched == signal.SIGINT else signal.SIG_DFL
            signal.signal(watched, urgent)
