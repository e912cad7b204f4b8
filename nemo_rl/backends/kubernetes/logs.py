"""The log of a pod as whole lines, each exactly once, however often the stream is cut."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError

MAX_LINE_BYTES = 64 * 1024
"""A longer line loses its end: pods run code of users, and print what they like."""
_RECENT_LINES = 50_000
_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d) ?")


class LogSource(Protocol):
    """Where the log of a pod comes from."""

    def open(self, pod: str, since: str | None) -> Iterator[bytes]:
        """The log with time stamps from `since` (RFC 3339, whole seconds) on, until the pod ends or the stream is cut.

        ApiError with 404 where the pod is gone, with 400 where its container has not started, ClusterError for a cut.
        """

    def ended(self, pod: str) -> bool:
        """Whether nothing will be added to the log: the pod has ended, or is gone."""


class LineResumer:
    """Joins the pieces of a log that is opened again after every cut.

    A log can be opened from a whole second only, so what came in the last second comes twice; those lines are known by
    their stamp and text, in order. Half a line before a cut is dropped, for it comes again.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._overlong = False
        self._second = b""
        self._recent: deque[bytes] = deque()
        self._forgotten = 0
        self._repeats: deque[bytes] = deque()
        self._skip = 0

    def restart(self) -> str | None:
        """The stream was cut: from when to open it again (None: from its beginning)."""
        self._buffer, self._overlong = b"", False
        self._repeats, self._skip = deque(self._recent), self._forgotten
        return self._second.decode() or None

    def feed(self, piece: bytes) -> list[str]:
        """The lines that are complete with this piece and were not given before, without their stamps."""
        *whole, rest = (self._buffer + piece).split(b"\n")
        found = []
        for number, line in enumerate(whole):
            if number == 0 and self._overlong:
                line = line[:MAX_LINE_BYTES]
                self._overlong = False
            found += self._take(line[:MAX_LINE_BYTES])
        if len(rest) > MAX_LINE_BYTES:
            rest, self._overlong = rest[:MAX_LINE_BYTES], True
        self._buffer = rest
        return found

    def finish(self) -> list[str]:
        """The pod has ended and so has its log: also a last line without an end counts."""
        rest, self._buffer = self._buffer, b""
        return self._take(rest) if rest else []

    def _take(self, line: bytes) -> list[str]:
        if self._skip:
            self._skip -= 1
            return []
        mark = hashlib.blake2b(line, digest_size=12).digest()
        if self._repeats:
            if mark in self._repeats:
                while self._repeats.popleft() != mark:
                    pass  # a line that was rotated away meanwhile does not come again
                return []
            self._repeats.clear()
        stamp = _STAMP.match(line)
        # A clock that was set back does not take us back: what has an earlier stamp will not be sent again.
        if stamp is not None and stamp[1] + stamp[2] > self._second:
            self._second = stamp[1] + stamp[2]
            self._recent.clear()
            self._forgotten = 0
        self._recent.append(mark)
        if len(self._recent) > _RECENT_LINES:
            self._recent.popleft()
            self._forgotten += 1
        return [line[stamp.end() if stamp else 0 :].decode(errors="replace")]


def follow_log(
    source: LogSource, pod: str, wait: Callable[[float], bool], *, first_pause: float = 0.2, longest_pause: float = 5.0
) -> Iterator[str]:
    """The lines of a pod's log until the pod has ended. `wait` sleeps and says whether to give up.

    ApiError with 404 where the pod is gone before its log could be read to the end.
    """
    resumer = LineResumer()
    since: str | None = None
    pause = first_pause
    while True:
        over = source.ended(pod)  # asked before the log is read: what is read afterwards is all there is
        cut = False
        try:
            for piece in source.open(pod, since):
                lines = resumer.feed(piece)
                if lines:
                    pause = first_pause
                yield from lines
        except ApiError as error:
            if error.code == 404 or (over and error.code == 400):
                raise
            cut = True
        except ClusterError:
            cut = True
        if over and not cut:
            yield from resumer.finish()
            return
        since = resumer.restart()
        if wait(pause):
            return
        pause = min(longest_pause, 2 * pause)
