"""How far an upload or a download is: a line of a terminal or an area of a notebook cell, drawn anew; nothing elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from nemo_rl.display.notebook import Area, bar, in_notebook

_REDRAW_SECONDS = 0.1
_SHOWN_AFTER_SECONDS = 0.5
"""What is done sooner needs no bar."""


class TransferBar:
    """Told the bytes done and in all; a context manager, at whose end the line is ended."""

    def __init__(self, what: str, stream: Any = None) -> None:
        self._what = what
        self._stream = stream if stream is not None else sys.stderr
        self._area = Area() if stream is None and in_notebook() else None
        self._live = self._area is not None or bool(getattr(self._stream, "isatty", lambda: False)())
        self._begin = time.monotonic()
        self._shown: float | None = None

    def __enter__(self) -> TransferBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown is not None and self._area is None:
            print(file=self._stream, flush=True)

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._live or (self._shown is None and now - self._begin < _SHOWN_AFTER_SECONDS):
            return
        if self._shown is not None and now - self._shown < _REDRAW_SECONDS and done < total:
            return
        self._shown = now
        pace = done / 1e6 / max(1e-3, now - self._begin)
        text = f"{done / 1e6:.1f}/{total / 1e6:.1f} MB  {pace:.1f} MB/s"
        if self._area is not None:
            self._area.show(f"{self._what} {bar(done, total)} {text}")
        else:
            blocks = "█" * round(30 * (done / total if total else 1.0))
            print(f"\r  {self._what} {blocks:<30} {text}", end="", file=self._stream, flush=True)
