"""When and what of a status is written: not what the next status makes superfluous, and not what cannot be written.

The only place that knows of load and of other jobs: decisions are about one job, and as if it were alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from nemo_rl.job.status import JobStatus
from nemo_rl.job.text import one_line
from nemo_rl_operator import metrics
from nemo_rl_operator.decide import Decision
from nemo_rl_operator.events import EventPoster
from nemo_rl_operator.observe import Snapshot
from nemo_rl_operator.patience import patience
from nemo_rl_operator.policies import running
from nemo_rl_operator.runtime.cache import Cache, Key
from nemo_rl_operator.runtime.client import Api, ApiError, Object

log = logging.getLogger(__name__)

DEFER_SECONDS = 5.0
FIRST_WORD_SECONDS = 0.3
"""For so long, and longer with every other job that starts beside it, the status does not say that a job starts: it
soon runs, and then that is all there is to say."""
REPEAT_SECONDS = 60.0
"""A write that the API server took and that changed nothing is repeated no sooner."""


class Witness(Protocol):
    """Hears of every write, to notice when the watch does not report it back."""

    def wrote(self, key: Key, version: str) -> None: ...


@dataclass
class _Start:
    """An attempt that starts: its job's uid, its number, when it began to, and how many others did beside it at most.

    The last of many has waited for all of them, although few are left by then.
    """

    uid: str
    number: int
    time: datetime
    others: int = 0


class StatusWriter:
    """Writes the statuses of all jobs, and remembers of each what it has put off and what was not taken."""

    def __init__(
        self,
        api: Api,
        cache: Cache,
        events: EventPoster,
        witness: Witness,
        *,
        busy: Callable[[], bool],
        clock: Callable[[], datetime],
    ) -> None:
        self._api, self._cache, self._events, self._witness = api, cache, events, witness
        self._busy, self._clock = busy, clock
        self._starting: dict[Key, _Start] = {}
        self._without_effect: dict[Key, tuple[Object, datetime]] = {}
        """The newest patch that changed nothing: the definition is older than this operator, and lacks a field."""
        self._refused: dict[Key, Object] = {}
        """What pods said that the API server refused as part of a status."""

    def forget(self, key: Key) -> None:
        for memory in (self._starting, self._without_effect, self._refused):
            memory.pop(key, None)

    def begun(self, key: Key, uid: str) -> int:
        """Number of the attempt of this very job that starts, as far as this process knows; 0 if none does."""
        start = self._starting.get(key)
        return start.number if start and start.uid == uid else 0

    def beside(self, key: Key) -> int:
        """How many other jobs start, or started, beside this one's start."""
        start = self._starting.get(key)
        return start.others if start else len(self._starting)

    def note_start(self, key: Key, uid: str, status: JobStatus) -> None:
        """Once its objects are made: which attempt starts."""
        number = status.attempt or 0
        if status.phase != "Starting" and status.reason not in running.ORDINARY:
            self._starting.pop(key, None)
        elif self.begun(key, uid) != number:
            self._starting[key] = _Start(uid, number, self._clock())
        if start := self._starting.get(key):
            start.others = max(start.others, len(self._starting) - 1)

    async def write(self, key: Key, snapshot: Snapshot, decision: Decision) -> float | None:
        """Write the status if it differs and is worth it, then post the Events that go with it.

        Seconds after which to look again, if any. Raises ApiError where the whole reconciliation is to be repeated.
        """
        look = decision.requeue_after
        if look is not None and decision.status.reason in running.ORDINARY and key in self._starting:
            look += patience(self.beside(key))
        if decision.status == snapshot.status:
            return look
        old, new = snapshot.status.dump(), decision.status.dump()
        if old == new or snapshot.resource.deleting:
            return look
        wait = self._may_wait(key, old, new)
        if wait > 0:
            return min(wait, look or wait)
        if not await self._write(key, snapshot, old, new):
            return look
        for event in decision.events:
            self._events.post(snapshot.resource, event)
        _count_ends(snapshot.status, decision.status)
        if old.get("phase") != new.get("phase"):
            log.info("%s/%s: %s: %s", *key, new.get("phase"), one_line(str(new.get("message"))))
        return look

    def _may_wait(self, key: Key, old: Object, new: Object) -> float:
        """Seconds for which this need not be written, since the next status may make it superfluous."""
        start = self._starting.get(key)
        if start and new.get("attempt") == start.number and new.get("reason") in running.ORDINARY:
            age = (self._clock() - start.time).total_seconds()
            if "phase" not in old and new.get("phase") == "Starting" and start.number == 1:
                return FIRST_WORD_SECONDS + patience(start.others) - age
            before = old.get("reason") in running.ORDINARY if "phase" in old else start.number == 1
            if before and old.get("attempt", start.number) == start.number:
                return running.QUIET_SECONDS - age  # what every start goes through for a moment
        progress_only = all(
            old.get(name) == new.get(name) for name in {*old, *new} - {"progress", "checkpoint", "score", "bottleneck"}
        )
        return DEFER_SECONDS if progress_only and self._busy() else 0.0

    async def _write(self, key: Key, snapshot: Snapshot, old: Object, new: Object) -> bool:
        """Whether something was written, or need not be."""
        resource = snapshot.resource
        said = _said_by_pods(new)
        if said and said == self._refused.get(key):
            new = _without_pods(old, new)
        patch = merge_patch(old, new)
        before, since = self._without_effect.get(key, ({}, self._clock()))
        if not patch or (patch == before and (self._clock() - since).total_seconds() < REPEAT_SECONDS):
            return False
        try:
            written = await self._patch(key, resource.version, old, new, patch)
        except ApiError as error:
            if error.status == 404:
                self._cache.remove("resource", key, resource.name, resource.uid)
                return False
            if error.status == 409:
                metrics.CONFLICTS.inc()
            raise
        self._cache.put("resource", written)
        version = written["metadata"]["resourceVersion"]
        if version == resource.version:
            if key not in self._without_effect:
                log.warning(
                    "%s/%s: the API server does not keep all of the status; is the definition older than this operator?",
                    *key,
                )
            self._without_effect[key] = (patch, self._clock())
            return False
        self._witness.wrote(key, version)
        return True

    async def _patch(self, key: Key, version: str, old: Object, new: Object, patch: Object) -> Object:
        """Write; where the API server finds something wrong with it, once more without what pods said."""
        try:
            return await self._api.patch_status(*key, version, patch)
        except ApiError as error:
            said = _said_by_pods(new)
            if error.status not in (400, 413, 422) or not said:
                raise
            self._refused[key] = said
            log.warning("%s/%s: the API server refuses what a pod said: %s", *key, one_line(error.message[:500]))
            return await self._api.patch_status(*key, version, merge_patch(old, _without_pods(old, new)))


_POD_FIELDS = ("progress", "checkpoint", "score", "bottleneck")


def _said_by_pods(status: Object) -> Object:
    """The parts of a status that pods have a say in."""
    found = {name: status[name] for name in _POD_FIELDS if name in status}
    result, failure = status.get("result") or {}, status.get("failure") or {}
    found |= {name: result[name] for name in ("metrics",) if result.get(name)}
    found |= {name: failure[name] for name in ("traceback",) if failure.get(name)}
    members = (status.get("rollout") or {}).get("members")
    return found | ({"members": members} if members else {})


def _without_pods(old: Object, new: Object) -> Object:
    """The new status with these parts as they were."""
    found = {name: value for name, value in new.items() if name not in _POD_FIELDS}
    found |= {name: old[name] for name in _POD_FIELDS if name in old}
    if "result" in found:
        found["result"] = {"totalSteps": found["result"].get("totalSteps", 0)}
    if "rollout" in found:
        found["rollout"] = {name: value for name, value in found["rollout"].items() if name != "members"}
    if "failure" in found:
        found["failure"] = {name: value for name, value in found["failure"].items() if name != "traceback"}
    return found


def merge_patch(old: Object, new: Object) -> Object:
    """The JSON merge patch that turns `old` into `new`."""
    patch: Object = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if before == value:
            continue
        patch[name] = merge_patch(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return patch


def _count_ends(old: JobStatus, new: JobStatus) -> None:
    ended = {attempt.number for attempt in old.attempts if attempt.end_time}
    for attempt in new.attempts:
        if attempt.end_time and attempt.number not in ended:
            metrics.ATTEMPTS.labels(attempt.cause or "Unknown").inc()
