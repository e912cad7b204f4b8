"""The backend that trains on a Kubernetes cluster: ships code and data, applies the job, follows it, fetches the result.

Importing it loads no cluster client; every function that talks to the cluster does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.backends import Run
    from nemo_rl.backends.kubernetes.job import Job


def probe(timeout: float) -> tuple[bool, str]:
    """(whether jobs can be submitted to the cluster of the current context, one line that says why). Never raises."""
    from nemo_rl.backends.kubernetes.connect import probe

    return probe(timeout)


def run(run: Run) -> Any:
    """Submits the run and follows it to its `TrainResult`; with wait=False returns its `Job` at once.

    Raises ShipError for what cannot travel, RewardError or TypeError for a reward that fails its trial, RuntimeError
    for a cluster that cannot be used, TrainingFailed for a job that failed, KeyboardInterrupt (Ctrl-C only detaches).
    """
    from nemo_rl.backends.kubernetes.submit import start

    job = start(run)
    return job.result() if run.wait else job


def dry_run(run: Run) -> str:
    """The manifests that `run` would apply, as YAML for `kubectl apply --server-side -f -`; asks no cluster."""
    from nemo_rl.backends.kubernetes.submit import dry_run

    return dry_run(run)


def attach(name: str, *, namespace: str | None = None, trust_remote_code: bool = False) -> Job:
    """The handle of the job `name`; `trust_remote_code` as `nemo_rl.attach`.

    LookupError where there is none, RuntimeError where the cluster cannot be used.
    """
    from nemo_rl.backends.kubernetes.job import attach

    return attach(name, namespace=namespace, trust_remote_code=trust_remote_code)


def jobs(*, namespace: str | None = None) -> list[Job]:
    """The jobs of a namespace (default: the context's), newest first. RuntimeError as `attach`."""
    from nemo_rl.backends.kubernetes.job import jobs

    return jobs(namespace=namespace)


def kept_claims(*, namespace: str | None = None) -> list[dict[str, Any]]:
    """Claims that hold the output of jobs that were deleted, oldest first. RuntimeError as `attach`."""
    from nemo_rl.backends.kubernetes.job import kept_claims

    return kept_claims(namespace=namespace)
