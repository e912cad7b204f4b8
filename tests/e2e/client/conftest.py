"""Fixtures of the client's tests: a desk with a namespace for each module, the model that is trained, enough GPUs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.client.desk import Desk
from e2e.kubectl import Kubectl, eventually
from e2e.manifests import demo
from e2e.scene import SECONDS, Scene

GPU = "nvidia.com/gpu"
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def desk(
    new_scene: Callable[[str], Scene], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Desk]:
    """The process works at it as well: its folder and its cluster are those of the desk."""
    word = Path(str(request.node.path)).stem.removeprefix("test_")
    made = Desk(tmp_path_factory.mktemp("desk"), new_scene(word))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, 3 MB."""
    return Path(demo().make_model(tmp_path_factory.mktemp("tiny") / "tiny", seed=0))


@pytest.fixture(scope="session")
def rows() -> Rows:
    return list(demo().make_rows(32, seed=0, without=set()))


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    """What makes a run short, and its numbers those of any other machine: one thread adds in one order."""
    return {"max_epochs": 1000, "batch_size": 4, "gpus": 0, "size": "1Gi", "env": {"OMP_NUM_THREADS": "1"}}


@pytest.fixture(scope="session")
def gpus() -> Iterator[None]:
    """A node that offers GPUs, as a device plugin would: the documented examples ask for one, as by default."""
    node = Kubectl().items("nodes")[0]
    name, before = node["metadata"]["name"], int(node["status"]["allocatable"].get(GPU, 0))

    def offer(count: int) -> None:
        path = "/status/capacity/" + GPU.replace("/", "~1")
        change = json.dumps([{"op": "add", "path": path, "value": str(count)}])
        Kubectl()("patch", "node", name, "--subresource=status", "--type=json", "-p", change)

        def offered() -> bool:
            return int(Kubectl().json("node", name)["status"]["allocatable"].get(GPU, 0)) == count

        eventually(offered, f"{name} offers {count} {GPU}", SECONDS)

    offer(max(before, 8))
    yield
    offer(before)
