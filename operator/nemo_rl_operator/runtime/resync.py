"""Every ten minutes: compare the cache with lists of the API server, for a watch can miss things without a word.

kopf reports no deletion that happened during a gap of its watch, so objects are left in the cache that are gone
("ghosts"). Objects that the cache lacks or knows in an old version, on the other hand, show that a watch is deaf.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence

from nemo_rl.job import names
from nemo_rl_operator import metrics
from nemo_rl_operator.plan import Kind as ApiKind
from nemo_rl_operator.runtime.cache import KINDS, Cache, Key, Kind, key_of
from nemo_rl_operator.runtime.client import Api, ApiError
from nemo_rl_operator.runtime.health import Health
from nemo_rl_operator.runtime.queue import KeyedQueue

log = logging.getLogger(__name__)

INTERVAL = 600.0
GRACE = 30.0
"""Seconds between two looks at what a watch lags behind with."""
DEAF_SECONDS = 180.0
"""A watch that lags behind a list for so long will not catch up: cuts and busy servers make it late, but not for ever."""
SPREAD = 60.0
"""Seconds over which all jobs are looked at again."""
API_KINDS: dict[Kind, ApiKind] = {"resource": ApiKind.RESOURCE, "job": ApiKind.JOB, "pod": ApiKind.POD}
Listed = dict[tuple[str, str], int]
"""(namespace, name) to resource version."""


class Resync:
    """Runs the comparison, for all namespaces or only some."""

    def __init__(
        self, api: Api, cache: Cache, queue: KeyedQueue[Key], health: Health, namespaces: Sequence[str], interval: float
    ) -> None:
        self._api, self._cache, self._queue, self._health = api, cache, queue, health
        self._namespaces: Sequence[str | None] = list(namespaces) or [None]
        self._interval = interval

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval * random.uniform(0.9, 1.1))
            try:
                await self.once()
            except ApiError as error:
                log.warning("resync failed, next try in %.0f s: %s", self._interval, error)

    async def once(self) -> None:
        """Compare once; ends when the watches have told all that the lists did."""
        behind: list[tuple[Kind, tuple[str, str], int]] = []
        for kind in KINDS:
            listed, version = await self._list(kind)
            self._drop_ghosts(kind, listed, version)
            behind += [(kind, place, newest) for place, newest in listed.items() if self._lags(kind, place, newest)]
        for key in self._cache.keys():  # noqa: SIM118 - a copy: the cache may change
            self._queue.add_after(key, random.uniform(0, min(SPREAD, self._interval / 2)))
        await self._catch_up(behind)

    async def _catch_up(self, behind: list[tuple[Kind, tuple[str, str], int]]) -> None:
        """Wait until the watches have told of these; where they never do, liveness says so for as long as it is so."""
        began = time.monotonic()
        while behind:
            await asyncio.sleep(min(GRACE, self._interval))
            behind = [(kind, place, newest) for kind, place, newest in behind if self._lags(kind, place, newest)]
            if time.monotonic() - began < DEAF_SECONDS:
                continue
            try:
                behind = [found for found in behind if await self._still_there(*found)]
            except ApiError as error:  # the server is away: then it is no wonder that the watches are silent
                log.warning("resync cannot look after %d changes: %s", len(behind), error)
                continue
            if behind and not self._health.deaf:
                log.error(
                    "the watches missed %d changes, for example of %s %s/%s", len(behind), behind[0][0], *behind[0][1]
                )
            self._health.deaf = f"the watches missed {len(behind)} changes" if behind else ""
        self._health.deaf = ""

    async def _list(self, kind: Kind) -> tuple[Listed, int]:
        """All objects of the kind, and the version at which they were listed (the oldest, of several namespaces)."""
        params = {} if kind == "resource" else {"labelSelector": names.LABEL_JOB}
        listed: Listed = {}
        versions = []
        for namespace in self._namespaces:
            async for page, version in self._api.metadata(API_KINDS[kind], namespace, params):
                for item in page:
                    if key_of(kind, item) is None:
                        continue  # it only looks like ours, and the cache does not take it in either
                    meta = item["metadata"]
                    listed[meta["namespace"], meta["name"]] = int(meta["resourceVersion"])
                versions.append(int(version or 0))
        return listed, min(versions, default=0)

    def _drop_ghosts(self, kind: Kind, listed: Listed, version: int) -> None:
        for place, (key, uid) in self._cache.names(kind).items():
            if place not in listed and self._cache.version(kind, *place) <= version:
                if kind == "pod":
                    self._cache.remove_pod(key, place[1], uid)
                else:
                    self._cache.remove(kind, key, place[1], uid)
                self._queue.add(key)
                metrics.GHOSTS.inc()

    def _lags(self, kind: Kind, place: tuple[str, str], newest: int) -> bool:
        return self._cache.version(kind, *place) < newest

    async def _still_there(self, kind: Kind, place: tuple[str, str], _: int) -> bool:
        return await self._api.exists(API_KINDS[kind], *place)
