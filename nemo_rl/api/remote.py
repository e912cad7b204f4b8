"""Finding jobs again that run on a cluster: attach() to one by its name, jobs() to list them."""

from __future__ import annotations

from typing import Any

from nemo_rl.backends import kubernetes_backend


def attach(name: str, *, namespace: str | None = None) -> Any:
    """The handle of the job `name` on the cluster. RuntimeError where the kubernetes backend is not available."""
    return kubernetes_backend("attach()").attach(name, namespace=namespace)


def jobs(*, namespace: str | None = None) -> Any:
    """The jobs of a namespace on the cluster. RuntimeError where the kubernetes backend is not available."""
    return kubernetes_backend("jobs()").jobs(namespace=namespace)
