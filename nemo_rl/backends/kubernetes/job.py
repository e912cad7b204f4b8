"""The handle of a job on the cluster: follow it, wait for it, stop it, read its log, get its result."""

from __future__ import annotations

import asyncio
import datetime
import html
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from nemo_rl.backends.kubernetes.connect import MERGE, Cluster, Object, connect, job_path, served
from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError, JobCancelled, JobNotFound
from nemo_rl.backends.kubernetes.follow import Follower, PodLogs, first_pod, is_over, show
from nemo_rl.backends.kubernetes.logs import LineResumer, follow_log
from nemo_rl.backends.kubernetes.naming import ANNOTATION_COLLECTED
from nemo_rl.backends.kubernetes.outputs import collect, file_server
from nemo_rl.backends.kubernetes.screen import Screen, printable
from nemo_rl.backends.kubernetes.traces import told_here
from nemo_rl.errors import TrainingFailed
from nemo_rl.job import names
from nemo_rl.job.manifest import Manifest
from nemo_rl.job.names import LABEL_JOB
from nemo_rl.job.reading import read_spec
from nemo_rl.job.status import JobStatus

if TYPE_CHECKING:
    from nemo_rl.api.result import TrainResult


def attach(name: str, *, namespace: str | None = None, trust_remote_code: bool = False) -> Job:
    """The job of that name. JobNotFound where there is none, ClusterError where the cluster cannot be used."""
    cluster = connect(namespace)
    return Job(cluster, _read(cluster, name), trust_remote_code=trust_remote_code)


def jobs(*, namespace: str | None = None) -> list[Job]:
    """The jobs of a namespace, newest first."""
    cluster = connect(namespace)
    try:
        found = cluster.request("GET", job_path(cluster.namespace))["items"]
    except ApiError as error:
        if error.code == 404:
            served(cluster)
        raise
    found.sort(key=lambda job: (job["metadata"]["creationTimestamp"], job["metadata"]["name"]), reverse=True)
    return [Job(cluster, job) for job in found]


def kept_claims(*, namespace: str | None = None) -> list[Object]:
    """Claims with the output of jobs that are not there any more, as the API server has them, oldest first."""
    cluster = connect(namespace)
    there = {job.name for job in jobs(namespace=namespace)}
    path = f"/api/v1/namespaces/{cluster.namespace}/persistentvolumeclaims"
    claims = cluster.request("GET", path, query={"labelSelector": LABEL_JOB})["items"]
    kept = [claim for claim in claims if claim["metadata"]["labels"][LABEL_JOB] not in there]
    return sorted(kept, key=lambda claim: str(claim["metadata"]["creationTimestamp"]))


def _read(cluster: Cluster, name: str) -> Object:
    try:
        found: Object = cluster.request("GET", job_path(cluster.namespace, name))
        return found
    except ApiError as error:
        if error.code != 404:
            raise
        served(cluster)
        raise JobNotFound(
            f"found no job {name!r} in namespace {cluster.namespace} of context {cluster.context}; nemo-rl ps lists "
            f"those that are there"
        ) from None


class Job:
    """One job on the cluster. `await job` gives its result.

    Attributes:
        name, namespace: of the resource.
        output_dir: folder that the result is fetched to; default ./outputs/{name}.
        history: metrics of the steps that were seen while following, each step once.
    """

    def __init__(
        self,
        cluster: Cluster,
        resource: Object,
        *,
        output_dir: Path | None = None,
        origins: dict[str, str] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`trust_remote_code` is the caller's word for this machine: the job's own may be somebody else's."""
        self._trust_remote_code = trust_remote_code
        self._cluster = cluster
        self._resource = resource
        self._origins = origins or {}
        self.name: str = resource["metadata"]["name"]
        self.namespace: str = cluster.namespace
        self.output_dir = output_dir if output_dir is not None else Path("outputs") / self.name
        self.history: list[dict[str, Any]] = []

    # --- looking

    @property
    def resource(self) -> Object:
        """The resource as it was last seen."""
        return self._resource

    @property
    def last_status(self) -> JobStatus:
        """The status as it was last seen; asks nobody."""
        return JobStatus.load(self._resource.get("status"))

    def status(self) -> JobStatus:
        """The status now. JobNotFound where the job is gone."""
        self._see(_read(self._cluster, self.name))
        return self.last_status

    def logs(self, follow: bool = False) -> Iterator[str]:
        """The lines of the newest attempt's log; with `follow` those of all attempts from now on until the job ends."""
        if follow:
            with Follower(self._cluster, self.name) as follower:
                for kind, what in follower.events():
                    if kind == "line":
                        yield printable(what)
            return
        number = self.status().attempt
        pod = first_pod(self._cluster, self.name, number) if number else None
        if pod is None:
            return
        resumer = LineResumer()
        for piece in PodLogs(self._cluster).read_now(pod):
            yield from map(printable, resumer.feed(piece))
        yield from map(printable, resumer.finish())

    def replica_logs(self, number: int, follow: bool = False) -> Iterator[str]:
        """The lines of a rollout replica's log, until now or, with `follow`, until its pod is gone."""
        self.status()
        if not (self._resource["spec"].get("rollout") or {}).get("replicas"):
            raise ClusterError(f"job {self.namespace}/{self.name} has no rollout replicas, and no logs of them")
        pod, source = f"{names.rollout(self.name)}-{number}", PodLogs(self._cluster)
        try:
            if follow:
                yield from map(printable, follow_log(source, pod, _pause))
                return
            resumer = LineResumer()
            for piece in source.read_now(pod):
                yield from map(printable, resumer.feed(piece))
            yield from map(printable, resumer.finish())
        except ApiError as error:
            if error.code not in (400, 404):
                raise
            raise ClusterError(
                f"pod {self.namespace}/{pod} does not run ({error.reason}); nemo-rl status {self.name} lists the replicas"
            ) from None

    def to_yaml(self) -> str:
        """The job as YAML that `kubectl apply -f -` takes."""
        meta = self._resource["metadata"]
        try:
            found = read_spec(self._resource["spec"])
        except ValidationError:
            found = None
        if found is None or found.unknown:  # of another version: better its own words than a part of them
            kept = {k: meta[k] for k in ("name", "namespace", "labels") if k in meta}
            return yaml.safe_dump({**self._resource, "metadata": kept, "status": None}, sort_keys=False)
        return Manifest(self.name, found.spec, self.namespace, meta.get("labels") or {}).to_yaml()

    # --- waiting

    def wait(self, timeout: float | None = None) -> JobStatus:
        """The status once the job has finished or is suspended, or as it is after `timeout` seconds. Shows nothing."""
        with Follower(self._cluster, self.name, with_log=False) as follower:
            for kind, what in follower.events(timeout):
                if kind == "job":
                    self._see(what)
                    if is_over(what):
                        break
        return self.last_status

    def follow(self, timeout: float | None = None) -> JobStatus:
        """As `wait`, and shows the job's phases, its log and its metrics meanwhile.

        Ctrl-C ends the following, not the job: KeyboardInterrupt, whose message says how to come back.
        """
        screen = Screen(self._log_level, log_every=int(self._training.get("logEvery") or 1))
        try:
            with Follower(self._cluster, self.name) as follower:
                show(follower, screen, timeout, self._see)
        except KeyboardInterrupt:
            screen.close()
            raise KeyboardInterrupt(self._come_back()) from None
        finally:
            screen.close()
            self.history = screen.history or self.history
        return self.last_status

    def result(self) -> TrainResult:
        """Follows the job to its end and fetches the result to `output_dir`.

        Raises TrainingFailed for a job that failed, JobCancelled for one that was cancelled, DownloadError where
        the result cannot be fetched (it stays where it is, and calling again goes on), KeyboardInterrupt for Ctrl-C.
        """
        status = self.follow()
        if not status.finished:
            if self._resource["spec"].get("suspend"):
                raise self._cancelled(status)
            raise ClusterError(f"job {self.namespace}/{self.name} has not ended: {status.message}")
        if status.phase == "Failed":
            raise self._failed(status)
        return self.fetch()

    def fetch(self, *, quiet: bool = False) -> TrainResult:
        """The result of a job that succeeded, as it was last seen, fetched to `output_dir`. DownloadError as `result`."""
        say = (lambda text: None) if quiet else self._say
        result = collect(
            self._cluster,
            self._resource,
            self.output_dir,
            lambda name: file_server(self._cluster, name),
            say,
            trust_remote_code=self._trust_remote_code,
        )
        self._mark_collected()
        return result

    def __await__(self) -> Generator[Any, None, TrainResult]:
        return asyncio.to_thread(self.result).__await__()

    # --- changing

    def cancel(self) -> None:
        """Saves and stops the pods, and holds the job (spec.suspend); `resume` goes on from the checkpoint.

        Nothing is lost: a job that shall go for good is deleted with `delete`.
        """
        self._suspend(True)

    def resume(self) -> None:
        """Lets a cancelled job go on from its newest checkpoint."""
        self._suspend(False)

    def scale(self, replicas: int) -> None:
        """Changes how many rollout replicas the job has, also while it trains. ClusterError for a job that has none."""
        self.status()
        if not (self._resource["spec"].get("rollout") or {}).get("replicas"):
            raise ClusterError(
                f"job {self.namespace}/{self.name} has no rollout replicas; a new job has them with spec.rollout.replicas"
            )
        if replicas < 1:
            raise ValueError(
                f"a job with rollout replicas has at least one, found {replicas}; nemo-rl cancel frees all pods"
            )
        patch = {"spec": {"rollout": {"replicas": replicas}}}
        self._resource = self._cluster.request("PATCH", job_path(self.namespace, self.name), patch, content_type=MERGE)

    def delete(self) -> None:
        """Deletes the job, its pods and its bundles; the claim with its output stays unless output.retain is false."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": self._resource["metadata"]["uid"]}}
        try:
            self._cluster.request("DELETE", job_path(self.namespace, self.name), body)
        except ApiError as error:
            if error.code == 404:
                raise JobNotFound(f"job {self.namespace}/{self.name} is gone already") from None
            raise

    def _suspend(self, value: bool) -> None:
        status = self.status()
        if status.finished:
            raise ClusterError(
                f"job {self.namespace}/{self.name} has ended already ({status.phase}); nothing to change"
            )
        patch = {"spec": {"suspend": value}}
        self._resource = self._cluster.request("PATCH", job_path(self.namespace, self.name), patch, content_type=MERGE)

    def _mark_collected(self) -> None:
        """So that the same call later begins a new run; a caller without the right to write has the result anyway."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        patch = {"metadata": {"annotations": {ANNOTATION_COLLECTED: now}}}
        try:
            self._cluster.request("PATCH", job_path(self.namespace, self.name), patch, content_type=MERGE)
        except ClusterError:
            return

    # --- words

    @property
    def _log_level(self) -> str:
        return str(self._training.get("logLevel", "info"))

    @property
    def _training(self) -> Object:
        found: Object = self._resource["spec"].get("training") or {}
        return found

    def _say(self, text: str) -> None:
        if self._log_level in ("debug", "info"):
            print(f"nemo-rl: {text}", flush=True)

    def _see(self, resource: Object) -> None:
        """Takes in news of this very job; JobNotFound for those of another that has its name now."""
        if resource["metadata"]["uid"] != self._resource["metadata"]["uid"]:
            raise JobNotFound(f"job {self.namespace}/{self.name} was deleted, and another has its name now")
        self._resource = resource

    def _come_back(self) -> str:
        return (
            f"detached; job {self.namespace}/{self.name} goes on. Come back with "
            f"nemo_rl.attach({self.name!r}, namespace={self.namespace!r}).result(), follow with nemo-rl logs -f "
            f"{self.name} -n {self.namespace}, stop with nemo-rl cancel {self.name} -n {self.namespace}"
        )

    def _cancelled(self, status: JobStatus) -> JobCancelled:
        checkpoint = status.checkpoint.latest if status.checkpoint else None
        step = status.progress.step if status.progress else 0
        return JobCancelled(
            f"job {self.namespace}/{self.name} was cancelled at step {step}; it keeps its checkpoint "
            f"({checkpoint or 'none yet'}). nemo_rl.attach({self.name!r}).resume() goes on",
            checkpoint,
            step,
        )

    def _failed(self, status: JobStatus) -> TrainingFailed:
        failure = status.failure
        cause = failure.cause if failure else "Unknown"
        words = (failure.message if failure else None) or status.message or "no reason is known"
        step = self._last_step(status)
        checkpoint = (status.checkpoint.latest if status.checkpoint else None) or None
        trace = told_here((failure.traceback if failure else None) or "", self._origins)
        kept = f"; its last checkpoint is {checkpoint} on the claim" if checkpoint else ""
        at = f" at step {step}" if step is not None else ""
        error = TrainingFailed(
            f"job {self.namespace}/{self.name} failed{at} ({cause}): {words}{kept}",
            cause=cause,
            step=step,
            traceback=trace,
            checkpoint=checkpoint,
        )
        if trace:
            error.add_note(f"\nIn the pod:\n{trace}")
        return error

    def _last_step(self, status: JobStatus) -> int | None:
        """The latest of what is known: progress is asked for now and then, and a job may end between."""
        known = [row["step"] for row in self.history[-1:]]
        known += [status.progress.step] if status.progress else []
        known += [status.checkpoint.latest_step or 0] if status.checkpoint else []
        return max(known, default=None)

    def __repr__(self) -> str:
        status = self.last_status
        step = f", step {status.progress.text}" if status.progress else ""
        return f"Job({self.name!r}, namespace={self.namespace!r}, {status.phase or 'Pending'}{step})"

    def _repr_html_(self) -> str:
        status = self.last_status
        rows = {"phase": status.phase or "Pending", "message": status.message}
        if status.progress:
            rows["step"] = status.progress.text
        cells = "".join(
            f"<tr><th style='text-align:left'>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items() if v
        )
        return f"<b>{html.escape(self.namespace)}/{html.escape(self.name)}</b><table>{cells}</table>"


def _pause(seconds: float) -> bool:
    """Sleeps, and never gives up: whoever follows a log ends that with Ctrl-C."""
    time.sleep(seconds)
    return False
