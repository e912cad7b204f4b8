"""The jobs that a viewer may see on a cluster, and their logs, as a source of the page.

Every question is asked with the viewer's own rights: those of his kubeconfig, or in a pod those of the token that came with
his request. Nothing but reading is asked. One list, then only what changed since, at most once in `REFRESH_SECONDS` for each
viewer and namespace, however many pages are open.
"""

from __future__ import annotations

import datetime
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

from nemo_rl.backends.kubernetes.connect import CHECK_OPERATOR, INSTALL, Cluster, Object, core_path, job_path
from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError
from nemo_rl.backends.kubernetes.logs import LineResumer
from nemo_rl.job import decode, names
from nemo_rl.job.status import SCORES, JobStatus
from nemo_rl.job.text import clean
from nemo_rl.run.metrics import parse_sample_line, parse_step_line
from nemo_rl.ui.listing import (
    LINE_CHARACTERS,
    LOG_LINES,
    SAMPLES,
    Details,
    Json,
    Listing,
    Row,
    SourceError,
    curves,
    sample,
    text,
)

REFRESH_SECONDS = 2.0
WATCH_SECONDS = 1
"""How long the API server waits for changes before it ends an answer."""
ANSWER_SECONDS = 10.0
PAGE = 500
MAX_JOBS = 5_000
VIEWERS = 128
"""Lists and jobs that are kept in memory; the longest unused goes first."""
LOGGED_ATTEMPTS = 3
"""Newest attempts whose logs are read."""
FIRST_LINES = 5_000
MAX_LOG_BYTES = 4 * 1024 * 1024
"""Of a log that are read at once; the rest follows with the next question."""
KEPT_STEPS = 20_000
_LONGEST_PARSED = 20_000


class Jobs:
    """The jobs of one cluster. `connect` gives the cluster as the viewer with this token sees it."""

    name = "job"

    def __init__(self, connect: Callable[[str], Cluster], *, namespace: str, title: str) -> None:
        """`namespace` is the one that is listed when nobody names another; empty for all."""
        self._connect, self._namespace, self._title = connect, namespace, title
        self._lock = threading.Lock()
        self._clusters: OrderedDict[str, Cluster] = OrderedDict()
        self._lists: OrderedDict[tuple[str, str], _List] = OrderedDict()
        self._jobs: OrderedDict[tuple[str, str], _Job] = OrderedDict()

    def list(self, token: str, namespace: str | None) -> Listing:
        """The jobs of a namespace (default: the one of this source; empty: all), newest first, as they were last seen."""
        wanted = self._namespace if namespace is None else namespace
        viewer, cluster = self._viewer(token)
        with self._lock:
            found = _kept(self._lists, (viewer, wanted), lambda: _List(cluster, wanted))
        listing: Listing = found.now(self._title)
        return listing

    def details(self, token: str, key: str) -> Details:
        """One job, by namespace/name."""
        namespace, _, name = key.partition("/")
        if not _is_name(namespace) or not _is_name(name):
            raise SourceError("absent", f"{text(key, 200)!r} is no namespace and name of a job")
        viewer, cluster = self._viewer(token)
        with self._lock:
            found = _kept(self._jobs, (viewer, key), lambda: _Job(cluster, namespace, name))
        details: Details = found.now()
        return details

    def _viewer(self, token: str) -> tuple[str, Cluster]:
        """What the viewer is known by here, and his connection. Tokens themselves are kept in the connection alone."""
        viewer = hashlib.sha256(token.encode()).hexdigest()
        with self._lock:
            try:
                return viewer, _kept(self._clusters, viewer, lambda: self._connect(token))
            except ClusterError as error:
                raise SourceError("unusable", text(str(error), 1000)) from None


def _kept(cache: OrderedDict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    found = cache.pop(key, None) or make()
    cache[key] = found
    while len(cache) > VIEWERS:
        cache.popitem(last=False)
    return found


def _is_name(word: str) -> bool:
    """Whether it can be the name of an object, and hence a part of a path."""
    return (
        0 < len(word) <= 253 and all(c.isascii() and (c.isalnum() or c in "-.") for c in word) and word[0] not in ".-"
    )


# --- the list -----------------------------------------------------------------------------------------------------------


class _List:
    """The jobs of a namespace as one viewer sees them."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._path = job_path(namespace) if namespace else f"/apis/{names.API_VERSION}/{names.PLURAL}"
        self._lock = threading.Lock()
        self._rows: dict[str, Row] = {}
        self._version: str | None = None
        self._may_watch = True
        self._more = False
        self._asked = float("-inf")
        self._seen: str | None = None
        self._failed: SourceError | None = None

    def now(self, title: str) -> Listing:
        """The list, renewed unless that was done a moment ago, or is being done by another request."""
        if self._lock.acquire(blocking=self._version is None):
            try:
                if time.monotonic() - self._asked >= REFRESH_SECONDS:
                    self._refresh()
                    self._asked = time.monotonic()
            finally:
                self._lock.release()
        rows = sorted(list(self._rows.values()), key=lambda row: (row.created or "", row.name), reverse=True)
        listing = Listing(title, rows, namespace=self._namespace, more=self._more)
        if self._failed is not None:
            listing.problem = self._failed.problem
            listing.stale_since = self._seen if rows else None
        return listing

    def _refresh(self) -> None:
        try:
            if self._version is None or not self._may_watch or not self._catch_up():
                self._read_all()
            self._failed = None
            self._seen = _now()
        except ClusterError as error:
            self._failed = _problem(error, self._cluster, self._namespace, "list")
            if self._failed.problem.kind != "unreachable":  # he may not see any more what he saw before
                self._rows, self._version = {}, None

    def _read_all(self) -> None:
        rows: dict[str, Row] = {}
        following: str | None = None
        while True:
            query = {"limit": PAGE, "continue": following}
            try:
                page = self._cluster.request("GET", self._path, query=query, timeout=ANSWER_SECONDS)
            except ApiError as error:
                if error.code != 410 or following is None:
                    raise
                rows, following = {}, None  # the list became too old while it was read
                continue
            for job in page["items"]:
                row = row_of(job)
                rows[row.key] = row
            following = page["metadata"].get("continue")
            if not following or len(rows) >= MAX_JOBS:
                break
        self._rows, self._more = rows, bool(following)
        self._version = page["metadata"]["resourceVersion"]

    def _catch_up(self) -> bool:
        """Takes in what changed since the last time; False where the server has forgotten that, and all must be read."""
        query = {
            "watch": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": WATCH_SECONDS,
            "allowWatchBookmarks": "true",
        }
        rows = dict(self._rows)
        try:
            for event in _lines(self._cluster.stream(self._path, query=query, silence=ANSWER_SECONDS)):
                told = decode.loads(event)
                kind, job = told["type"], told["object"]
                if kind == "ERROR":
                    self._version = None
                    return False
                self._version = job["metadata"].get("resourceVersion", self._version)
                if kind == "BOOKMARK":
                    continue
                row = row_of(job)
                if kind == "DELETED":
                    rows.pop(row.key, None)
                elif row.key in rows or len(rows) < MAX_JOBS:
                    rows[row.key] = row
        except ApiError as error:
            if error.code == 403:
                self._may_watch = False
            elif error.code != 410:
                raise
            return False
        finally:
            self._rows = rows
        return True


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line for line in lines if line.strip())


def row_of(job: Object) -> Row:
    """A job as a row of the list."""
    meta, spec = job["metadata"], job.get("spec") or {}
    raw = job.get("status") or {}
    status = JobStatus.load(raw)
    progress = status.progress
    algorithm = spec.get("algorithm")
    score_name = SCORES.get(algorithm) if isinstance(algorithm, str) else None
    score = status.score or (progress.metrics.get(score_name) if progress and score_name else None)
    message = status.message
    if not raw.get("observedGeneration"):
        message = message or f"No operator has taken note of it yet. Is one running? {CHECK_OPERATOR} shows it."
    return Row(
        key=f"{Jobs.name}/{meta['namespace']}/{meta['name']}",
        name=meta["name"],
        where=meta["namespace"],
        phase=status.phase or "Pending",
        algorithm=text(algorithm, 64) if algorithm else None,
        model=text(spec.get("model"), 200) or None,
        reason=status.reason,
        message=clean(message) if message else None,
        step=progress.step if progress else None,
        total_steps=progress.total_steps if progress else None,
        percent=progress.percent if progress else None,
        eta=progress.eta if progress and not status.finished else None,
        score=score,
        score_name=score_name if score else None,
        bottleneck=_bottleneck_phase(raw),
        created=meta.get("creationTimestamp"),
        finished=status.finished,
    )


def _bottleneck_phase(raw: Json) -> str | None:
    found = raw.get("bottleneck")
    return text(found.get("phase"), 64) or None if isinstance(found, dict) else None


def _problem(error: ClusterError, cluster: Cluster, namespace: str, verb: str) -> SourceError:
    """An error of the cluster in the words of the page."""
    where = f"namespace {namespace}" if namespace else "all namespaces"
    code = error.code if isinstance(error, ApiError) else 0
    if code == 401:
        return SourceError(
            "sign-in",
            "The cluster does not know you: your token is wrong or has expired. Sign in again with a new one.",
        )
    if code == 403:
        here = f"-n {namespace}" if namespace else "-n NAMESPACE"
        cure = (
            f"Its administrator can give you the role to look at jobs: kubectl create rolebinding view-jobs {here} "
            "--clusterrole=nemo-rl-view --user=YOU"
        )
        other = "choose one of your namespaces above" if not namespace else "or choose another namespace above"
        words = text(getattr(error, "reason", ""), 500)
        return SourceError(
            "forbidden", f"You may not {verb} the jobs of {where}; {other}. {cure}. The cluster's words: {words}"
        )
    if code == 404:
        return SourceError(
            "unusable",
            f"The cluster of context {cluster.context} does not know RLTrainingJobs; install the operator: {INSTALL}",
        )
    return SourceError("unreachable", f"{text(str(error), 500)[:1].upper()}{text(str(error), 500)[1:]}.")


# --- one job ------------------------------------------------------------------------------------------------------------


class _Job:
    """One job as one viewer sees it, with what its logs have told so far."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self._lock = threading.Lock()
        self._asked = float("-inf")
        self._uid = ""
        self._logs: dict[tuple[int, str], _Log] = {}
        self._answer: Details | SourceError | None = None

    def now(self) -> Details:
        if self._lock.acquire(blocking=self._answer is None):
            try:
                if time.monotonic() - self._asked >= REFRESH_SECONDS:
                    self._answer = self._read()
                    self._asked = time.monotonic()
            finally:
                self._lock.release()
        answer = self._answer
        if isinstance(answer, SourceError):
            raise answer
        assert answer is not None
        return answer

    def _read(self) -> Details | SourceError:
        try:
            job = self._cluster.request("GET", job_path(self._namespace, self._name), timeout=ANSWER_SECONDS)
        except ClusterError as error:
            if isinstance(error, ApiError) and error.code == 404:
                return SourceError("absent", f"There is no job {self._name} in namespace {self._namespace} any more.")
            return _problem(error, self._cluster, self._namespace, "see")
        if job["metadata"]["uid"] != self._uid:  # another one has the name now
            self._uid, self._logs = job["metadata"]["uid"], {}
        found = details_of(job)
        try:
            self._read_logs(found)
        except ClusterError as error:
            if isinstance(error, ApiError) and error.code == 403:
                found.notes.append(
                    f"You may not read the logs of pods in namespace {self._namespace}, from which curves, samples and the log "
                    "are taken; the role nemo-rl-view contains that right."
                )
            else:
                found.notes.append(f"The log cannot be read at this moment: {text(str(error), 300)}")
        self._show_logs(found)
        return found

    def _read_logs(self, found: Details) -> None:
        # by the job's uid, and by that alone: of an earlier job of the name there may be pods as well
        selector = f"{names.LABEL_JOB_UID}={self._uid},{names.LABEL_COMPONENT}={names.COMPONENT_TRAINER}"
        pods = self._cluster.request(
            "GET",
            core_path(self._namespace, "pods"),
            query={"labelSelector": selector, "limit": PAGE},
            timeout=ANSWER_SECONDS,
        )["items"]
        pods.sort(key=lambda pod: (_attempt(pod), str(pod["metadata"]["creationTimestamp"])))
        first = [pod for pod in pods if _index(pod) == "0"]
        if not pods:
            found.notes.append(
                f"The pods of this job are gone, and their logs with them. nemo-rl cp {self._name} -n {self._namespace} "
                "fetches metrics and completions of a job that succeeded."
                if found.row.finished
                else "This job has no pods at this moment, and no log."
            )
        for pod in first[-LOGGED_ATTEMPTS:]:
            key = (_attempt(pod), pod["metadata"]["name"])
            log = self._logs.setdefault(key, _Log())
            if log.over:
                continue
            over = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
            try:
                log.read(self._cluster, core_path(self._namespace, "pods", key[1], "log"), over)
            except ApiError as error:
                if error.code not in (400, 404):  # not started yet, or gone since it was listed
                    raise

    def _show_logs(self, found: Details) -> None:
        steps: dict[int, Json] = {}
        samples: list[Json] = []
        lines: list[str] = []
        for key in sorted(self._logs):
            log = self._logs[key]
            if log.steps:
                begin = min(log.steps)  # what an earlier attempt did after this one's checkpoint does not count
                steps = {step: metrics for step, metrics in steps.items() if step < begin} | log.steps
            samples += log.samples
            if log.lines:
                lines += [f"— attempt {key[0]}, pod {key[1]} —", *log.lines]
        found.curves = curves([steps[step] for step in sorted(steps)])
        found.samples = [sample(one) for one in reversed(samples[-SAMPLES:])]
        found.log = lines[-LOG_LINES:]


class _Log:
    """What the log of one pod has told so far; only what was added is read again."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=LOG_LINES)
        self.samples: deque[Json] = deque(maxlen=SAMPLES)
        self.steps: dict[int, Json] = {}
        self.over = False
        self._resumer = LineResumer()

    def read(self, cluster: Cluster, path: str, over: bool) -> None:
        """Reads on; `over` says that nothing will be added any more. ClusterError, and what was read stays."""
        since = self._resumer.restart()
        query = {"container": names.TRAINER_CONTAINER, "timestamps": "true", "sinceTime": since}
        if since is None:
            query["tailLines"] = str(FIRST_LINES)
        size = 0
        stream = cluster.stream(path, query=query, silence=ANSWER_SECONDS)
        for piece in stream:
            for line in self._resumer.feed(piece):
                self._take(line)
            size += len(piece)
            if size > MAX_LOG_BYTES:
                stream.close()  # type: ignore[attr-defined]
                return
        if over:
            for line in self._resumer.finish():
                self._take(line)
            self.over = True

    def _take(self, line: str) -> None:
        line = clean(line)
        if len(line) < _LONGEST_PARSED:
            if (one := parse_sample_line(line)) is not None:
                self.samples.append(one)
                return
            if (metrics := parse_step_line(line)) is not None and metrics["step"] < 2**53:
                self.steps[metrics["step"]] = metrics
                if len(self.steps) > KEPT_STEPS:
                    self.steps = dict(sorted(self.steps.items())[::2])
        self.lines.append(text(line, LINE_CHARACTERS))


def _attempt(pod: Object) -> int:
    number = str((pod["metadata"].get("labels") or {}).get(names.LABEL_ATTEMPT, ""))
    return int(number) if number.isascii() and number.isdecimal() and len(number) < 10 else 0


def _index(pod: Object) -> str:
    meta = pod["metadata"]
    key = names.ANNOTATION_JOB_INDEX
    return str((meta.get("annotations") or {}).get(key) or (meta.get("labels") or {}).get(key, "0"))


def details_of(job: Object) -> Details:
    """What the resource itself says of a job."""
    meta, spec, raw = job["metadata"], job.get("spec") or {}, job.get("status") or {}
    status = JobStatus.load(raw)
    found = Details(row_of(job))
    found.facts = list(_facts(meta, spec, raw, status))
    if status.progress:
        found.metrics = {name: text(value, 64) for name, value in status.progress.metrics.items()}
    elif status.result:
        found.metrics = {name: text(value, 64) for name, value in status.result.metrics.items()}
    found.attempts = [attempt.model_dump(mode="json", exclude_none=True) for attempt in reversed(status.attempts)]
    found.conditions = [condition.model_dump(mode="json", exclude_none=True) for condition in status.conditions]
    found.traceback = clean(status.failure.traceback) if status.failure and status.failure.traceback else None
    found.replicas = _replicas(raw.get("rollout"))
    bottleneck = raw.get("bottleneck")
    if isinstance(bottleneck, dict):
        found.bottleneck = {name: text(bottleneck.get(name), 500) for name in ("phase", "share", "advice")}
    return found


def _facts(meta: Json, spec: Json, raw: Json, status: JobStatus) -> Iterator[tuple[str, str]]:
    dataset, training = spec.get("dataset"), spec.get("training")
    if isinstance(dataset, dict):
        found = dataset.get("path") or dataset.get("name")
        if found:
            yield "Data", text(found, 300)
        elif dataset.get("rows"):
            yield "Data", f"{len(dataset['rows'])} rows in the job"
    if status.gpus is not None:
        yield "GPUs", str(status.gpus)
    if queue := (meta.get("labels") or {}).get(names.LABEL_QUEUE):
        yield "Queue", text(queue, 64)
    if isinstance(training, dict) and training.get("learningRate") is not None:
        yield "Learning rate", text(training["learningRate"], 40)
    if status.checkpoint:
        for name, path, step in (
            ("Newest checkpoint", status.checkpoint.latest, status.checkpoint.latest_step),
            ("Best checkpoint", status.checkpoint.best, status.checkpoint.best_step),
        ):
            if path:
                yield name, text(path, 512) + (f" (step {step})" if step is not None else "")
    if status.checkpoint and status.checkpoint.best_metric:
        yield "Best so far", status.checkpoint.best_metric
    if isinstance(raw.get("gpuSeconds"), int):
        yield "GPU hours", f"{raw['gpuSeconds'] / 3600:.1f}"
    if status.start_time:
        yield "Started", status.start_time
    if status.completion_time:
        yield "Ended", status.completion_time


def _replicas(rollout: Any) -> Json | None:
    """Rollout replicas as the status tells of them."""
    if not isinstance(rollout, dict):
        return None
    counts = {
        name: rollout[name] for name in ("replicas", "ready", "weightVersion") if isinstance(rollout.get(name), int)
    }
    members = rollout.get("members") if isinstance(rollout.get("members"), list) else []
    fields = ("name", "state", "weightVersion", "tokensPerSecond", "message")
    told = [
        {name: text(member[name], 300) for name in fields if member.get(name) is not None}
        for member in members[:256]
        if isinstance(member, dict)
    ]
    return {**counts, "members": told}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
