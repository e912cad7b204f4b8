"""Liveness and readiness that tell the truth: a process that runs but no longer hears or works is not alive."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from nemo_rl_operator import metrics
from nemo_rl_operator.runtime.cache import Cache, Key
from nemo_rl_operator.runtime.queue import KeyedQueue

WAIT_LIMIT = 120.0
"""Seconds that the queue may stand still before something must be wrong."""
WORK_LIMIT = 600.0
"""Likewise that a worker may be busy with one job: a slow API server may take half a minute for each of its calls."""
ECHO_LIMIT = 180.0
"""Seconds within which the watch must report our own writes back."""


class Health:
    """Collects signs of life. `problems` is empty while all is well.

    Every status that is written comes back through the watch; one that does not shows that the watch is deaf, even
    while nothing else happens in the cluster. The resync adds what it finds by listing.
    """

    def __init__(self, cache: Cache, queue: KeyedQueue[Key]) -> None:
        self._cache, self._queue = cache, queue
        self._written: dict[Key, tuple[float, int]] = {}
        self._told: dict[str, int] = {}
        """The newest version that the watch delivered, by namespace. It delivers in the order of versions."""
        self._heard = time.monotonic()
        self.deaf = ""
        """What the resync found that the watches should have told long ago; empty if nothing."""
        self.reachable = True
        """Whether the API server answered the last call. While it does not, nothing can come back from it."""
        self.broken = ""
        """Which part of the operator ended by itself; empty while all run."""
        self.started = False
        self.unready = "the first lists are not in yet"
        """Why it has not started, meanwhile."""

    def heard(self) -> None:
        """A watch delivered an event."""
        self._heard = time.monotonic()

    def wrote(self, key: Key, version: str) -> None:
        """The API server took a write, and made this new version of the job of it."""
        if version.isdigit():
            self._written.setdefault(key, (time.monotonic(), int(version)))

    def echoed(self, key: Key, version: int) -> None:
        """The watch delivered this version of the job, or something newer."""
        self._told[key[0]] = max(version, self._told.get(key[0], 0))
        waiting = self._written.get(key)
        if waiting and waiting[1] <= version:
            del self._written[key]

    def problems(self) -> list[str]:
        found = []
        if self._queue.stalled() > WAIT_LIMIT:
            found.append(f"jobs wait, and none was handed to a worker for {self._queue.stalled():.0f} s")
        if self._queue.longest_work() > WORK_LIMIT:
            found.append(f"a worker has been busy with one job for {self._queue.longest_work():.0f} s")
        if self.reachable and any(self._unheard(key, *write) for key, write in list(self._written.items())):
            found.append(f"the watch has not reported a write back within {ECHO_LIMIT:.0f} s")
        found += [text for text in (self.deaf, self.broken) if text]
        return found

    def _unheard(self, key: Key, since: float, version: int) -> bool:
        """Whether the watch should have told of this write and has not.

        A newer version of any job of the namespace shows that it is past this one: it was told before the answer to the
        write was read, or the job was deleted while the watch was cut, which nobody is told of.
        """
        if time.monotonic() - since <= ECHO_LIMIT:
            return False
        if version <= self._told.get(key[0], 0) or self._cache.get(key).resource is None:
            del self._written[key]
            return False
        return True

    async def serve(self, health_port: int, metrics_port: int, host: str = "") -> list[web.AppRunner]:
        """Serve /healthz and /readyz on one port, /metrics on the other; a port of 0 is not served."""
        runners = []
        routes: dict[int, list[web.RouteDef]] = {}
        routes.setdefault(health_port, []).append(web.get("/healthz", self._live))
        routes.setdefault(health_port, []).append(web.get("/readyz", self._ready))
        routes.setdefault(metrics_port, []).append(web.get("/metrics", self._metrics))
        for port, found in routes.items():
            if port:
                app = web.Application()
                app.add_routes(found)
                runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
                await runner.setup()
                await web.TCPSite(runner, host or None, port).start()
                runners.append(runner)
        return runners

    async def _live(self, _: web.Request) -> web.Response:
        return _answer(self.problems())

    async def _ready(self, _: web.Request) -> web.Response:
        return _answer(self.problems() if self.started else [self.unready])

    async def _metrics(self, _: web.Request) -> web.Response:
        metrics.QUEUE_DEPTH.set(self._queue.depth)
        metrics.LAST_EVENT_AGE.set(time.monotonic() - self._heard)
        for kind, count in self._cache.sizes().items():
            metrics.CACHE_OBJECTS.labels(kind).set(count)
        phases: dict[str, int] = dict.fromkeys(
            ("Pending", "Queued", "Starting", "Running", "Suspended", "Succeeded", "Failed"), 0
        )
        for _key, entry in self._cache.entries():
            if entry.resource:
                phase = entry.resource.phase or "Pending"
                phases[phase] = phases.get(phase, 0) + 1
        for phase, count in phases.items():
            metrics.JOBS.labels(phase).set(count)
        headers: dict[str, Any] = {"Content-Type": CONTENT_TYPE_PLAIN_0_0_4}
        return web.Response(body=generate_latest(metrics.REGISTRY), headers=headers)


def _answer(problems: list[str]) -> web.Response:
    return web.Response(status=500 if problems else 200, text="\n".join(problems or ["ok"]) + "\n")
