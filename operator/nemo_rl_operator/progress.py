"""Pull /progress of running jobs: every few seconds each, few at once, and nothing a pod answers can do harm."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from pydantic import ValidationError

from nemo_rl.job import decode, names
from nemo_rl.job.status import Progress
from nemo_rl.job.text import one_line
from nemo_rl_operator import metrics
from nemo_rl_operator.runtime.cache import Key

log = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds between two reads of one job, and so between two writes of its status for progress alone."""
WRITES_PER_SECOND = 40.0
"""Reads of all jobs together; with more than 200 running, each is read less often."""
UNREADABLE_SECONDS = 60.0
"""Progress that cannot be read for this long is said in the status."""
LONGEST_INTERVAL = 60.0
TIMEOUT = aiohttp.ClientTimeout(total=2)
AT_ONCE = 32


@dataclass(eq=False)
class _Source:
    pod: str
    """Uid of the pod."""
    url: str
    failures: int = 0
    found: Progress | None = None
    failing_since: float | None = None
    why: str = ""
    """Said once it has failed for long."""


class ProgressPuller:
    """Knows the newest progress of each running job; calls `changed` with its key when that changes."""

    def __init__(self, changed: Callable[[Key], None]) -> None:
        self._changed = changed
        self._sources: dict[Key, _Source] = {}
        self._due: list[tuple[float, int, Key, _Source]] = []
        self._order = itertools.count()
        self._some = asyncio.Event()

    def follow(self, key: Key, pod: str, ip: str) -> None:
        """Read the progress of this pod (uid, address) from now on."""
        source = self._sources.get(key)
        if source and source.pod == pod:
            return
        host = f"[{ip}]" if ":" in ip else ip
        url = f"http://{host}:{names.TRAINER_PORT}/progress"
        source = self._sources[key] = _Source(pod, url)
        self._plan(key, source, INTERVAL)

    def forget(self, key: Key) -> None:
        self._sources.pop(key, None)

    def newest(self, key: Key) -> Progress | None:
        source = self._sources.get(key)
        return source.found if source else None

    def unreadable(self, key: Key) -> str:
        """Why the progress could not be read for a minute; empty where it could."""
        source = self._sources.get(key)
        return source.why if source else ""

    def _failed(self, key: Key, source: _Source, why: str) -> None:
        now = asyncio.get_running_loop().time()
        source.failing_since = now if source.failing_since is None else source.failing_since
        if not source.why and now - source.failing_since >= UNREADABLE_SECONDS and self._sources.get(key) is source:
            source.why = why[:200]
            self._changed(key)

    async def run(self) -> None:
        """Read what is due, until cancelled."""
        limit = asyncio.Semaphore(AT_ONCE)
        tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        connector = aiohttp.TCPConnector(limit=AT_ONCE, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=TIMEOUT) as session:
            try:
                while True:
                    if not self._due:
                        self._some.clear()
                        await self._some.wait()
                        continue
                    due, _, key, source = self._due[0]
                    if due > loop.time():
                        await asyncio.sleep(min(due - loop.time(), 1.0))
                        continue
                    heapq.heappop(self._due)
                    if self._sources.get(key) is not source:
                        continue  # forgotten, or another pod's by now
                    await limit.acquire()
                    task = asyncio.create_task(self._pull(session, key, source))
                    tasks.add(task)
                    task.add_done_callback(lambda done: (tasks.discard(done), limit.release()))  # type: ignore[func-returns-value]
            finally:
                for task in tasks:
                    task.cancel()

    async def _pull(self, session: aiohttp.ClientSession, key: Key, source: _Source) -> None:
        result = "ok"
        try:
            found = await read(session, source.url)
            source.failures = 0
            was, source.failing_since, source.why = source.why, None, ""
            if (was or found != source.found) and self._sources.get(key) is source:
                source.found = found
                self._changed(key)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            result = "unreachable"
            source.failures = 1  # it imports, or its node is busy: it is asked again soon, however often that was so
            self._failed(key, source, str(error) or type(error).__name__)
            log.debug("%s/%s: no progress: %s", *key, error)
        except ValueError as error:  # a ValidationError too
            result = "invalid"
            source.failures += 1
            problem = "it has no step" if isinstance(error, ValidationError) else one_line(str(error))[:100]
            self._failed(key, source, f"what answers at {source.url} is no progress: {problem}")
            log.debug("%s/%s: invalid progress: %s", *key, problem)
        metrics.PROGRESS_PULLS.labels(result).inc()
        interval = max(INTERVAL, len(self._sources) / WRITES_PER_SECOND)
        if self._sources.get(key) is source:
            self._plan(key, source, min(LONGEST_INTERVAL, interval * 2 ** min(source.failures, 5)))

    def _plan(self, key: Key, source: _Source, seconds: float) -> None:
        due = asyncio.get_running_loop().time() + seconds
        heapq.heappush(self._due, (due, next(self._order), key, source))
        self._some.set()


async def read(session: aiohttp.ClientSession, url: str) -> Progress:
    """The progress at `url`. ValueError where it is too long or no progress; redirects are not followed."""
    async with session.get(url, allow_redirects=False) as response:
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}")
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > names.PROGRESS_LIMIT:
                raise ValueError(f"more than {names.PROGRESS_LIMIT} bytes")
    return Progress.of_a_pod(decode.loads(bytes(content)))
