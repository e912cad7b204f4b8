"""The operator's picture of the cluster: views of resources, Jobs and pods by job, fed by the watches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_rl.job import names
from nemo_rl_operator import observe
from nemo_rl_operator.observe import AttemptView, PodView, Resource, WorkloadView

Key = tuple[str, str]
"""Namespace and name of a job."""
Kind = Literal["resource", "job", "pod", "workload"]
KINDS: tuple[Kind, ...] = ("resource", "job", "pod")
"""What is there in every cluster; Workloads are Kueue's, and have a watch of their own."""


@dataclass(slots=True)
class Entry:
    resource: Resource | None = None
    jobs: dict[str, AttemptView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)
    workload: WorkloadView | None = None
    gone: set[str] = field(default_factory=set)
    """Names of pods that are remembered although they were deleted."""

    @property
    def known_pods(self) -> list[PodView]:
        """Pods to decide by. One that is gone tells how its Job ends, and nothing before that."""
        if not self.gone:
            return list(self.pods.values())
        ended = {job.uid for job in self.jobs.values() if job.finished or job.deleting}
        return [pod for name, pod in self.pods.items() if name not in self.gone or pod.controller in ended]

    @property
    def at_rest(self) -> bool:
        """Whether nothing is left to do: the job is finished, and so are all of its children."""
        return (
            self.resource is not None
            and self.resource.at_rest
            and all(job.finished for job in self.jobs.values())
            and (self.workload is None or self.workload.finished)
            and all(pod.terminal and pod.attempt for pod in self.pods.values())
        )

    @property
    def waits(self) -> bool:
        """Whether the job still waits for its start: nothing of it has run, or has ended."""
        return (
            self.resource is not None
            and self.resource.phase in ("", "Pending", "Queued", "Starting")
            and not any(job.finished for job in self.jobs.values())
            and all(pod.phase == "Pending" for pod in self.pods.values())
        )

    @property
    def empty(self) -> bool:
        return self.resource is None and not self.jobs and not self.pods and self.workload is None


def key_of(kind: Kind, raw: Mapping[str, Any]) -> Key | None:
    """The job that an object belongs to; None for one that only looks like ours."""
    meta = raw["metadata"]
    name = meta["name"] if kind == "resource" else (meta.get("labels") or {}).get(names.LABEL_JOB)
    if kind == "workload" and meta["name"] != names.workload(name or ""):
        return None
    return (meta["namespace"], name) if name else None


class Cache:
    """All that the watches have told, by job. Not thread-safe: everything runs in one event loop."""

    def __init__(self) -> None:
        self._entries: dict[Key, Entry] = {}
        self._versions: dict[tuple[Kind, str, str], tuple[str, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Entry:
        return self._entries.get(key) or Entry()

    def keys(self) -> list[Key]:
        return list(self._entries)

    def entries(self) -> Iterable[tuple[Key, Entry]]:
        return self._entries.items()

    def put(self, kind: Kind, raw: Mapping[str, Any]) -> Key | None:
        """Take in an object. The key of its job if something changed that matters; an older version is ignored."""
        key = key_of(kind, raw)
        if key is None or self._stale(kind, raw):
            return None
        entry = self._entries.setdefault(key, Entry())
        meta = raw["metadata"]
        if kind == "resource":
            found = observe.resource(raw)
            changed = entry.resource is None or not _same(entry.resource, found)
            entry.resource = found
        elif kind == "job":
            known = entry.jobs.get(meta["name"])
            job = observe.attempt_view(raw, known)
            changed = known != job
            entry.jobs[meta["name"]] = job
        elif kind == "workload":
            workload = observe.workload_view(raw)
            changed = entry.workload != workload
            entry.workload = workload
        else:
            pod = observe.pod_view(raw)
            changed = entry.pods.get(meta["name"]) != pod
            entry.pods[meta["name"]] = pod
        return key if changed else None

    def remove(self, kind: Kind, key: Key, name: str, uid: str | None = None) -> Key | None:
        """Forget an object that is gone, unless a newer one of that name (another uid) has taken its place."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        children: dict[str, Any] = {}
        if kind == "job":
            children = entry.jobs
        elif kind == "pod":
            children = entry.pods
        held: Any = children.get(name)
        if kind in ("resource", "workload"):
            held = entry.resource if kind == "resource" else entry.workload
        if held is None or (uid is not None and held.uid != uid):
            return None
        if kind == "resource":
            entry.resource = None
        elif kind == "workload":
            entry.workload = None
        else:
            del children[name]
        self._versions.pop((kind, key[0], name), None)
        if kind == "pod":
            entry.gone.discard(name)
        if kind == "job":
            self._forget(key, entry, [n for n in entry.gone if entry.pods[n].controller == held.uid])
        if entry.empty:
            del self._entries[key]
        return key

    def pod_gone(self, raw: Mapping[str, Any]) -> Key | None:
        """Take in the last news of a pod that is gone. The key of its job if that matters."""
        key = key_of("pod", raw)
        if key is None:
            return None
        self.put("pod", raw)
        return self.remove_pod(key, raw["metadata"]["name"], raw["metadata"]["uid"])

    def remove_pod(self, key: Key, name: str, uid: str) -> Key | None:
        """A pod is gone. The key of its job if that matters.

        One that had ended is remembered for as long as its Job: it explains the Job's failure, which comes later.
        Of each index only the newest is: there may be many in the life of a Job that Kueue suspends again and again.
        """
        entry = self.get(key)
        pod = entry.pods.get(name)
        if pod is None or pod.uid != uid:
            return None
        if not (pod.terminal and pod.attempt and any(job.uid == pod.controller for job in entry.jobs.values())):
            return self.remove("pod", key, name, uid)
        older = [n for n in entry.gone if n != name and _same_place(entry.pods[n], pod)]
        self._forget(key, entry, older)
        entry.gone.add(name)
        return key

    def _forget(self, key: Key, entry: Entry, pods: Iterable[str]) -> None:
        for name in pods:
            del entry.pods[name]
            entry.gone.discard(name)
            self._versions.pop(("pod", key[0], name), None)

    def names(self, kind: Kind) -> dict[tuple[str, str], tuple[Key, str]]:
        """(namespace, name) of every object of the kind that is still there, with its job's key and its uid."""
        found: dict[tuple[str, str], tuple[Key, str]] = {}
        for key, entry in self._entries.items():
            if kind == "resource":
                if entry.resource:
                    found[key] = (key, entry.resource.uid)
                continue
            if kind == "workload":
                if entry.workload:
                    found[key[0], entry.workload.name] = (key, entry.workload.uid)
                continue
            children: Mapping[str, AttemptView | PodView] = entry.jobs if kind == "job" else entry.pods
            for name, child in children.items():
                if kind == "job" or name not in entry.gone:
                    found[key[0], name] = (key, child.uid)
        return found

    def version(self, kind: Kind, namespace: str, name: str) -> int:
        """Newest resource version snapshot of the object; 0 where none was."""
        return self._versions.get((kind, namespace, name), ("", 0))[1]

    def sizes(self) -> dict[Kind, int]:
        return {
            "resource": sum(entry.resource is not None for entry in self._entries.values()),
            "job": sum(len(entry.jobs) for entry in self._entries.values()),
            "pod": sum(len(entry.pods) for entry in self._entries.values()),
            "workload": sum(entry.workload is not None for entry in self._entries.values()),
        }

    def _stale(self, kind: Kind, raw: Mapping[str, Any]) -> bool:
        """Whether a newer version of this very object is known: our own writes come back later through the watch."""
        meta = raw["metadata"]
        version = meta.get("resourceVersion", "")
        if not version.isdigit():
            return False
        place = (kind, meta["namespace"], meta["name"])
        uid, newest = self._versions.get(place, ("", 0))
        if uid == meta["uid"] and int(version) < newest:
            return True
        self._versions[place] = (meta["uid"], int(version))
        return False


def _same_place(one: PodView, other: PodView) -> bool:
    return (one.controller, one.index) == (other.controller, other.index)


def _same(old: Resource, new: Resource) -> bool:
    """Whether only bookkeeping differs: the version and who manages which field."""
    return (old.uid, old.spec, old.status, old.deleting, old.queue, old.priority, old.restored) == (
        new.uid,
        new.spec,
        new.status,
        new.deleting,
        new.queue,
        new.priority,
        new.restored,
    )
