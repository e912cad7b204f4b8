"""The output of a job, on its claim or in a store: asks the operator for the file server, reaches it, and brings the result home."""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.backends.kubernetes.connect import MERGE, Cluster, core_path, job_path
from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError, DownloadError
from nemo_rl.backends.kubernetes.fetch import FileClient, RemoteFile, download, relative_to
from nemo_rl.backends.kubernetes.progress import TransferBar
from nemo_rl.backends.kubernetes.tunnel import open_tunnel
from nemo_rl.errors import StorageError
from nemo_rl.job import names, uris
from nemo_rl.job.reading import read_spec
from nemo_rl.job.status import JobStatus
from nemo_rl.run.checkpoint import CHECKPOINTS, TRAINER_STATE
from nemo_rl.run.directory import COMPLETIONS_FILE, METRICS_FILE, finished_run, nearby, open_run
from nemo_rl.run.stored.head import HEAD
from nemo_rl.storage.errors import Damaged
from nemo_rl.storage.store import Store

if TYPE_CHECKING:
    from nemo_rl.api.result import TrainResult

SERVE_SECONDS = 1800
TRY_SECONDS = 20.0
"""How long a store is asked again that does not answer this machine, before a pod is asked."""
POD_SECONDS = 300.0
REFUSED_SECONDS = 30.0
"""A refusal of the pod that lasts as long is not waited out: the operator tries again after ten seconds, and then ever rarer."""
_POLL_SECONDS = 0.5

Opener = Callable[[str], contextlib.AbstractContextManager[FileClient]]
"""Makes a client of the file server of a job, by the job's name."""


@contextlib.contextmanager
def file_server(cluster: Cluster, job: str) -> Iterator[FileClient]:
    """A client of the job's file server, which is up while the block runs. ClusterError where it does not come up."""
    until = _serve_until(cluster, job)
    try:
        pod = _wait_for_pod(cluster, job)
        client = FileClient(lambda: open_tunnel(cluster, pod, names.FILES_PORT))
        try:
            yield client
        finally:
            client.close()
    finally:
        with contextlib.suppress(ClusterError):
            _stop_serving(cluster, job, until)


def _serve_until(cluster: Cluster, job: str) -> str:
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=SERVE_SECONDS)
    until = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    patch = {"spec": {"output": {"serveUntil": until}}}
    cluster.request("PATCH", job_path(cluster.namespace, job), patch, content_type=MERGE)
    return until


def _stop_serving(cluster: Cluster, job: str, until: str) -> None:
    """Only where nobody has asked for longer since."""
    found = cluster.request("GET", job_path(cluster.namespace, job))
    if found["spec"].get("output", {}).get("serveUntil") == until:
        patch = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}}
        patch |= {"spec": {"output": {"serveUntil": None}}}
        cluster.request("PATCH", job_path(cluster.namespace, job), patch, content_type=MERGE)


def _wait_for_pod(cluster: Cluster, job: str) -> str:
    pod = names.files_pod(job)
    begun = time.monotonic()
    found: dict[str, Any] = {}
    refused = ""
    while time.monotonic() < begun + POD_SECONDS and not refused:
        try:
            found = cluster.request("GET", core_path(cluster.namespace, "pods", pod))
        except ApiError as error:
            if error.code != 404:
                raise
            found = {}
        if found.get("status", {}).get("phase") == "Running" and not found["metadata"].get("deletionTimestamp"):
            return pod
        if not found and time.monotonic() > begun + REFUSED_SECONDS:
            refused = _refusal(cluster, job)
        time.sleep(_POLL_SECONDS)
    why = _why(found) or refused or _refusal(cluster, job) or "the operator has not made it"
    raise ClusterError(
        f"pod {pod}, which serves the result, does not run after {time.monotonic() - begun:.0f} s ({why}); "
        f"kubectl -n {cluster.namespace} describe pod {pod} says more. The result stays where it is; "
        f"nemo_rl.attach({job!r}).result() tries again"
    )


def _why(pod: dict[str, Any]) -> str:
    if not pod:
        return ""
    status = pod.get("status", {})
    for container in status.get("containerStatuses") or []:
        if waiting := container.get("state", {}).get("waiting"):
            return f"{waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
    unmet = [c for c in status.get("conditions") or [] if c.get("status") == "False"]
    return str(unmet[0].get("message") or unmet[0].get("reason")) if unmet else str(status.get("phase"))


def _refusal(cluster: Cluster, job: str) -> str:
    """What the operator says of a pod that it cannot make; empty where it says nothing."""
    with contextlib.suppress(ClusterError):
        condition = JobStatus.load(cluster.request("GET", job_path(cluster.namespace, job)).get("status")).condition(
            "OutputServed"
        )
        if condition is not None and condition.status == "False":
            return condition.message
    return ""


def collect(
    cluster: Cluster,
    job: dict[str, Any],
    output_dir: Path,
    open_files: Opener,
    say: Callable[[str], None],
    *,
    trust_remote_code: bool = False,
) -> TrainResult:
    """The result of a job that succeeded: its best checkpoint and its records fetched into `output_dir`.

    `trust_remote_code` is the caller's: whether the result's trainer may run code that was fetched with the checkpoint.

    Where another run is in that folder they go beside it, as in a local run. Raises as `fetch.download`.
    """
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    status = JobStatus.load(job.get("status"))
    _refuse_what_was_left_out(job.get("status") or {}, status, name)
    settings = {"job": name, "namespace": cluster.namespace, "uid": uid}
    run = None
    if (collected := finished_run(output_dir, settings)) is not None:
        output_dir = collected
    else:
        run = open_run(output_dir, settings, "auto")
        output_dir = run.dir
    try:
        if run is not None and run.notice and "continuing" not in run.notice:
            say(run.notice)
        uri = output_uri(job)
        if uri is not None:
            checkpoint = _fetch_from_store(job, uri, output_dir, open_files, say)
        else:
            with open_files(name) as client:
                checkpoint = _fetch_all(client, name, best_checkpoint(status, name), output_dir, say)
        if run is not None:
            run.finish()
    finally:
        if run is not None:
            run.close()
    return build_result(job, output_dir, checkpoint, trust_remote_code)


def _fetch_all(
    client: FileClient, name: str, checkpoint: str | None, output_dir: Path, say: Callable[[str], None]
) -> Path | None:
    files: list[RemoteFile] = []
    folder, parts = name, checkpoint.split("/") if checkpoint is not None else []
    if CHECKPOINTS in parts:  # the job's folder, or that of the run within it
        folder = "/".join(parts[: parts.index(CHECKPOINTS)])
    for path in (f"{folder}/{METRICS_FILE}", f"{folder}/{COMPLETIONS_FILE}"):
        files += client.manifest(path)
    if checkpoint is not None:
        # The optimizer's state is larger than the model, and only a run on the cluster goes on from it.
        inner = client.manifest(checkpoint)
        if not inner:
            raise DownloadError(f"the checkpoint {checkpoint} is not there any more; was the output changed?")
        files += [file for file in inner if f"/{TRAINER_STATE}/" not in file.path]
    size = sum(file.size for file in files)
    say(f"fetching {len(files)} files ({size / 1e6:.1f} MB) to {nearby(output_dir)}")
    with TransferBar("download") as bar:
        download(files, client, output_dir, folder, bar)
    return output_dir / relative_to(checkpoint, folder) if checkpoint is not None else None


def output_uri(job: dict[str, Any]) -> str | None:
    """The address that the job writes to; None where it has a claim."""
    uri = (job["spec"].get("output") or {}).get("uri")
    return uris.joined(uri, job["metadata"]["name"]) if uri else None


def checkpoint_uri(job: dict[str, Any]) -> str | None:
    """Where the best checkpoint is in the store; None for a job with a claim. DownloadError for one that is not the job's."""
    uri = output_uri(job)
    status = JobStatus.load(job.get("status"))
    kept = (status.result.checkpoint if status.result else None) or status.checkpoint
    path = (kept.best or kept.latest) if kept else None
    if uri is None or path is None:
        return None
    if not path.startswith(f"{uri}/") or uris.problem(path) is not None:
        raise DownloadError(f"the status names the checkpoint {path!r}, which is not below {uri}, where the job writes")
    return path


def _fetch_from_store(
    job: dict[str, Any], uri: str, output_dir: Path, open_files: Opener, say: Callable[[str], None]
) -> Path | None:
    """The best checkpoint and the records of a job that writes to a store: read from there, or, where this machine cannot, through
    a pod of the job's, which has its credentials."""
    from nemo_rl.run.published import fetch

    checkpoint = checkpoint_uri(job)
    try:
        _try_to_read(uri)
        with TransferBar("download") as bar:
            return fetch(checkpoint or uri, output_dir, bar, say)
    except Damaged as error:
        raise DownloadError(f"the result in {uri} is damaged: {error}") from None
    except (StorageError, ImportError, ValueError) as error:
        reason = str(error)
    say(f"{uri} cannot be read from this machine, so a pod of the job serves the result ({reason})")
    name = job["metadata"]["name"]
    path = f"{name}{checkpoint.removeprefix(uri)}" if checkpoint is not None else None
    try:
        with open_files(name) as client:
            fetched = _fetch_all(client, name, path, output_dir, say)
    except ClusterError as error:
        raise DownloadError(
            f"the result is in {uri}, but cannot be read from this machine: {reason}. A pod of the job could not serve it either: "
            f"{error}. With credentials of the store in the environment the same call fetches it; the model can also be used by "
            "its address, as in train(model=…)"
        ) from None
    return _without_generation(fetched) if fetched is not None else None


def _try_to_read(uri: str) -> None:
    """StorageError, and soon, where this machine does not reach the store, or has no right to read there."""
    store = Store(uri, TRY_SECONDS)
    if store.read(HEAD) is None:
        raise StorageError(f"found no {store.uri}/{HEAD}; does AWS_ENDPOINT_URL name another server than the job's?")


def _without_generation(fetched: Path) -> Path:
    """The folder of a checkpoint under the name that it has on a disk."""
    from nemo_rl.run.published import name_on_disk

    target = fetched.with_name(name_on_disk(fetched.name))
    if target == fetched:
        return fetched
    shutil.rmtree(target, ignore_errors=True)
    fetched.rename(target)
    return target


def _refuse_what_was_left_out(told: dict[str, Any], status: JobStatus, name: str) -> None:
    """Readers pass over a field that does not fit; of the one that says where the model is that must not be silent."""
    for field in ("result", "checkpoint"):
        if told.get(field) and not getattr(status, field):
            raise DownloadError(
                f"the status of {name} says of its {field} what no trainer writes ({str(told[field])[:200]}); expected a "
                "path below the job's own folder; look at the output claim by hand"
            )


def best_checkpoint(status: JobStatus, name: str) -> str | None:
    """Path of the best checkpoint from the claim's root. DownloadError for one that is not below the job's folder."""
    kept = (status.result.checkpoint if status.result else None) or status.checkpoint
    path = (kept.best or kept.latest) if kept else None
    if path is not None:
        relative_to(path, name)
    return path


def build_result(
    job: dict[str, Any], output_dir: Path, checkpoint: Path | None, trust_remote_code: bool = False
) -> TrainResult:
    from nemo_rl.api.result import TrainResult
    from nemo_rl.run.metrics import read_history

    status = JobStatus.load(job.get("status"))
    history = read_history(output_dir / METRICS_FILE)
    told = status.result.metrics if status.result else {}
    return TrainResult(
        metrics=history[-1] if history else {name: _number(text) for name, text in told.items()},
        checkpoint_path=str(checkpoint) if checkpoint else None,
        checkpoint_uri=checkpoint_uri(job),
        total_steps=status.result.total_steps if status.result else 0,
        output_dir=output_dir,
        load_trainer=None
        if checkpoint is None
        else lambda: _load_trainer(job, output_dir, checkpoint, trust_remote_code),
    )


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _load_trainer(job: dict[str, Any], output_dir: Path, checkpoint: Path, trust: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_rl.api.algorithms import get_algorithm

    spec = read_spec(job["spec"]).spec
    spec.training.trust_remote_code = trust  # of this machine its user says it, not the job
    trainer = get_algorithm(spec.algorithm)(
        spec,
        output_dir=output_dir,
        model=AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust),
    )
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        trainer.current_step = int(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"])
    return trainer
