"""Fixtures: what tests/cluster has, and Kueue beside its API server; Prometheus is compiled too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.api import Api, Object, eventually
from cluster.conftest import (
    cluster,
    kubelet,
    new_scene,
    operator,
    operators,
    own_operator,
    pytest_runtest_makereport,
    scene,
)
from cluster.server import Cluster
from lab import kueue as lab_kueue
from lab import prometheus as lab_prometheus
from lab.settings import LabError
from marks import mark_below
from nemo_rl.job import names

__all__ = [
    "cluster",
    "kubelet",
    "new_scene",
    "operator",
    "operators",
    "own_operator",
    "pytest_runtest_makereport",
    "scene",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_below(__file__, items, pytest.mark.cluster)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles Kueue and Prometheus before the time limits of single tests begin to count."""
    if (
        any(Path(__file__).parent in item.path.parents for item in session.items)
        and not session.config.option.collectonly
    ):
        lab_kueue.ensure()
        lab_prometheus.ensure()


@pytest.fixture(scope="session")
def kueue(cluster: Cluster) -> lab_kueue.Kueue:
    """Kueue as shipped, that knows of RLTrainingJobs as its documentation says."""
    if cluster.plane is None:
        raise LabError(
            "tests/integrations start Kueue beside a control plane of their own; unset NEMO_RL_TEST_KUBECONFIG"
        )
    served = lab_kueue.Kueue(cluster.plane)
    served.start()
    return served


class Queues:
    """A ClusterQueue with so many CPUs, and LocalQueues in the namespaces of the test that lead to it."""

    def __init__(self, api: Api, name: str, cpus: int, **more: str) -> None:
        self.api, self.name = api, name
        labels = {"pool": name}
        self._make("resourceflavors", {"metadata": {"name": name}, "spec": {"nodeLabels": labels}})
        given = {"cpu": str(cpus), **more}
        quotas = [{"name": resource, "nominalQuota": amount} for resource, amount in given.items()]
        group = {"coveredResources": list(given), "flavors": [{"name": name, "resources": quotas}]}
        spec = {
            "namespaceSelector": {},
            "resourceGroups": [group],
            "preemption": {"withinClusterQueue": "LowerPriority"},
        }
        self._make("clusterqueues", {"metadata": {"name": name}, "spec": spec})

    def _make(self, kind: str, body: Object) -> None:
        self.api.create(kind, None, {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": KINDS[kind], **body})

    def local(self, namespace: str, name: str = "team") -> None:
        spec = {"clusterQueue": self.name}
        body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": name}, "spec": spec}
        self.api.create("localqueues", namespace, body)

    def usage(self) -> int:
        """CPUs that are reserved."""
        status = self.api.get("clusterqueues", None, self.name).get("status") or {}
        found = [r for f in status.get("flavorsReservation") or () for r in f["resources"] if r["name"] == "cpu"]
        return int(found[0]["total"]) if found else 0


KINDS = {"resourceflavors": "ResourceFlavor", "clusterqueues": "ClusterQueue"}


@pytest.fixture
def queues(cluster: Cluster, kueue: lab_kueue.Kueue, request: pytest.FixtureRequest) -> Callable[..., Queues]:
    """Makes the queues of a test: with how many CPUs, and how much of what else."""
    word = request.node.name.removeprefix("test_").replace("_", "-").lower()
    word = "".join(c for c in word if c.isalnum() or c == "-")[:50].strip("-")
    return lambda cpus, **more: Queues(cluster.api, word, cpus, **more)


@pytest.fixture
def priorities(cluster: Cluster, kueue: lab_kueue.Kueue) -> Iterator[None]:
    """The classes `low` and `high`."""
    for name, value in (("low", 1), ("high", 1000)):
        body = {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "WorkloadPriorityClass",
            "metadata": {"name": name},
            "value": value,
        }
        cluster.api.create("workloadpriorityclasses", None, body)
    yield
    for name in ("low", "high"):
        cluster.api.delete("workloadpriorityclasses", None, name)
        eventually(
            lambda name=name: cluster.api.find("workloadpriorityclasses", None, name) is None,  # type: ignore[misc]
            f"{name} is gone",
        )


def labels(queue: str = "team", priority: str = "") -> dict[str, str]:
    return {names.LABEL_QUEUE: queue, **({names.LABEL_PRIORITY: priority} if priority else {})}
