"""One reconciliation of one job: observe, decide, execute, write the status, post Events; in this order, every time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from nemo_rl.job import names
from nemo_rl.job.status import JobStatus
from nemo_rl_operator import build, metrics, observe
from nemo_rl_operator.decide import Decision, decide
from nemo_rl_operator.events import EventPoster
from nemo_rl_operator.execute import Executor, NamespaceGoneError
from nemo_rl_operator.observe import Snapshot
from nemo_rl_operator.patience import patience
from nemo_rl_operator.plan import Kind, Need
from nemo_rl_operator.policies import running
from nemo_rl_operator.progress import ProgressPuller
from nemo_rl_operator.runtime import timestamps
from nemo_rl_operator.runtime.cache import Cache, Key
from nemo_rl_operator.runtime.client import Api, ApiError, Object
from nemo_rl_operator.warning_events import WarningEvents

log = logging.getLogger(__name__)

DEFER_SECONDS = 5.0
FIRST_WORD_SECONDS = 0.3
"""For so long, and longer with every other job that starts beside it, the status does not say that a job starts: it
soon runs, and then that is all there is to say."""


MOST_READS = 10
"""Rounds of reading before one decision; two are what happens."""


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


class Reconciler:
    """Call it with a key; it returns the seconds after which to come back, if any, and raises to be called again."""

    def __init__(
        self,
        api: Api,
        cache: Cache,
        events: EventPoster,
        progress: ProgressPuller,
        witness: Witness,
        *,
        image: str,
        busy: Callable[[], bool],
        clock: Callable[[], datetime] = timestamps.now,
    ) -> None:
        self._api, self._cache, self._events, self._progress = api, cache, events, progress
        self._witness, self._image, self._busy, self._clock = witness, image, busy, clock
        self._executor = Executor(api, cache)
        self._incidents = WarningEvents(api)
        self._starting: dict[Key, _Start] = {}

    async def __call__(self, key: Key) -> float | None:
        if self._cache.get(key).at_rest:
            self._forget(key)
            return None
        snapshot, decision = await self._decide(key)
        if snapshot is None:
            self._forget(key)
            return None
        if decision.actions:
            try:
                blocked = await self._executor.run(snapshot.resource, decision.actions)
            except NamespaceGoneError:
                return None
            if blocked:
                decision = decide(replace(snapshot, blocked=blocked), self._clock())
                if decision.actions:
                    await self._executor.run(snapshot.resource, decision.actions)
        self._note_start(key, snapshot.resource.uid, decision.status)
        wake = await self._report(key, snapshot, decision)
        self._follow_progress(key, snapshot, decision.status)
        return wake

    def _forget(self, key: Key) -> None:
        self._progress.forget(key)
        self._starting.pop(key, None)

    def _see(self, key: Key) -> Snapshot | None:
        entry = self._cache.get(key)
        if entry.resource is None:
            return None
        progress, begun = self._progress.newest(key), self._begun(key, entry.resource.uid)
        snapshot = observe.observe(
            entry.resource,
            entry.jobs.values(),
            entry.known_pods,
            progress,
            self._image,
            begun=begun,
            expected=build.attempt_content,
        )
        return replace(snapshot, unreadable=self._progress.unreadable(key))

    def _beside(self, key: Key) -> int:
        """How many other jobs start, or started, beside this one's start."""
        start = self._starting.get(key)
        return start.others if start else len(self._starting)

    def _note_start(self, key: Key, uid: str, status: JobStatus) -> None:
        """Once its objects are made: which attempt starts."""
        number = status.attempt or 0
        if status.phase != "Starting" and status.reason not in running.ORDINARY:
            self._starting.pop(key, None)
        elif self._begun(key, uid) != number:
            self._starting[key] = _Start(uid, number, self._clock())
        if start := self._starting.get(key):
            start.others = max(start.others, len(self._starting) - 1)

    def _begun(self, key: Key, uid: str) -> int:
        """Number of the attempt of this very job that starts, as far as this process knows; 0 if none does."""
        start = self._starting.get(key)
        return start.number if start and start.uid == uid else 0

    async def _decide(self, key: Key) -> tuple[Snapshot | None, Decision]:
        """Decide, reading first what the decision asks for."""
        known: dict[str, Any] = {}
        for _ in range(MOST_READS):
            snapshot = self._see(key)
            if snapshot is None:
                return None, Decision(JobStatus())
            snapshot = replace(snapshot, **known)
            decision = decide(snapshot, self._clock())
            if not decision.needs:
                return snapshot, decision
            for need in decision.needs:
                known |= await self._read(need, key, snapshot)
        raise RuntimeError(f"the decision asks for {decision.needs} again and again")

    async def _read(self, need: Need, key: Key, snapshot: Snapshot) -> dict[str, Any]:
        namespace = key[0]
        number = newest_attempt(snapshot)
        if need is Need.ATTEMPT:
            await self._read_attempt(key, snapshot.resource.uid, number)
            return {"verified": number}
        if need is Need.BUNDLES:
            assert snapshot.spec
            parts = {part for bundle in snapshot.spec.bundles for part in bundle.config_maps}
            there = {part for part in sorted(parts) if await self._api.exists(Kind.CONFIG_MAP, namespace, part)}
            return {"bundle_parts": frozenset(there)}
        if need is Need.WARNING_EVENT:
            if self._busy():  # then every start is slow, for the same reason
                return {"warning_event": ""}
            return {"warning_event": await self._incidents.newest(snapshot, number, self._clock(), self._beside(key))}
        return {"workload": await self._workload(namespace, snapshot, number)}

    async def _read_attempt(self, key: Key, uid: str, number: int) -> None:
        """Bring the cache up to date about one attempt: its Job, and pods that may have outlived it."""
        name = names.attempt_job(key[1], number)
        found = await self._api.get(Kind.JOB, key[0], name)
        if found:
            self._cache.put("job", found)
        else:
            self._cache.remove("job", key, name)
        selector = f"{names.LABEL_JOB_UID}={uid},{names.LABEL_ATTEMPT}={number}"
        pods = await self._api.items(Kind.POD, key[0], {"labelSelector": selector})
        for pod in pods:
            self._cache.put("pod", pod)
        there = {pod["metadata"]["name"] for pod in pods}
        for pod_view in list(self._cache.get(key).pods.values()):
            if pod_view.owner == uid and pod_view.attempt == number and pod_view.name not in there:
                self._cache.remove_pod(key, pod_view.name, pod_view.uid)

    async def _workload(self, namespace: str, snapshot: Snapshot, number: int) -> str:
        """Why Kueue holds the attempt."""
        label = f"kueue.x-k8s.io/job-uid={snapshot.attempts[number].uid}"
        for workload in await self._api.workloads(namespace, {"labelSelector": label}):
            for condition in (workload.get("status") or {}).get("conditions") or ():
                if condition.get("type") == "QuotaReserved" and condition.get("status") == "False":
                    return str(condition.get("message", ""))[:500]
        return ""

    async def _report(self, key: Key, snapshot: Snapshot, decision: Decision) -> float | None:
        """Write the status if it differs, then post the Events that go with it."""
        resource, look = snapshot.resource, decision.requeue_after
        if look is not None and decision.status.reason in running.ORDINARY and key in self._starting:
            look += patience(self._beside(key))
        old, new = snapshot.status.dump(), decision.status.dump()
        if old == new or resource.deleting:
            return look
        wait = self._may_wait(key, old, new)
        if wait > 0:
            return min(wait, look or wait)
        try:
            written = await self._api.patch_status(*key, resource.version, merge_patch(old, new))
        except ApiError as error:
            if error.status == 404:
                self._cache.remove("resource", key, resource.name, resource.uid)
                return None
            if error.status == 409:
                metrics.CONFLICTS.inc()
            raise
        self._cache.put("resource", written)
        self._witness.wrote(key, written["metadata"]["resourceVersion"])
        for event in decision.events:
            self._events.post(resource, event)
        _count_ends(snapshot.status, decision.status)
        if old.get("phase") != new.get("phase"):
            log.info("%s/%s: %s: %s", *key, new.get("phase"), new.get("message"))
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
            old.get(name) == new.get(name) for name in {*old, *new} - {"progress", "checkpoint", "score"}
        )
        return DEFER_SECONDS if progress_only and self._busy() else 0.0

    def _follow_progress(self, key: Key, snapshot: Snapshot, status: JobStatus) -> None:
        """Pull progress from the pod with index 0 while it runs."""
        if status.phase == "Running":
            for pod in observe.newest(snapshot.pods.get(status.attempt or 0, ())):
                if pod.index == 0 and pod.phase == "Running" and pod.ip and not pod.deleting:
                    self._progress.follow(key, pod.uid, pod.ip)
                    return
        self._progress.forget(key)


def newest_attempt(snapshot: Snapshot) -> int:
    """Number of the newest attempt, by status and Jobs, and by what was made just now."""
    return max([snapshot.status.attempt or 0, snapshot.begun, *snapshot.attempts])


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
