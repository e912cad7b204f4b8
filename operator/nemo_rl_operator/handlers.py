"""The only module that knows kopf: it feeds the cache from the watches and queues the jobs that changed.

kopf is the informer, the login and the process shell. No handler here decides or writes anything, so there are no
finalizers and no annotations on anybody's objects.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import kopf

from nemo_rl.job import names
from nemo_rl_operator import metrics
from nemo_rl_operator.runtime.cache import Cache, Kind, key_of
from nemo_rl_operator.runtime.client import Access, Api
from nemo_rl_operator.runtime.transport import CarefulSession

log = logging.getLogger(__name__)

TOKEN_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class _NoEssence(kopf.DiffBaseStorage):
    """kopf copies each object with each event to compare it later; for handlers that we do not have."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        pass


class _NoRecords(kopf.ProgressStorage):
    """Likewise: records of handlers that we do not have."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf's settings, each for a reason: see its documentation of configuration and continuity."""
    settings.peering.standalone = True
    settings.posting.enabled = False  # we post our own Events, each once
    # server side, else every pod of the cluster would be streamed to us
    settings.watching.label_selectors["v1/pods"] = names.LABEL_JOB
    settings.watching.label_selectors["batch", "v1", "jobs"] = names.LABEL_JOB
    settings.watching.chunk_size = 100  # whole pages are in memory, as text and as objects
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = [0.5, 1, 1, 2, 2, 3, 3, 5, 5, 5, 5, 5, 5, 10, 10, 10]
    settings.persistence.diffbase_storage = _NoEssence()
    settings.persistence.progress_storage = _NoRecords()  # both together: half of kopf's time per event
    settings.queueing.idle_timeout = 0.05  # of a task per object: at a start there is one for each
    settings.queueing.exit_timeout = 0.2  # nothing is lost: all state is in the cluster
    settings.execution.max_workers = 1  # all handlers are asynchronous


async def run(
    namespaces: Sequence[str],
    *,
    api: Api,
    cache: Cache,
    changed: Callable[[tuple[str, str]], None],
    heard: Callable[[Kind, dict[str, Any]], None],
    on_start: Callable[[], Awaitable[None]],
    on_stop: Callable[[], Awaitable[None]],
) -> None:
    """Run kopf until SIGTERM or SIGINT, over all namespaces if none are given.

    `heard` is told of every event, `changed` of every job to look at.
    """
    registry = kopf.OperatorRegistry()

    def take(kind: Kind, event: kopf.RawEvent) -> None:
        raw: dict[str, Any] = dict(event["object"])
        deleted = event["type"] == "DELETED"
        metrics.WATCH_EVENTS.labels(kind, event["type"] or "LISTED").inc()
        key = key_of(kind, raw)
        if deleted and kind == "pod":
            key = cache.pod_gone(raw)
        elif key and deleted:
            key = cache.remove(kind, key, raw["metadata"]["name"], raw["metadata"].get("uid"))
        elif key:
            key = cache.put(kind, raw)
        heard(kind, raw)
        if key:
            changed(key)

    @kopf.on.startup(registry=registry)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        await on_start()

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        await on_stop()

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> kopf.AiohttpSession:
        in_cluster = kopf.login_with_service_account(**kwargs)
        info = in_cluster or kopf.login_with_kubeconfig(**kwargs)
        if info is None:
            raise kopf.LoginError("found neither a service account nor a kubeconfig; run in a pod, or set KUBECONFIG")
        token_file = TOKEN_FILE if in_cluster and TOKEN_FILE.exists() else None
        tls = info.as_ssl_context()
        await api.connect(Access(info.server, tls, info.as_http_headers(), token_file))

        async def renew() -> None:
            if found := kopf.login_with_kubeconfig(**kwargs):
                await api.connect(Access(found.server, found.as_ssl_context(), found.as_http_headers()))

        api.renew = None if in_cluster else renew
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls), headers=info.as_http_headers(), proxy=info.proxy_url
        )
        return kopf.AiohttpSession(
            server=info.server,
            default_namespace=info.default_namespace,
            aiohttp_session=CarefulSession(session),  # type: ignore[arg-type]
        )

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    async def resource_event(event: kopf.RawEvent, **_: Any) -> None:
        take("resource", event)

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    async def job_event(event: kopf.RawEvent, **_: Any) -> None:
        take("job", event)

    @kopf.on.event("v1", "pods", registry=registry)
    async def pod_event(event: kopf.RawEvent, **_: Any) -> None:
        take("pod", event)

    if namespaces:
        await kopf.operator(registry=registry, standalone=True, namespaces=list(namespaces))
    else:
        await kopf.operator(registry=registry, standalone=True, clusterwide=True)
