"""Whether a save fits into the time that a stopped pod has: asked at the start, and again after each real save."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from nemo_rl.job.status import duration

PROBE_BYTES = 16 * 2**20
SLOWEST_DISK = 10**6
"""Bytes per second that any volume reaches: what fits even so needs no probe."""
STOP_SECONDS = 5.0
"""Of the grace period, what goes by before the save begins (a micro-batch) and after it (the process ends)."""
SLACK = 1.5
"""A save is not the probe's one long write, and all jobs of a drained node save together."""


class Grace:
    """The grace period of the pod, in seconds. It warns once in all."""

    def __init__(self, seconds: float, slowest_disk: float = SLOWEST_DISK) -> None:
        self.seconds = seconds
        self._slowest_disk = slowest_disk
        self._warned = False

    def before(self, size: int, folder: Path) -> str | None:
        """A warning when a checkpoint of `size` bytes would take too long to write to `folder`, by a small probe."""
        if self._fits(size / self._slowest_disk):
            return None
        speed = write_speed(folder)
        if speed is None or self._fits(SLACK * size / speed):
            return None
        cause = f"{_readable(size)} at {_readable(speed)}/s"
        return self._warning(
            f"a checkpoint will take about {duration(SLACK * size / speed)} ({cause})", SLACK * size / speed
        )

    def after(self, seconds: float) -> str | None:
        """A warning when the save that just ended took too long."""
        return (
            None if self._fits(seconds) else self._warning(f"the checkpoint took {duration(seconds)}", SLACK * seconds)
        )

    def _fits(self, seconds: float) -> bool:
        return seconds + STOP_SECONDS <= self.seconds

    def _warning(self, found: str, wanted: float) -> str | None:
        if self._warned:
            return None
        self._warned = True
        return (
            f"warning: {found}, but a stopped pod has only {duration(self.seconds)}: an eviction would lose the steps "
            f"since the last checkpoint; set terminationGracePeriodSeconds: {round(wanted + 2 * STOP_SECONDS)}"
        )


def write_speed(folder: Path) -> float | None:
    """Bytes per second that reach the disk below `folder`, measured by one file; None where it cannot be written."""
    path = folder / f".write-probe-{os.getpid()}"
    block = os.urandom(2**20)  # a compressing file system would flatter zeros
    try:
        begin = time.perf_counter()
        with open(path, "wb", buffering=0) as probe:
            for _ in range(PROBE_BYTES // len(block)):
                probe.write(block)
            os.fsync(probe.fileno())
        return PROBE_BYTES / max(time.perf_counter() - begin, 1e-6)
    except OSError:
        return None  # a full disk: the first real save says so better
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _readable(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
