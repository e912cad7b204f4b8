"""Finding jobs again that run on a cluster: attach() to one by its name, jobs() to list them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl.backends import kubernetes_backend

if TYPE_CHECKING:
    from nemo_rl.backends.kubernetes.job import Job


def attach(name: str, *, namespace: str | None = None, trust_remote_code: bool = False) -> Job:
    """The handle of the job `name` on the cluster. RuntimeError where the kubernetes backend is not available.

    `trust_remote_code`: whether `result().trainer` may run code that lies beside the checkpoint, on this machine. What the
    job says of it does not count: somebody else may have made that job.
    """
    found: Job = kubernetes_backend("attach()").attach(name, namespace=namespace, trust_remote_code=trust_remote_code)
    return found


def jobs(*, namespace: str | None = None) -> list[Job]:
    """The jobs of a namespace on the cluster, newest first. RuntimeError where the kubernetes backend is not available."""
    found: list[Job] = kubernetes_backend("jobs()").jobs(namespace=namespace)
    return found
