"""Finding jobs again that run on a cluster: attach() to one by its name, jobs() to list them."""

from __future__ import annotations

from typing import Any

from nemo_rl.backends import kubernetes_backend


def attach(name: str, *, namespace: str | None = None, trust_remote_code: bool = False) -> Any:
    """The handle of the job `name` on the cluster. RuntimeError where the kubernetes backend is not available.

    `trust_remote_code`: whether `result().trainer` may run code that lies beside the checkpoint, on this machine. What the
    job says of it does not count: somebody else may have made that job.
    """
    backend = kubernetes_backend("attach()")
    return backend.attach(name, namespace=namespace, trust_remote_code=trust_remote_code)


def jobs(*, namespace: str | None = None) -> Any:
    """The jobs of a namespace on the cluster. RuntimeError where the kubernetes backend is not available."""
    return kubernetes_backend("jobs()").jobs(namespace=namespace)
