"""One reconciliation of one job: observe, decide, execute, write the status; in this order, every time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from nemo_rl.job import names
from nemo_rl.job.status import JobStatus
from nemo_rl_operator import build, kueue, observe, reasons
from nemo_rl_operator.as_started import StartedJobs, going_on
from nemo_rl_operator.decide import Decision, decide, report_failure
from nemo_rl_operator.events import EventPoster
from nemo_rl_operator.execute import Executor, NamespaceGoneError, words
from nemo_rl_operator.observe import Blocked, Resource, Snapshot
from nemo_rl_operator.plan import Kind, Need
from nemo_rl_operator.progress import ProgressPuller
from nemo_rl_operator.runtime import timestamps
from nemo_rl_operator.runtime.cache import Cache, Key
from nemo_rl_operator.runtime.client import Api, ApiError
from nemo_rl_operator.status_writer import StatusWriter, Witness
from nemo_rl_operator.warning_events import WarningEvents

log = logging.getLogger(__name__)

MOST_READS = 10
"""Rounds of reading before one decision; two are what happens."""
SILENT_FAILURES = 3
"""So many calls in a row that fail for reasons that may pass are repeated without a word."""
LARGE_AT_ONCE = 2
"""Jobs with many inline rows that are looked at at once: each takes memory several times its size."""
PARTS_READ = 8
"""ConfigMaps of bundles that are looked for by name, one by one, where the list by label lacks them."""


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
        network: str = "",
        rollout_image: str = "",
        busy: Callable[[], bool],
        clock: Callable[[], datetime] = timestamps.now,
    ) -> None:
        self._api, self._cache, self._progress = api, cache, progress
        self._image, self._network, self._busy, self._clock = image, network, busy, clock
        self._rollout_image = rollout_image
        self._executor = Executor(api, cache, clock)
        self._writer = StatusWriter(api, cache, events, witness, busy=busy, clock=clock)
        self._warning_events = WarningEvents(api)
        self._started = StartedJobs(api)
        self._failures: dict[Key, int] = {}
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    async def __call__(self, key: Key) -> float | None:
        entry = self._cache.get(key)
        if entry.at_rest:
            self._forget(key)
            return None
        if entry.resource and entry.resource.abridged:
            async with self._large:
                return await self._reconcile(key)
        return await self._reconcile(key)

    async def _reconcile(self, key: Key) -> float | None:
        snapshot: Snapshot | None = None
        try:
            snapshot, decision = await self._decide(key)
            if snapshot is None:
                self._forget(key)
                return None
            snapshot, decision = await self._execute(snapshot, decision)
        except NamespaceGoneError:
            return None
        except ApiError as error:
            snapshot = snapshot or self._see(key)
            if snapshot is None:
                raise
            decision = self._failing(key, snapshot, error)
        else:
            self._failures.pop(key, None)
            self._writer.note_start(key, snapshot.resource.uid, decision.status)
        wake = await self._writer.write(key, snapshot, decision)
        self._follow_progress(key, snapshot, decision.status)
        return wake

    def _failing(self, key: Key, snapshot: Snapshot, error: ApiError) -> Decision:
        """The one place that turns a failing call about the job's objects into a condition.

        What may pass by itself within moments is raised again, so that the queue repeats it: conflicts, and the first
        few failures of a server that is busy or away.
        """
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        passing = error.transient and not _of_a_webhook(error)
        if error.status in (404, 409, 410) or (passing and failures < SILENT_FAILURES):
            raise error
        log.warning("%s/%s: %s", *key, error)
        blocked = Blocked(reasons.API_FAILS, f"a call to the API server fails: {words(error)}", fatal=False)
        return report_failure(replace(snapshot, blocked=blocked), self._clock())

    async def _execute(self, snapshot: Snapshot, decision: Decision) -> tuple[Snapshot, Decision]:
        """Carry the decision out; where something is refused, that which follows from it too."""
        if not decision.actions:
            return snapshot, decision
        done = await self._executor.run(snapshot.resource, decision.actions)
        if done.blocked or done.unserved:
            snapshot = replace(snapshot, blocked=done.blocked, unserved=done.unserved)
            decision = decide(snapshot, self._clock())
            if done.blocked and decision.actions:
                await self._executor.run(snapshot.resource, decision.actions)
        return snapshot, decision

    def _forget(self, key: Key) -> None:
        self._progress.forget(key)
        self._writer.forget(key)
        self._started.forget(key)
        self._failures.pop(key, None)

    def _see(self, key: Key, whole: Resource | None = None) -> Snapshot | None:
        entry = self._cache.get(key)
        found = entry.resource
        if found is None:
            return None
        started = self._started.known(key, found)
        if whole and (whole.uid, whole.version) == (found.uid, found.version):
            found = whole
        else:
            found = going_on(found, started)
        snapshot = observe.observe(
            found,
            entry.jobs.values(),
            entry.known_pods,
            self._progress.newest(key),
            self._image,
            network=self._network,
            begun=self._writer.begun(key, found.uid),
            expected=build.attempt_content,
            workload=entry.workload,
            rollout_image=self._rollout_image,
        )
        return replace(
            snapshot,
            unreadable=self._progress.unreadable(key),
            kueue=self._api.kueue_version,
            changed=started.changed if started else "",
        )

    async def _decide(self, key: Key) -> tuple[Snapshot | None, Decision]:
        """Decide, reading first what the decision asks for."""
        known: dict[str, Any] = {}
        whole: Resource | None = None
        for _ in range(MOST_READS):
            snapshot = self._see(key, whole)
            if snapshot is None:
                return None, Decision(JobStatus())
            if self._started.unread(key, snapshot.resource, snapshot.status):
                whole = await self._read_whole(key) if snapshot.resource.abridged else snapshot.resource
                if whole:
                    whole = await self._started.read(key, whole, snapshot.status)
                continue
            snapshot = replace(snapshot, **known)
            decision = decide(snapshot, self._clock())
            if not decision.needs:
                return snapshot, decision
            for need in decision.needs - {Need.ROWS}:
                known |= await self._read(need, key, snapshot)
            if Need.ROWS in decision.needs:
                whole = await self._read_whole(key)
                if whole and snapshot.changed:
                    whole = await self._started.read(key, whole, snapshot.status)
        raise RuntimeError(f"the decision asks for {decision.needs} again and again")

    async def _read(self, need: Need, key: Key, snapshot: Snapshot) -> dict[str, Any]:
        namespace = key[0]
        number = newest_attempt(snapshot)
        if need is Need.ATTEMPT:
            await self._read_attempt(key, snapshot.resource.uid, number)
            return {"verified": number}
        if need is Need.BUNDLES:
            return {"bundle_parts": await self._read_parts(namespace, snapshot)}
        if need is Need.WARNING_EVENT:
            if self._busy():  # then every start is slow, for the same reason
                return {"warning_event": ""}
            found = await self._warning_events.newest(snapshot, number, self._clock(), self._writer.beside(key))
            return {"warning_event": found}
        if need is Need.WORKLOAD:
            await self._read_workload(key)
            return {"workload_read": True}
        if need is Need.QUEUE:
            return {"queueing": await kueue.queueing(self._api, snapshot)}
        if need is Need.FLAVORS:
            return {"assignment": await kueue.assignment(self._api, snapshot.workload)}
        if need is Need.REPLICAS:
            return await self._read_replicas(key, snapshot)
        return {"held": await kueue.why_held(self._api, namespace, snapshot.attempts[number].uid)}

    async def _read_whole(self, key: Key) -> Resource | None:
        """The resource with all of its rows; the cache learns what it keeps of it."""
        raw = await self._api.get(Kind.RESOURCE, *key)
        if raw is None:
            found = self._cache.get(key).resource
            self._cache.remove("resource", key, key[1], found.uid if found else None)
            return None
        self._cache.put("resource", raw)
        return observe.resource(raw, whole=True)

    async def _read_parts(self, namespace: str, snapshot: Snapshot) -> frozenset[str]:
        """Which ConfigMaps of the job's bundles exist: by one list, and by name what somebody made without the label."""
        parts = dict.fromkeys(part for bundle in snapshot.spec.bundles for part in bundle.config_maps)
        there = set(await self._api.labelled(Kind.CONFIG_MAP, namespace, names.LABEL_BUNDLE)) & set(parts)
        missing = [part for part in parts if part not in there]
        for part in missing[:PARTS_READ]:
            if await self._api.exists(Kind.CONFIG_MAP, namespace, part):
                there.add(part)
        return frozenset(there)

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

    async def _read_replicas(self, key: Key, snapshot: Snapshot) -> dict[str, Any]:
        """The StatefulSet of the job's replicas, and where it lacks pods, the newest warning about it."""
        raw = await self._api.get(Kind.STATEFUL_SET, key[0], names.rollout(key[1]))
        found = observe.replica_set_view(raw) if raw else None
        warning = ""
        if found and snapshot.status.rollout and len(snapshot.replicas) < found.replicas:
            params = {"fieldSelector": f"involvedObject.uid={found.uid},type=Warning", "limit": "50"}
            events = await self._api.items(Kind.EVENT, key[0], params)
            last = max(events, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "", default=None)
            warning = f"{last.get('reason')}: {last.get('message')}" if last else ""
        return {"replica_set": found, "replica_set_read": True, "replica_warning": warning}

    async def _read_workload(self, key: Key) -> None:
        """Bring the cache up to date about the job's Workload."""
        name = names.workload(key[1])
        found = await self._api.get(Kind.WORKLOAD, key[0], name)
        if found:
            self._cache.put("workload", found)
        else:
            self._cache.remove("workload", key, name)

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


def _of_a_webhook(error: ApiError) -> bool:
    """Whether a webhook of somebody else failed: that seldom passes within moments."""
    return "webhook" in error.message
