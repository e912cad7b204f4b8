"""Fixtures: the operator of the current cluster, the model that all jobs train, and a namespace for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from e2e.manifests import Manifests, model_archive
from e2e.operator_pod import OperatorPod
from e2e.scene import Scene
from marks import mark_below

TEST_SECONDS = 900
SCENES: list[Scene] = []
"""The namespaces that are open now."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_below(__file__, items, pytest.mark.e2e, pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="session")
def operator() -> OperatorPod:
    found = OperatorPod()
    found.wait_ready()
    return found


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    return Manifests(model_archive(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def new_scene(operator: OperatorPod, manifests: Manifests) -> Iterator[Callable[[str], Scene]]:
    """Makes scenes that are closed after the tests of the module."""
    made: list[Scene] = []

    def make(word: str) -> Scene:
        made.append(opened(word, manifests))
        return made[-1]

    yield make
    for scene in made:
        closed(scene)


@pytest.fixture
def scene(operator: OperatorPod, manifests: Manifests, request: pytest.FixtureRequest) -> Iterator[Scene]:
    made = opened(request.node.name.removeprefix("test_"), manifests)
    yield made
    closed(made)


def opened(word: str, manifests: Manifests) -> Scene:
    SCENES.append(Scene(word, manifests))
    return SCENES[-1].open()


def closed(scene: Scene) -> None:
    SCENES.remove(scene)
    scene.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure shows the operator's log and what was in the namespaces that were open."""
    report = yield
    if report.failed and report.when != "teardown":
        operator = getattr(item, "funcargs", {}).get("operator")
        if isinstance(operator, OperatorPod):
            report.sections.append(("operator log", operator.log()))
        for scene in SCENES:
            for title, text in scene.describe():
                report.sections.append((f"{title} of {scene.namespace}", text))
    return report
