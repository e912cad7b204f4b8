"""The parts of the operator put together: watches feed the cache, workers reconcile the jobs in the queue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from nemo_rl_operator import handlers, metrics
from nemo_rl_operator.events import EventPoster
from nemo_rl_operator.plan import Kind
from nemo_rl_operator.progress import ProgressPuller
from nemo_rl_operator.reconcile import Reconciler
from nemo_rl_operator.runtime.cache import Cache, Key
from nemo_rl_operator.runtime.cache import Kind as Watched
from nemo_rl_operator.runtime.client import Api, ApiError
from nemo_rl_operator.runtime.health import Health
from nemo_rl_operator.runtime.queue import KeyedQueue
from nemo_rl_operator.runtime.resync import Resync
from nemo_rl_operator.runtime.workloads import WorkloadWatch

log = logging.getLogger(__name__)

QUIET_SECONDS, LONGEST_QUIET_WAIT = 0.3, 4.0
"""The first lists are taken to be in when no event came for this long; waited for no longer than that."""

REACH_SECONDS = 1.0
"""Between two tries to reach the API server at the start."""
SLOW_SECONDS = 0.15
"""Calls to the API server that take longer than this on average show that it has too much to do."""


@dataclass(frozen=True)
class Options:
    """What the command line sets."""

    namespaces: Sequence[str] = ()
    image: str = ""
    network: str = ""
    rollout_image: str = ""
    workers: int = 16
    health_port: int = 8080
    metrics_port: int = 9090
    resync_seconds: float = 600.0


class Operator:
    """One running operator."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._api = Api()
        self._cache = Cache()
        self._queue: KeyedQueue[Key] = KeyedQueue(base=0.1, cap=15.0, can_wait=self._can_wait)
        self._health = Health(self._cache, self._queue)
        self._api.answered = self._answered
        self._events = EventPoster(self._api)
        self._progress = ProgressPuller(self._queue.add)
        self._reconcile = Reconciler(
            self._api,
            self._cache,
            self._events,
            self._progress,
            self._health,
            image=options.image,
            network=options.network,
            rollout_image=options.rollout_image,
            busy=self._busy,
        )
        self._resync = Resync(
            self._api, self._cache, self._queue, self._health, options.namespaces, options.resync_seconds
        )
        self._workloads = WorkloadWatch(self._api, self._cache, self._queue.add, options.namespaces)
        self._tasks: list[asyncio.Task[None]] = []
        self._servers: list[web.AppRunner] = []
        self._last_event = 0.0

    async def run(self) -> None:
        await handlers.run(
            self._options.namespaces,
            api=self._api,
            cache=self._cache,
            changed=self._queue.add,
            heard=self._heard,
            on_start=self._start,
            on_stop=self._stop,
        )

    def _answered(self, reached: bool) -> None:
        self._health.reachable = reached

    def _busy(self) -> bool:
        """Whether many jobs wait, or the API server is slow: then what is not needed is not written."""
        return self._queue.depth > 2 * self._options.workers or self._api.latency > SLOW_SECONDS

    def _can_wait(self, key: Key) -> bool:
        """Of ten thousand jobs made at once, those that wait are not to delay the word that others run or have ended."""
        return self._cache.get(key).waits

    def _heard(self, kind: Watched, raw: dict[str, Any]) -> None:
        self._last_event = time.monotonic()
        self._health.heard()
        meta = raw["metadata"]
        if kind == "resource" and meta.get("resourceVersion", "").isdigit():
            self._health.echoed((meta["namespace"], meta["name"]), int(meta["resourceVersion"]))

    async def _start(self) -> None:
        self._servers = await self._health.serve(self._options.health_port, self._options.metrics_port)
        parts = {
            "workers": self._begin(),
            "events": self._events.run(),
            "progress": self._progress.run(),
            "resync": self._resync.run(),
            "workloads": self._workloads.run(),
        }
        self._tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
        for task in self._tasks:
            task.add_done_callback(self._miss)

    def _miss(self, task: asyncio.Task[None]) -> None:
        """A part that ended by itself: the rest goes on, and liveness asks for a restart."""
        if task.cancelled():
            return
        error = task.exception()
        self._health.broken = f"{task.get_name()} ended: {error!r}"
        log.error("%s ended, which it never should", task.get_name(), exc_info=error)

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            await server.cleanup()
        await self._api.close()

    async def _begin(self) -> None:
        """Start the workers once the first lists are in; an earlier start would do no harm, but cost reads."""
        await self._reach()
        await self._workloads.listed.wait()
        began = time.monotonic()
        while time.monotonic() - began < LONGEST_QUIET_WAIT:
            quiet_since = self._last_event or began + 2.0
            if time.monotonic() - quiet_since > QUIET_SECONDS:
                break
            await asyncio.sleep(0.05)
        log.info("ready: %d jobs known after %.1f s", len(self._cache), time.monotonic() - began)
        self._health.started = True
        await asyncio.gather(*(self._work() for _ in range(self._options.workers)))

    async def _reach(self) -> None:
        """Wait until all that is watched can be listed; readiness says meanwhile what cannot."""
        for kind in (Kind.RESOURCE, Kind.JOB, Kind.POD):
            for namespace in self._options.namespaces or (None,):
                while not await self._listable(kind, namespace):
                    await asyncio.sleep(REACH_SECONDS)

    async def _listable(self, kind: Kind, namespace: str | None) -> bool:
        try:
            await self._api.items(kind, namespace, {"limit": "1"})
        except ApiError as error:
            self._health.unready = f"cannot list {kind.value[1]}: {error}"
            log.warning("%s", self._health.unready)
            return False
        return True

    async def _work(self) -> None:
        while True:
            key, waited = await self._queue.get()
            metrics.QUEUE_SECONDS.observe(waited)
            began = time.monotonic()
            try:
                wake = await self._reconcile(key)
            except ApiError as error:
                delay = self._queue.fail(key)
                metrics.RETRIES.inc()
                metrics.RECONCILES.labels("retry").inc()
                level = logging.DEBUG if error.status == 409 else logging.WARNING
                log.log(level, "%s/%s: %s; again in %.1f s", *key, error, delay)
            except Exception:
                delay = self._queue.fail(key)
                metrics.RETRIES.inc()
                metrics.RECONCILES.labels("error").inc()
                log.exception("%s/%s: unexpected error; again in %.1f s", *key, delay)
            else:
                self._queue.forget(key)
                metrics.RECONCILES.labels("ok").inc()
                if wake is not None:
                    self._queue.add_after(key, wake)
            finally:
                self._queue.done(key)
                metrics.RECONCILE_SECONDS.observe(time.monotonic() - began)
