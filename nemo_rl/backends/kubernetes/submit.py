"""Submits a run: the resource first, then the ConfigMaps of its bundles, which it owns. The same run finds its job again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nemo_rl.backends import Run
from nemo_rl.backends.kubernetes.connect import (
    APPLY,
    FIELD_MANAGER,
    Cluster,
    Object,
    connect,
    core_path,
    job_path,
    require,
)
from nemo_rl.backends.kubernetes.contents import Contents, gather
from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError
from nemo_rl.backends.kubernetes.installation import installation
from nemo_rl.backends.kubernetes.job import Job
from nemo_rl.backends.kubernetes.naming import ANNOTATION_COLLECTED, LABEL_DIGEST, job_name, spec_digest
from nemo_rl.backends.kubernetes.progress import TransferBar
from nemo_rl.backends.kubernetes.trial import try_reward
from nemo_rl.errors import StorageError
from nemo_rl.job import names, uris
from nemo_rl.job.manifest import Manifest
from nemo_rl.job.reading import read_spec
from nemo_rl.job.spec import OutputSpec
from nemo_rl.storage.store import Store

_FINISHED = ("Succeeded", "Failed")
_CLEARING_SECONDS, _CLEARING_PAUSE = 30.0, 0.5
"""So long for the ConfigMaps of a deleted job of the same name to go."""
_KINDS = "x-kubernetes-group-version-kind"


def start(run: Run) -> Job:
    """Submits the run, or finds the live job of the same content, and returns its handle."""
    cluster = connect(run.namespace)
    require(cluster)
    run, folder = _to_store(run)
    say = _speaker(run)
    contents = gather(run, installation(cluster).python_of(run.spec.image))
    for note in contents.notes:
        say(note)
    existing = _find(cluster, contents, run.name)
    if existing is None:
        for warning in try_reward(contents):
            say(f"warning: {warning}")
        existing = submit(cluster, contents, run, say)
    else:
        name, phase = existing["metadata"]["name"], existing.get("status", {}).get("phase", "Pending")
        say(f"found this very job as {cluster.namespace}/{name} ({phase}); following it instead of starting another")
        upload_to_store(contents, say)
        upload(cluster, contents.for_job(name), existing, say)
    job = Job(
        cluster,
        existing,
        output_dir=folder,
        origins=contents.origins,
        trust_remote_code=run.spec.training.trust_remote_code,
    )
    say(f"job {job.name} in namespace {job.namespace}; come back with nemo_rl.attach({job.name!r})")
    return job


def _to_store(run: Run) -> tuple[Run, Path]:
    """The run, with the address that output_dir may be as its output, and the folder here that the result is fetched to."""
    if isinstance(run.output_dir, Path):
        return run, run.output_dir
    from nemo_rl.run.directory import default_output_dir

    given = {name: getattr(run.spec.output, name) for name in run.spec.output.model_fields_set}
    output = OutputSpec.model_validate({**given, "uri": run.output_dir})
    folder = default_output_dir(run.model if run.model is not None else run.spec.model)
    return replace(run, spec=run.spec.model_copy(update={"output": output}), output_dir=folder), folder


def dry_run(run: Run) -> str:
    """The resource and its ConfigMaps as YAML documents; asks no cluster."""
    run, _ = _to_store(run)
    contents = gather(run)
    name = run.name or job_name(contents.spec, _model_name(run))
    contents = contents.for_job(name)
    manifest = build(contents, run, name, run.namespace)
    documents = [manifest.to_yaml()]
    where = f" -n {run.namespace}" if run.namespace else ""
    for config_map in contents.config_maps():
        config_map["metadata"]["labels"][names.LABEL_JOB] = name
        if run.namespace:
            config_map["metadata"]["namespace"] = run.namespace
        documents.append(yaml.safe_dump(config_map, sort_keys=False))
    if len(documents) > 1:  # only the API server knows the uid by which the job could own them
        documents[0] += (
            "# The ConfigMaps below are the code and data of the job. Made by hand, they stay when the job is deleted; then:\n"
            f"# kubectl{where} delete configmaps -l {names.LABEL_JOB}={name}\n"
        )
    for path, archive in contents.stored().items():
        documents[0] += (
            f"# {len(archive.data) / 1e6:.1f} MB of code and data, SHA-256 {archive.sha256}, are too large for a ConfigMap and not "
            f"in here: the job reads them from {uris.joined(str(contents.spec.output.uri), path)}, where train() puts them\n"
        )
    return "---\n".join(documents)


def build(contents: Contents, run: Run, name: str, namespace: str | None) -> Manifest:
    """The resource as it is applied."""
    return Manifest(
        name=name,
        namespace=namespace,
        spec=contents.spec,
        labels={LABEL_DIGEST: spec_digest(contents.spec)},
    )


def submit(cluster: Cluster, contents: Contents, run: Run, say: Callable[[str], None]) -> Object:
    """Applies the resource and uploads its bundles; the resource as it is on the server."""
    digest = spec_digest(contents.spec)
    name = run.name
    if name is None:
        taken = {job["metadata"]["name"] for job in _same(cluster, digest)}
        name = job_name(contents.spec, _model_name(run), taken)
    contents = contents.for_job(name)
    upload_to_store(contents, say)  # no pod waits for these: they are there before the job is
    body = build(contents, run, name, cluster.namespace).to_dict()
    # Without force: fields that somebody else has set under this name are a conflict, not ours to change.
    created: Object = cluster.request(
        "PATCH",
        job_path(cluster.namespace, name),
        body,
        query={"fieldManager": FIELD_MANAGER, "force": "false"},
        content_type=APPLY,
    )
    if not same_content(cluster, created, digest):
        raise ClusterError(f"job {cluster.namespace}/{name} exists with other content; give another name")
    try:
        upload(cluster, contents, created, say)
    except BaseException:
        # Without its bundles the job would wait ten minutes and fail.
        _delete_quietly(cluster, created)
        raise
    return created


def upload_to_store(contents: Contents, say: Callable[[str], None]) -> None:
    """Writes the archives that are too large for ConfigMaps to the store that the job writes to, unless they are there.

    ClusterError, in words, where this machine cannot write there.
    """
    uri = contents.spec.output.uri
    archives = contents.stored()
    if uri is None or not archives:
        return
    try:
        store = Store(uri, patience=min(30.0, Store(uri).patience))
        for path, archive in archives.items():
            size = f"{len(archive.data) / 1e6:.1f} MB of code and data"
            if (there := store.stat(path)) is not None and there.size == len(archive.data):
                say(f"{size} are in {uri} already; nothing was uploaded")
                continue
            store.write(path, archive.data)
            say(f"uploaded {size} to {uris.joined(uri, path)}, where they stay for further jobs")
    except (StorageError, ImportError) as error:
        raise ClusterError(
            f"code and data of this run are too large for ConfigMaps ({names.MAX_BUNDLE_BYTES / 1e6:.0f} MB) and go to the store "
            f"that it writes to, but this machine cannot: {error}. Give it the store's credentials, or put the data there or "
            "on a volume yourself and name them by their address"
        ) from None


def upload(cluster: Cluster, contents: Contents, job: Object, say: Callable[[str], None]) -> int:
    """Makes the ConfigMaps that are not there yet; the bytes that were uploaded."""
    owner = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job["metadata"]["name"],
        "uid": job["metadata"]["uid"],
        "controller": False,
        "blockOwnerDeletion": False,
    }
    manifests = contents.config_maps()
    sizes = [len(next(iter(manifest["binaryData"].values()))) * 3 // 4 for manifest in manifests]
    made = 0
    with TransferBar("upload") as bar:
        for number, manifest in enumerate(manifests):
            if _place(cluster, manifest, owner):
                made += sizes[number]
            bar(sum(sizes[: number + 1]), sum(sizes))
    if made:
        say(
            f"uploaded {made / 1e6:.1f} MB of code and data"
            if made > 1e5
            else f"uploaded {made / 1e3:.1f} kB of code and data"
        )
    elif manifests:
        say("code and data are on the cluster already; nothing was uploaded")
    return made


def _place(cluster: Cluster, manifest: Object, owner: Object) -> bool:
    """Whether the ConfigMap had to be made. It belongs to the job from the beginning, and is never changed."""
    name = manifest["metadata"]["name"]
    path = core_path(cluster.namespace, "configmaps", name)
    body = {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": [owner]}}
    limit = time.monotonic() + _CLEARING_SECONDS
    while True:
        try:
            cluster.request("POST", core_path(cluster.namespace, "configmaps"), body)
            return True
        except ApiError as error:
            if error.code != 409:
                raise
        try:
            found: Object = cluster.request("GET", path)
        except ApiError as error:
            if error.code != 404:
                raise
            continue  # it went just now
        owners = found["metadata"].get("ownerReferences") or []
        # Without an owner: applied by hand from what a dry run printed.
        ours = not owners or any(o["uid"] == owner["uid"] for o in owners)
        ours = ours and not found["metadata"].get("deletionTimestamp")
        if ours and found.get("binaryData") == manifest["binaryData"]:
            return False
        # That of an earlier job of this name goes with it, soon.
        if ours or time.monotonic() > limit:
            raise ClusterError(
                f"ConfigMap {cluster.namespace}/{name} exists with other content or another owner; have it deleted "
                f"(kubectl -n {cluster.namespace} delete configmap {name}), or give the job another name"
            )
        time.sleep(_CLEARING_PAUSE)


def _find(cluster: Cluster, contents: Contents, name: str | None) -> Object | None:
    """The job to follow instead of a new one: of the same content and live, or finished and never collected.

    ClusterError where `name` is given and belongs to another job.
    """
    digest = spec_digest(contents.spec)
    if name is not None:
        try:
            found: Object = cluster.request("GET", job_path(cluster.namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        if _is_open(found) and same_content(cluster, found, digest):
            return found
        phase = found.get("status", {}).get("phase", "Pending")
        why = "of this content has ended" if same_content(cluster, found, digest) else "with other content exists"
        raise ClusterError(
            f"a job {cluster.namespace}/{name} {why} ({phase}); give another name, attach to it with "
            f"nemo_rl.attach({name!r}), or delete it: nemo-rl rm {name}"
        )
    same = [job for job in _same(cluster, digest) if _is_open(job) and same_content(cluster, job, digest)]
    return max(same, key=lambda job: str(job["metadata"]["creationTimestamp"])) if same else None


def _same(cluster: Cluster, digest: str) -> list[Object]:
    query = {"labelSelector": f"{LABEL_DIGEST}={digest}"}
    return list(cluster.request("GET", job_path(cluster.namespace), query=query)["items"])


def same_content(cluster: Cluster, job: Object, digest: str) -> bool:
    """Whether a job computes what this digest stands for. Its label only helps to find it: anybody can write one.

    A field that this version does not know counts, unless it has the default that the cluster's definition gives it.
    """
    try:
        found = read_spec(job["spec"])
    except ValidationError:
        return False
    if spec_digest(found.spec) != digest:
        return False
    return not found.unknown or _are_defaults(cluster, job, found.unknown)


def _are_defaults(cluster: Cluster, job: Object, paths: Iterable[str]) -> bool:
    """Whether the fields at these paths, like "spec.training.fp8", were filled in by the API server."""
    try:
        schemas = cluster.request("GET", f"/openapi/v3/apis/{names.API_VERSION}")["components"]["schemas"]
    except ClusterError:
        return False
    mine = (s for s in schemas.values() if any(k.get("kind") == names.KIND for k in s.get(_KINDS, ())))
    schema: Object = next(mine, {})
    return all(_is_default(job, schema, path.split(".")) for path in paths)


def _is_default(value: Any, schema: Object, path: list[str]) -> bool:
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
        schema = schema.get("items" if part.isdigit() else "properties", {})
        schema = schema if part.isdigit() else schema.get(part, {})
    return _has_default(value, schema)


def _has_default(value: Any, schema: Object) -> bool:
    """A section has its defaults where all that is in it does."""
    if isinstance(value, dict) and "properties" in schema:
        return all(_has_default(below, schema["properties"].get(name, {})) for name, below in value.items())
    return "default" in schema and bool(schema["default"] == value)


def _is_open(job: Object) -> bool:
    """Whether a job goes on, or has a result that nobody fetched."""
    if job["metadata"].get("deletionTimestamp") or job["spec"].get("suspend"):
        return False
    phase = job.get("status", {}).get("phase")
    collected = ANNOTATION_COLLECTED in (job["metadata"].get("annotations") or {})
    return phase not in _FINISHED or (phase == "Succeeded" and not collected)


def _delete_quietly(cluster: Cluster, job: Object) -> None:
    body = {"propagationPolicy": "Background", "preconditions": {"uid": job["metadata"]["uid"]}}
    try:
        cluster.request("DELETE", job_path(cluster.namespace, job["metadata"]["name"]), body)
    except ClusterError:
        return  # the first error is the one to tell


def _model_name(run: Run) -> str:
    from nemo_rl.run.directory import default_output_dir

    return default_output_dir(run.model if run.model is not None else run.spec.model).name


def _speaker(run: Run) -> Callable[[str], None]:
    quiet = run.spec.training.log_level not in ("debug", "info")
    return (lambda text: None) if quiet else (lambda text: print(f"nemo-rl: {text}", flush=True))
