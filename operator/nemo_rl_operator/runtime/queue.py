"""A work queue with the semantics of controller-runtime's: no key waits twice, none is worked on twice at once."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

PATIENT_SHARE = 4
"""Of so many keys that are handed out, one is of those that can wait, as long as there are any."""


class KeyedQueue(Generic[K]):
    """Keys to be worked on.

    `add` while a key waits does nothing; while it is worked on, it is handed out once more afterwards. `add_after`
    keeps the earliest of several times. `fail` adds again after a delay that doubles with each failure in a row
    (`base` to `cap` seconds, with jitter of up to a half), `forget` ends the row.

    Keys come in the order in which they were added, but those that `can_wait` give way to the others, up to a share.
    One that is added again when it can no longer wait moves to them.
    """

    def __init__(
        self,
        *,
        base: float = 0.1,
        cap: float = 60.0,
        clock: Callable[[], float] | None = None,
        jitter: Callable[[], float] = random.random,
        can_wait: Callable[[K], bool] = lambda key: False,
    ) -> None:
        self._base, self._cap, self._jitter, self._can_wait = base, cap, jitter, can_wait
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        # in their order, with the time of their first addition
        self._prompt: OrderedDict[K, float] = OrderedDict()
        self._patient: OrderedDict[K, float] = OrderedDict()
        self._in_a_row = 0
        self._working: dict[K, float] = {}
        self._again: set[K] = set()
        self._later: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._sequence = 0
        self._handed_out = float("-inf")
        self._failures: dict[K, int] = {}
        self._getters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def depth(self) -> int:
        """Keys that wait to be handed out now."""
        return len(self._prompt) + len(self._patient)

    @property
    def delayed(self) -> int:
        return len(self._later)

    def stalled(self) -> float:
        """Seconds for which keys have waited and none was handed out; 0 when none waits. A long queue may still move."""
        first = [next(iter(lane.values())) for lane in (self._prompt, self._patient) if lane]
        return self._clock() - max(self._handed_out, min(first)) if first else 0.0

    def longest_work(self) -> float:
        """Seconds since the oldest key now being worked on was handed out; 0 when none is."""
        return self._clock() - min(self._working.values()) if self._working else 0.0

    def add(self, key: K) -> None:
        self._later.pop(key, None)
        if key in self._working:
            self._again.add(key)
        elif key in self._patient:
            if not self._can_wait(key):
                self._prompt[key] = self._patient.pop(key)
        elif key not in self._prompt:
            (self._patient if self._can_wait(key) else self._prompt)[key] = self._clock()
            self._wake()

    def add_after(self, key: K, seconds: float) -> None:
        if seconds <= 0:
            self.add(key)
            return
        due = self._clock() + seconds
        if self._later.get(key, float("inf")) <= due:
            return
        self._later[key] = due
        self._sequence += 1
        heapq.heappush(self._heap, (due, self._sequence, key))
        self._arm()

    def fail(self, key: K) -> float:
        """Add the key again after its back-off; the delay in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = min(self._cap, self._base * 2.0 ** min(failures - 1, 30)) * (1 + self._jitter() / 2)
        self.add_after(key, delay)
        return delay

    def forget(self, key: K) -> None:
        self._failures.pop(key, None)

    async def get(self) -> tuple[K, float]:
        """The next key, and the seconds that it waited. The caller must call `done` with it."""
        while not self.depth:
            getter = asyncio.get_running_loop().create_future()
            self._getters.append(getter)
            try:
                await getter
            except asyncio.CancelledError:
                if getter in self._getters:
                    self._getters.remove(getter)
                elif self.depth:
                    self._wake()
                raise
        key, since = self._next_lane().popitem(last=False)
        now = self._clock()
        self._working[key] = self._handed_out = now
        return key, now - since

    def _next_lane(self) -> OrderedDict[K, float]:
        if self._patient and (not self._prompt or self._in_a_row >= PATIENT_SHARE - 1):
            self._in_a_row = 0
            return self._patient
        self._in_a_row += 1
        return self._prompt

    def done(self, key: K) -> None:
        del self._working[key]
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def release_due(self) -> float | None:
        """Hand over the keys whose time has come; seconds until the next one."""
        now = self._clock()
        while self._heap:
            due, _, key = self._heap[0]
            if self._later.get(key) != due:  # added at once, or for an earlier time
                heapq.heappop(self._heap)
            elif due <= now:
                heapq.heappop(self._heap)
                self.add(key)
            else:
                return due - now
        return None

    def _wake(self) -> None:
        while self._getters:
            getter = self._getters.popleft()
            if not getter.done():
                getter.set_result(None)
                return

    def _arm(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        delay = self.release_due()
        if delay is not None:
            self._timer = asyncio.get_running_loop().call_later(delay, self._arm)
