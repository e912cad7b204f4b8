"""Follows a job on the cluster: every change of the resource, and the log of the newest attempt's first pod."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from nemo_rl.backends.kubernetes.connect import CHECK_OPERATOR, INSTALL, Cluster, Object, core_path, job_path
from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError, JobNotFound
from nemo_rl.backends.kubernetes.logs import LogSource, follow_log
from nemo_rl.backends.kubernetes.screen import Screen
from nemo_rl.job import decode, names
from nemo_rl.job.status import JobStatus

OPERATOR_SECONDS = 10.0
"""A living operator has taken note of a new job long before."""
WATCH_SECONDS = 240
LOG_DRAIN_SECONDS = 20.0
"""After the end of the job the rest of its log is awaited for so long."""
_LABEL_INDEX = names.ANNOTATION_JOB_INDEX
_LABEL_JOB = "batch.kubernetes.io/job-name"
_Event = tuple[str, Any]


def watch_job(cluster: Cluster, name: str, stop: threading.Event) -> Iterator[Object]:
    """The resource now and after every change, until `stop`. JobNotFound once it is gone or another took its name.

    Goes on from the last version after a cut; where the server has forgotten that (410) it reads anew. Outages of the
    API server are waited out.
    """
    uid: str | None = None
    version: str | None = None
    pause = 0.2
    while not stop.is_set():
        try:
            if version is None:
                found: Object = cluster.request("GET", job_path(cluster.namespace, name))
                uid = uid or found["metadata"]["uid"]
                _same(found, uid, name, cluster)
                version = found["metadata"]["resourceVersion"]
                yield found
            for kind, seen in _watch(cluster, name, version):
                if kind == "ERROR":
                    version = None
                    break
                version = seen["metadata"].get("resourceVersion", version)
                pause = 0.2
                if kind == "DELETED":
                    raise JobNotFound(f"job {cluster.namespace}/{name} was deleted")
                if kind in ("ADDED", "MODIFIED"):
                    _same(seen, uid, name, cluster)
                    yield seen
                if stop.is_set():
                    return
        except JobNotFound:
            raise
        except ApiError as error:
            if error.code == 404:
                raise JobNotFound(
                    f"found no job {name!r} in namespace {cluster.namespace}; nemo-rl ps lists those that are there"
                ) from None
            if error.code in (401, 403):
                raise
            version = None
            pause = min(10.0, 2 * pause)
        except ClusterError:
            pause = min(10.0, 2 * pause)
        stop.wait(pause)


def _same(found: Object, uid: str | None, name: str, cluster: Cluster) -> None:
    if found["metadata"]["uid"] != uid:
        raise JobNotFound(f"job {cluster.namespace}/{name} was deleted, and another has its name now")


def _watch(cluster: Cluster, name: str, version: str) -> Iterator[tuple[str, Object]]:
    query = {
        "watch": "true",
        "fieldSelector": f"metadata.name={name}",
        "resourceVersion": version,
        "timeoutSeconds": WATCH_SECONDS,
        "allowWatchBookmarks": "true",
    }
    rest = b""
    for piece in cluster.stream(job_path(cluster.namespace), query=query, silence=WATCH_SECONDS + 30):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.strip():
                event = decode.loads(line)
                yield event["type"], event["object"]


class PodLogs(LogSource):
    """The logs of trainer containers, through the API server."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def open(self, pod: str, since: str | None) -> Iterator[bytes]:
        query = {"container": names.TRAINER_CONTAINER, "follow": "true", "timestamps": "true", "sinceTime": since}
        return self._cluster.stream(core_path(self._cluster.namespace, "pods", pod, "log"), query=query)

    def read_now(self, pod: str) -> Iterator[bytes]:
        """The log up to now."""
        query = {"container": names.TRAINER_CONTAINER, "timestamps": "true"}
        return self._cluster.stream(core_path(self._cluster.namespace, "pods", pod, "log"), query=query)

    def ended(self, pod: str) -> bool:
        try:
            found = self._cluster.request("GET", core_path(self._cluster.namespace, "pods", pod))
        except ApiError as error:
            return error.code == 404
        except ClusterError:
            return False
        return found.get("status", {}).get("phase") in ("Succeeded", "Failed")


def first_pod(cluster: Cluster, job: str, attempt: int) -> str | None:
    """Name of the newest pod with index 0 of an attempt; None where there is none."""
    selector = f"{_LABEL_JOB}={names.attempt_job(job, attempt)}"
    pods = cluster.request("GET", core_path(cluster.namespace, "pods"), query={"labelSelector": selector})["items"]
    firsts = [p for p in pods if _index(p) == "0"]
    newest = max(firsts, key=lambda p: str(p["metadata"]["creationTimestamp"]), default=None)
    return None if newest is None else str(newest["metadata"]["name"])


def _index(pod: Object) -> str:
    meta = pod["metadata"]
    return str((meta.get("annotations") or {}).get(_LABEL_INDEX) or (meta.get("labels") or {}).get(_LABEL_INDEX, "0"))


class Follower:
    """Follows one job in two threads and hands what happens to the caller's. A context manager."""

    def __init__(self, cluster: Cluster, name: str, *, logs: LogSource | None = None, with_log: bool = True) -> None:
        self.cluster, self.name = cluster, name
        self._logs = logs if logs is not None else PodLogs(cluster)
        self._with_log = with_log
        self._events: queue.Queue[_Event] = queue.Queue(maxsize=10_000)
        self._stop = threading.Event()
        self._reading: dict[int, threading.Thread] = {}

    def __enter__(self) -> Follower:
        threading.Thread(target=self._watch, name="nemo-rl-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def events(self, timeout: float | None = None) -> Iterator[_Event]:
        """("job", resource), ("line", text) and ("note", text) until the job and its log have ended, or `timeout` s.

        Also ends when the job is suspended by its own specification. JobNotFound when it is deleted.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        drained: float | None = None
        taken_up = time.monotonic() + OPERATOR_SECONDS
        warned = False
        while True:
            if drained is not None and (not self._is_reading() or time.monotonic() > drained) and self._events.empty():
                return
            now = time.monotonic()
            if limit is not None and now > limit:
                return
            try:
                kind, what = self._events.get(timeout=0.1 if drained is not None else 0.5)
            except queue.Empty:
                if not warned and now > taken_up:
                    warned = True
                    yield "note", no_operator()
                continue
            if kind == "error":
                raise what
            if kind == "job":
                status = JobStatus.load(what.get("status"))
                warned = warned or status.observed_generation is not None
                self._read_logs(status)
                if drained is None and is_over(what):
                    drained = time.monotonic() + LOG_DRAIN_SECONDS
            yield kind, what

    def _watch(self) -> None:
        try:
            for found in watch_job(self.cluster, self.name, self._stop):
                self._put("job", found)
        except Exception as error:
            self._put("error", error)

    def _put(self, kind: str, what: Any) -> None:
        while not self._stop.is_set():
            try:
                self._events.put((kind, what), timeout=0.5)
                return
            except queue.Full:
                continue

    def _is_reading(self) -> bool:
        return any(thread.is_alive() for thread in self._reading.values())

    def _read_logs(self, status: JobStatus) -> None:
        """Begins with the log of the newest attempt; those of earlier ones are read to their ends beside it."""
        number = status.attempt or 0
        started = status.phase == "Running" or status.finished
        if not self._with_log or not number or not started or number in self._reading:
            return
        thread = threading.Thread(target=self._read, args=(number,), name=f"nemo-rl-log-{number}", daemon=True)
        self._reading[number] = thread
        thread.start()

    def _read(self, number: int) -> None:
        try:
            pod = first_pod(self.cluster, self.name, number)
            if pod is not None:
                for line in follow_log(self._logs, pod, self._stop.wait):
                    self._put("line", line)
        except ClusterError as error:
            self._put("note", f"the log of attempt {number} cannot be read any more ({error})")


def is_over(job: Object) -> bool:
    """Whether nothing more will happen by itself: finished, or held by spec.suspend or by its budget."""
    status = JobStatus.load(job.get("status"))
    held = bool(job["spec"].get("suspend")) or status.reason == names.BUDGET_SPENT
    return status.finished or (status.phase == "Suspended" and held)


def no_operator() -> str:
    return (
        f"no operator has taken note of the job for {OPERATOR_SECONDS:.0f} s; is one running? {CHECK_OPERATOR} shows it; "
        f"{INSTALL} installs it. The job waits"
    )


def show(follower: Follower, screen: Screen, timeout: float | None, seen: Callable[[Object], None]) -> None:
    """Shows everything on the screen until the job is over; `seen` gets the resource after each change."""
    for kind, what in follower.events(timeout):
        if kind == "job":
            seen(what)
            screen.status(JobStatus.load(what.get("status")))
        elif kind == "line":
            screen.line(what)
        else:
            screen.note(what)
