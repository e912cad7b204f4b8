"""Finding the model that somebody means: a folder, a run, a checkpoint, an address in a store, a job, or a name on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_rl.job import uris
from nemo_rl.run.checkpoint import BEST, CHECKPOINTS, best_of, find_checkpoints
from nemo_rl.run.directory import nearby


def find_model(reference: str | os.PathLike[str], *, namespace: str | None = None) -> str:
    """The folder of the model, or its name on the hub.

    `reference`: a folder of a model; a run's folder (its best checkpoint); s3://, gs:// or az:// with either; the name of a job
    on the cluster, whose result is fetched to ./outputs/NAME where it is not there yet; or a name on the hub, as owner/name.
    Raises ValueError for what is none of these, LookupError for a job that is not there.
    """
    text = os.fspath(reference)
    if uris.is_store(text):
        from nemo_rl.run.sources import local_model

        return str(local_model(text))
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _in_folder(folder)
    if folder.exists():
        raise ValueError(f"{text!r} is a file; expected the folder of a model, or of a run")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ValueError(
            f"{text!r} is not a folder here ({Path.cwd()}); expected a folder, a job, or owner/name on the hub"
        )
    return text if "/" in text else _of_job(text, namespace)


def _in_folder(folder: Path) -> str:
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return str(folder)
    if (folder / CHECKPOINTS).is_dir():
        if (folder / CHECKPOINTS / BEST / "config.json").is_file():
            return str((folder / CHECKPOINTS / BEST).resolve())
        best = best_of(find_checkpoints(folder))
        if best is not None:
            return str(best.path)
        raise ValueError(f"the run in {nearby(folder)} has no complete checkpoint yet")
    holds = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    raise ValueError(
        f"{nearby(folder)} is no folder of a model or a run (it holds {holds}); expected config.json and weights, or checkpoints/"
    )


def _of_job(name: str, namespace: str | None) -> str:
    from nemo_rl.backends import cluster_context, kubernetes_backend

    if cluster_context() is None:
        raise ValueError(
            f"found no folder {name!r} here ({Path.cwd()}), and no Kubernetes context to look for a job of that name; give the "
            "folder of a model or a run, or owner/name on the hub"
        )
    job = kubernetes_backend("this command").attach(name, namespace=namespace)
    if job.status().phase != "Succeeded":
        raise ValueError(f"job {job.namespace}/{job.name} has no result yet ({job.last_status.phase or 'Pending'})")
    found = job.fetch(quiet=True).checkpoint_path
    if found is None:
        raise ValueError(f"job {job.namespace}/{job.name} left no checkpoint")
    return str(found)
