"""The API server away, its history forgotten, a namespace or the resource itself deleted: on a cluster of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.api import ApiError, eventually
from cluster.faults import FaultyProxy
from cluster.kubelet import Kubelet
from cluster.manifests import result
from cluster.operator_process import Operator
from cluster.scene import Scene
from cluster.server import Cluster, define, serve
from nemo_rl.job import names

OUTAGE_SECONDS = 30
MakeOperator = Callable[..., Operator]


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Kubelet]]:
    with serve(tmp_path_factory.mktemp("fragile")) as cluster:
        if cluster.plane is None:
            pytest.skip("these tests stop and break the API server; they do that only to one of their own")
        kubelet = Kubelet(cluster.api)
        yield cluster, kubelet
        kubelet.close()


@pytest.fixture
def place(fragile: tuple[Cluster, Kubelet], request: pytest.FixtureRequest) -> Iterator[Scene]:
    cluster, kubelet = fragile
    made = Scene(cluster.api, cluster.kubectl, kubelet, request.node.name.removeprefix("test_")).open()
    request.node.scenes = [made]
    yield made
    made.close()


def test_operator_outlives_thirty_seconds_without_the_api_server(
    fragile: tuple[Cluster, Kubelet], place: Scene, own_operator: MakeOperator
) -> None:
    cluster, _ = fragile
    assert cluster.plane
    operator = own_operator(place.namespace, cluster.kubeconfig).start().wait_ready()
    place.submit("ends")
    place.submit("fails")
    for name in ("ends", "fails"):
        place.attempt(1, name).run()
        place.phase("Running", name=name)
    cluster.plane.kill("kube-apiserver")
    back = time.monotonic() + OUTAGE_SECONDS
    eventually(lambda: time.monotonic() > back, "the outage is over", OUTAGE_SECONDS + 5)
    cluster.plane.resume()
    place.attempt(1, "ends").exit(0, result(10))
    place.attempt(1, "fails").evict()
    place.phase("Succeeded", name="ends", seconds=90)
    assert place.succeed(attempt=2, name="fails")["phase"] == "Succeeded"
    place.submit("new")
    assert place.succeed(name="new")["attempt"] == 1
    assert operator.running
    assert operator.probe("/healthz") == 200


def test_deletions_behind_a_forgotten_history_are_noticed(
    fragile: tuple[Cluster, Kubelet], place: Scene, own_operator: MakeOperator, tmp_path: Path
) -> None:
    cluster, _ = fragile
    assert cluster.plane
    with FaultyProxy(cluster.api, tmp_path) as proxy:
        own_operator(place.namespace, proxy.kubeconfig).start().wait_ready()
        for name in ("stays", "goes", "returns"):
            place.submit(name)
            place.attempt(1, name).run()
            place.phase("Running", name=name)
        proxy.watching = False
        proxy.cut_watches()
        old = {name: place.attempt(1, name) for name in ("goes", "returns")}
        for name, pod in old.items():
            place.api.delete(names.PLURAL, place.namespace, name)
            place.gone("pods", pod.name)
        place.api.delete("persistentvolumeclaims", place.namespace, names.output_claim("returns"))
        place.submit("returns")
        # the API server's memory of past events ends with it, and etcd's with the compaction
        cluster.plane.compact()
        cluster.plane.resume()
        proxy.watching = True
        assert place.succeed(name="returns")["attempt"] == 1
        place.attempt(1, "stays").exit(0, result(10))
        place.phase("Succeeded", name="stays")
        assert place.api.find("jobs", place.namespace, names.attempt_job("goes", 1)) is None
        mentions = [c.path for c in proxy.mutations if "/goes" in c.path and c.code == 404]
        assert len(mentions) <= 5, "the operator goes on writing to a job that is gone"


def test_etcd_that_is_killed_and_comes_back_is_survived(
    fragile: tuple[Cluster, Kubelet], place: Scene, own_operator: MakeOperator
) -> None:
    cluster, _ = fragile
    assert cluster.plane
    operator = own_operator(place.namespace, cluster.kubeconfig).start().wait_ready()
    place.submit()
    place.attempt(1).run()
    place.phase("Running")
    cluster.plane.restart("etcd")
    pod = place.attempt(1)

    def ended() -> bool:
        try:
            pod.exit(0, result(10))
        except (ApiError, OSError):
            return False
        return True

    eventually(ended, "the pod's end is written")
    place.phase("Succeeded")
    assert operator.running


def test_namespace_that_is_deleted_goes_and_others_are_served(
    fragile: tuple[Cluster, Kubelet], place: Scene, own_operator: MakeOperator
) -> None:
    cluster, kubelet = fragile
    other = Scene(cluster.api, cluster.kubectl, kubelet, "other").open()
    operator = own_operator(place.namespace, cluster.kubeconfig)
    operator.namespaces.append(other.namespace)
    operator.start().wait_ready()
    for i in range(3):
        place.submit(f"x{i}", output={"serveUntil": "2100-01-01T00:00:00Z"})
        place.attempt(1, f"x{i}").run()
        place.phase("Running", name=f"x{i}")
    place.kubectl("delete", "namespace", place.namespace, "--timeout=100s")
    other.submit()
    assert other.succeed()["attempt"] == 1
    assert operator.running
    other.close()


def test_definition_that_is_removed_and_added_again_is_served_again(
    fragile: tuple[Cluster, Kubelet], place: Scene, own_operator: MakeOperator
) -> None:
    cluster, _ = fragile
    operator = own_operator(place.namespace, cluster.kubeconfig).start().wait_ready()
    place.submit("old")
    place.attempt(1, "old").run()
    place.phase("Running", name="old")
    with operator.kept_alive():
        place.kubectl("delete", "crd", names.CRD_NAME, "--timeout=60s")
        define(place.api, place.kubectl)
        place.submit("new")
        assert place.succeed(name="new")["attempt"] == 1
    assert place.api.find(names.PLURAL, place.namespace, "old") is None
