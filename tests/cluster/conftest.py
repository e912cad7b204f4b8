"""Fixtures: a real API server for the session, the operator as a process, and pods that the tests play."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from charts import Object, render
from cluster.kubelet import Kubelet
from cluster.operator_process import Operator, Operators
from cluster.releases import remove_release
from cluster.scene import USER, Scene
from cluster.server import Cluster, external_kubeconfig, serve
from lab import programs
from lab.settings import LabError
from marks import mark_below
from nemo_rl.job import names


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_below(__file__, items, pytest.mark.cluster)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles the programs that are missing, before the time limits of single tests begin to count."""
    ours = any(Path(__file__).parent in item.path.parents for item in session.items)
    if ours and not session.config.option.collectonly and shutil.which("go") and not external_kubeconfig():
        # what goes wrong here is reported by the fixture
        with contextlib.suppress(LabError):
            programs.ensure(programs.CONTROL_PLANE)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with serve(tmp_path_factory.mktemp("cluster")) as served:
        yield served


@pytest.fixture(scope="session")
def kubelet(cluster: Cluster) -> Iterator[Kubelet]:
    played = Kubelet(cluster.api)
    yield played
    played.close()


@pytest.fixture(scope="session")
def new_scene(cluster: Cluster, kubelet: Kubelet) -> Callable[[str], Scene]:
    """Makes a scene whose namespace has this word in its name; the caller closes it."""
    return lambda word: Scene(cluster.api, cluster.kubectl, kubelet, word).open()


@pytest.fixture
def scene(new_scene: Callable[[str], Scene], request: pytest.FixtureRequest) -> Iterator[Scene]:
    made = new_scene(request.node.name.removeprefix("test_"))
    request.node.scenes = [made]
    yield made
    made.close()


@pytest.fixture(scope="session")
def operators(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operators]:
    made = Operators(cluster.kubeconfig, tmp_path_factory.mktemp("operators"))
    yield made
    made.close()


@pytest.fixture
def operator(operators: Operators) -> Operator:
    """The operator that tests share; it serves all namespaces."""
    return operators.share()


@pytest.fixture
def release(cluster: Cluster, scene: Scene, request: pytest.FixtureRequest) -> Iterator[list[Object]]:
    """The chart as it comes, for this namespace alone, with USER bound to its role for users; a parameter is further values."""
    values = {
        **getattr(request, "param", {}),
        "crds": {"enabled": False},
        "userRoles": {"prefix": scene.namespace, "aggregate": False},
        "watchNamespaces": [scene.namespace],
    }
    objects = render(values, release="rl", namespace=scene.namespace)
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))
    scene.kubectl("create", "rolebinding", "users", f"--clusterrole={scene.namespace}-edit", f"--user={USER}")
    yield objects
    remove_release(cluster, objects)


@pytest.fixture
def own_operator(operators: Operators) -> Iterator[Callable[..., Operator]]:
    """Makes operators for this test alone; they are ended with it."""
    yield operators.make
    operators.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure shows the operators' logs and what was in the namespace."""
    report = yield
    arguments = getattr(item, "funcargs", {})
    if report.when == "call" and report.failed and "operators" in arguments:
        operators: Operators = arguments["operators"]
        for operator in [*operators.own, *filter(None, [operators.shared])]:
            report.sections.append((f"operator log {operator.log.name}", operator.tail()))
        for scene in getattr(item, "scenes", []):
            what = f"{names.PLURAL},jobs,pods"
            for form in ("wide", "yaml"):
                text = scene.kubectl("get", what, "-o", form, check=False)
                report.sections.append((f"objects of {scene.namespace}", text[-20_000:]))
    return report
