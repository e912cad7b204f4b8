"""What the library logs while a run trains, as lines of its display: debug, `LoggingCallback`, early stopping."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LIBRARY = "nemo_rl"
"""The logger above all of ours."""


class _Lines(logging.Handler):
    """Says each record as a line. What is no plain message says its level first."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        try:
            word = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            text = record.getMessage()
            if record.exc_info:
                text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
            self._say(f"{word}{text}")
        except Exception:
            self.handleError(record)


@contextmanager
def log_lines(level: str, say: Callable[[str], None] | None) -> Iterator[None]:
    """While the block runs, what the library logs from `level` on is said by `say`, the display of the run.

    A program that has configured logging keeps its own handlers, and gets the records there; a level that it gave to the
    library's logger stays. Without `say`, and at the levels warning and error, warnings go to standard error, as Python does it.
    """
    logger = logging.getLogger(LIBRARY)
    before = logger.level
    if before == logging.NOTSET:
        logger.setLevel(level.upper())
    handler: logging.Handler | None = None
    if say is not None and level in ("debug", "info") and not logger.hasHandlers():
        handler = _Lines(say)
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(before)
        if handler is not None:
            logger.removeHandler(handler)
