"""Post Kubernetes Events: each once, and never so many that they slow down the work itself."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque

from nemo_rl.job import names
from nemo_rl.job.text import clean
from nemo_rl_operator import metrics
from nemo_rl_operator.observe import Resource
from nemo_rl_operator.plan import Event, Kind
from nemo_rl_operator.runtime import timestamps
from nemo_rl_operator.runtime.client import Api, ApiError, Object

log = logging.getLogger(__name__)

BURST, PER_SECOND = 50, 2.0
"""Normal Events beyond this rate are dropped: a thousand jobs at once need the API server for themselves."""
BACKLOG = 1000
PAUSE_SECONDS = 0.2
"""Before Events are posted, so that the status that they tell of, and those of other jobs, are written first."""
COMPONENT = "nemo-rl-operator"


class EventPoster:
    """Posts in the background. An Event's name follows from what it says, so a repeated one is refused."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._waiting: deque[tuple[Resource, Event]] = deque()
        self._some = asyncio.Event()
        self._tokens, self._counted = float(BURST), time.monotonic()

    def post(self, resource: Resource, event: Event) -> None:
        if len(self._waiting) >= BACKLOG or not (event.warning or self._take()):
            metrics.EVENTS_DROPPED.inc()
            return
        self._waiting.append((resource, event))
        self._some.set()

    async def run(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(PAUSE_SECONDS)
            while self._waiting:
                resource, event = self._waiting.popleft()
                try:
                    await self._api.create(Kind.EVENT, resource.namespace, body(resource, event))
                except ApiError as error:
                    if error.status != 409:
                        metrics.EVENTS_DROPPED.inc()
                        log.debug("event %s dropped: %s", event.reason, error)
            self._some.clear()

    def _take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(float(BURST), self._tokens + (now - self._counted) * PER_SECOND)
        self._counted = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def body(resource: Resource, event: Event) -> Object:
    """The Event about the job."""
    digest = hashlib.sha256(f"{resource.uid} {event.reason} {event.key}".encode()).hexdigest()[:16]
    now = timestamps.now()
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{resource.name}.{digest}", "namespace": resource.namespace},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "namespace": resource.namespace,
            "name": resource.name,
            "uid": resource.uid,
        },
        "reason": event.reason,
        "message": clean(event.message)[:1000],
        "type": "Warning" if event.warning else "Normal",
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": COMPONENT,
        "firstTimestamp": timestamps.write(now),
        "lastTimestamp": timestamps.write(now),
        "count": 1,
    }
