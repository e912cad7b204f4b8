"""Warning Events about attempts that are slow to start. Reading them costs the API server, so it is done sparingly."""

from __future__ import annotations

import time
from datetime import datetime

from nemo_rl_operator.observe import Snapshot
from nemo_rl_operator.patience import patience
from nemo_rl_operator.plan import Kind
from nemo_rl_operator.policies import running
from nemo_rl_operator.runtime import timestamps
from nemo_rl_operator.runtime.client import Api

PER_SECOND, BURST = 2.0, 20.0
"""Reads of all jobs together."""


class WarningEvents:
    """Reads the newest warning about an attempt, if it is time to and others leave room."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._tokens, self._counted = BURST, time.monotonic()

    async def newest(self, snapshot: Snapshot, number: int, now: datetime, beside: int) -> str:
        """The warning about the attempt's first pending pod, or about its Job where it has none; else empty.

        `beside`: how many other jobs start; each makes every start slower, and none of them an anomaly.
        """
        job = snapshot.attempts[number]
        age = -(timestamps.seconds_until(job.created, now) or 0.0)
        if age < running.QUIET_SECONDS + patience(beside) or not self._take():
            return ""
        pods = [pod for pod in snapshot.pods.get(number, ()) if pod.phase == "Pending"]
        selector = f"involvedObject.uid={pods[0].uid if pods else job.uid},type=Warning"
        params = {"fieldSelector": selector, "limit": "50"}
        found = await self._api.items(Kind.EVENT, snapshot.resource.namespace, params)
        last = max(found, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "", default=None)
        return f"{last.get('reason')}: {last.get('message')}" if last else ""

    def _take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(BURST, self._tokens + (now - self._counted) * PER_SECOND)
        self._counted = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
