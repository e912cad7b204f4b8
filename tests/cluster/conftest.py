"""Fixtures: a real API server for the session, the operator as a process, and pods that the tests play."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster.api import Api, eventually
from cluster.kubelet import Kubelet
from cluster.operator_process import Operator
from cluster.scene import Scene, run_kubectl
from lab import programs
from lab.control_plane import ControlPlane
from nemo_rl.job import names

CRDS = Path(__file__).resolve().parents[2] / "crds"
COUNTER = itertools.count()


@dataclass
class Cluster:
    """An API server with the resource defined. plane is None where the server is somebody else's."""

    api: Api
    kubectl: Callable[..., str]
    kubeconfig: Path
    plane: ControlPlane | None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    external = os.environ.get("NEMO_RL_TEST_KUBECONFIG")
    if external:
        kubeconfig = Path(external)
        kubectl = run_kubectl(Path(shutil.which("kubectl") or programs.path("kubectl")), kubeconfig, folder / "cache")
        define(Api(kubeconfig), kubectl)
        yield Cluster(Api(kubeconfig), kubectl, kubeconfig, None)
        return
    need_programs()
    plane = ControlPlane(folder)
    kubectl = run_kubectl(programs.path("kubectl"), plane.kubeconfig, folder / "cache")
    try:
        # before the controllers: a garbage collector that starts later knows the kind at once
        plane.start(lambda: define(Api(plane.kubeconfig), kubectl))
        yield Cluster(Api(plane.kubeconfig), kubectl, plane.kubeconfig, plane)
    finally:
        plane.stop()


def need_programs() -> None:
    """Skips where the programs cannot be had; where they must be had, their lack is a failure."""
    required = os.environ.get("NEMO_RL_REQUIRE_CLUSTER") == "1" or os.environ.get("CI") == "true"
    missing = programs.missing(programs.CONTROL_PLANE)
    if missing and not shutil.which("go") and not required:
        pytest.skip(
            f"{', '.join(missing)} not in {programs.BIN} and Go is not installed to compile them; "
            "install Go, or set NEMO_RL_TEST_KUBECONFIG to an API server without nodes"
        )
    if not shutil.which("openssl") and not required:
        pytest.skip("openssl is not installed; it makes the API server's certificates")
    programs.ensure(missing)


def define(api: Api, kubectl: Callable[..., str]) -> None:
    """Creates or updates the resource definition and waits until it is served."""
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRDS))
    kubectl("wait", "--for=condition=Established", f"crd/{names.CRD_NAME}", "--timeout=30s")

    def served() -> bool:
        return bool(api.request("GET", f"/apis/{names.API_VERSION}")["resources"])

    eventually(served, "the resource is served")


@pytest.fixture(scope="session")
def kubelet(cluster: Cluster) -> Iterator[Kubelet]:
    played = Kubelet(cluster.api)
    yield played
    played.close()


@pytest.fixture(scope="session")
def new_scene(cluster: Cluster, kubelet: Kubelet) -> Callable[[str], Scene]:
    def make(word: str) -> Scene:
        word = "".join(c if c.isalnum() else "-" for c in word.lower())[:40].strip("-")
        name = f"t{os.getpid()}-{next(COUNTER)}-{word}"
        return Scene(cluster.api, cluster.kubectl, kubelet, name).open()

    return make


@pytest.fixture
def scene(new_scene: Callable[[str], Scene], request: pytest.FixtureRequest) -> Iterator[Scene]:
    made = new_scene(request.node.name.removeprefix("test_"))
    request.node.scenes = [made]
    yield made
    made.close()


class Operators:
    """All operator processes of the session: one that many tests share, and those of single tests.

    The shared one serves all namespaces, so it does not run beside an operator that a test starts for itself.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.shared: Operator | None = None
        self.own: list[Operator] = []

    def share(self) -> Operator:
        if self.shared is None:
            self.shared = Operator(self.cluster.kubeconfig, self.folder / "shared.log")
        if not self.shared.running:
            self.shared.start().wait_ready()
        return self.shared

    def make(self, scene: Scene, kubeconfig: Path | None = None, **settings: str) -> Operator:
        """An operator for the scene's namespace alone, not started yet."""
        if self.shared and self.shared.running:
            self.shared.stop()
        log = self.folder / f"{scene.namespace}-{len(self.own)}.log"
        operator = Operator(kubeconfig or self.cluster.kubeconfig, log, [scene.namespace], settings)
        self.own.append(operator)
        return operator

    def end(self) -> None:
        for operator in self.own:
            operator.kill()
        self.own.clear()


@pytest.fixture(scope="session")
def operators(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operators]:
    made = Operators(cluster, tmp_path_factory.mktemp("operators"))
    yield made
    made.end()
    if made.shared:
        made.shared.stop()


@pytest.fixture
def operator(operators: Operators) -> Operator:
    """The operator that tests share; it serves all namespaces."""
    return operators.share()


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
            report.sections.append(("objects", scene.kubectl("get", what, "-o", "wide", check=False)))
            for found in scene.api.list(names.PLURAL, scene.namespace):
                report.sections.append((found["metadata"]["name"], yaml.safe_dump(found.get("status"))))
    return report
