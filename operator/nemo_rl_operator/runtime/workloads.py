"""A watch of Kueue's Workloads of our jobs, for as long as the cluster has Kueue; one request a minute where it has not.

kopf cannot watch what may be installed later, and its list of everything that is watched is fixed at its start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from nemo_rl.job import names
from nemo_rl_operator import metrics
from nemo_rl_operator.plan import Kind
from nemo_rl_operator.runtime.cache import Cache, Key
from nemo_rl_operator.runtime.client import Api, ApiError, Object

log = logging.getLogger(__name__)

LOOK_SECONDS = 60.0
"""Between two looks whether Kueue is there."""
WATCH_SECONDS = 300
RETRY_SECONDS = 2.0
PAGE = 200


class WorkloadWatch:
    """Feeds the cache; `changed` hears of every job to look at."""

    def __init__(self, api: Api, cache: Cache, changed: Callable[[Key], None], namespaces: Sequence[str]) -> None:
        self._api, self._cache, self._changed = api, cache, changed
        self._namespaces: Sequence[str | None] = list(namespaces) or [None]
        self.listed = asyncio.Event()
        """Set once all Workloads are known, or it is known that there are none."""

    async def run(self) -> None:
        while True:
            try:
                version = await self._api.find_kueue()
            except ApiError as error:
                log.warning("cannot ask whether Kueue is installed: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if version:
                log.info("Kueue is installed (API %s): its Workloads are watched", version)
                self._look_at_queued()
                await asyncio.gather(*(self._follow(namespace) for namespace in self._namespaces))
                log.info("Kueue's API is gone")
                self._api.kueue_version = ""
                self._look_at_queued()
            self.listed.set()
            await asyncio.sleep(LOOK_SECONDS)

    def _look_at_queued(self) -> None:
        """Jobs that wait hear that Kueue has come or gone."""
        for key, entry in self._cache.entries():
            if entry.resource and entry.resource.phase == "Queued":
                self._changed(key)

    async def _follow(self, namespace: str | None) -> None:
        """List and watch one namespace, or all, until the API is gone."""
        version = ""
        while True:
            try:
                version = version or await self._list(namespace)
                version = await self._watch(namespace, version)
            except ApiError as error:
                if error.status == 410:
                    version = ""
                    continue
                if error.status == 404:
                    return
                log.warning("Workloads of Kueue: %s", error)
                self.listed.set()  # the rest of the operator does not wait for what may be refused for good
                await asyncio.sleep(RETRY_SECONDS if error.status != 403 else LOOK_SECONDS)

    async def _list(self, namespace: str | None) -> str:
        """Take in all Workloads and drop those that are gone; the version of the list."""
        there: set[tuple[str, str]] = set()
        params = {"labelSelector": names.LABEL_JOB, "limit": str(PAGE)}
        while True:
            page = await self._api.page(Kind.WORKLOAD, namespace, params)
            meta = page.get("metadata")
            if not isinstance(meta, dict):
                raise ApiError(0, "Unreadable", "a list of Workloads is no list")
            for raw in page.get("items") or ():
                there.add((raw["metadata"]["namespace"], raw["metadata"]["name"]))
                self._take_in("LISTED", raw)
            if not meta.get("continue"):
                break
            params = params | {"continue": meta["continue"]}
        version = str(meta.get("resourceVersion", ""))
        for place, (key, uid) in self._cache.names("workload").items():
            ours = namespace is None or place[0] == namespace
            if ours and place not in there and self._cache.version("workload", *place) <= int(version or 0):
                self._take(self._cache.remove("workload", key, place[1], uid), "DELETED")
        self.listed.set()
        return version

    async def _watch(self, namespace: str | None, version: str) -> str:
        """Follow until the server ends the watch; the version to go on from."""
        params = {"labelSelector": names.LABEL_JOB}
        async for event in self._api.watch(Kind.WORKLOAD, namespace, version, params, WATCH_SECONDS):
            raw = event.get("object")
            if isinstance(raw, dict) and isinstance(raw.get("metadata"), dict):
                version = str(raw["metadata"].get("resourceVersion") or version)
                if event.get("type") != "BOOKMARK":
                    self._take_in(str(event.get("type")), raw)
        return version

    def _take_in(self, kind: str, raw: Object) -> None:
        """Take in one Workload; one that nobody can read stops none of the others."""
        meta = raw["metadata"]
        try:
            if kind == "DELETED":
                key = (meta["namespace"], (meta.get("labels") or {}).get(names.LABEL_JOB, ""))
                self._take(self._cache.remove("workload", key, meta["name"], meta["uid"]), kind)
            else:
                self._take(self._cache.put("workload", raw), kind)
        except (AttributeError, KeyError, TypeError, ValueError):
            log.exception("Workload %s/%s cannot be read", meta.get("namespace"), meta.get("name"))

    def _take(self, key: Key | None, kind: str) -> None:
        metrics.WATCH_EVENTS.labels("workload", kind).inc()
        if key:
            self._changed(key)
