"""Fixtures: those of tests/e2e, for an operator that has an image of rollout replicas; and the demo's model, taught by SFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import ROOT
from e2e.conftest import manifests, new_scene, operator, pytest_runtest_makereport, scene
from e2e.kubectl import Kubectl, Object
from e2e.manifests import demo
from e2e.scene import Scene
from marks import mark_below
from nemo_rl.backends.kubernetes.ship.archive import Archive
from nemo_rl.backends.kubernetes.ship.data import ship_directory
from nemo_rl.job import names

__all__ = ["manifests", "new_scene", "operator", "pytest_runtest_makereport", "scene"]
TEST_SECONDS = 3600
START_SECONDS = 1200.0
RUN_SECONDS = 2400.0
"""Deadlines that only a stuck cluster misses: vLLM takes minutes to start where several pods share two processors."""
HELD_OUT = demo().make_rows(256, seed=10_000, without=set())
ROWS = demo().make_rows(1000, seed=0, without={row["prompt"] for row in HELD_OUT})
SORTED = """\
import time


def reward(prompt: str, response: str, answer: str) -> float:
    time.sleep(PAUSE)
    return float(response == answer)
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_below(__file__, items, pytest.mark.e2e, pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model after the supervised part of the demo: it knows the form of the answer, and sorts badly."""
    import nemo_rl

    folder = tmp_path_factory.mktemp("taught")
    result = nemo_rl.train(
        model=demo().make_model(folder / "model", seed=0),
        dataset=[{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS],
        algorithm="sft",
        max_steps=120,
        max_epochs=20,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=20,
        output_dir=folder / "sft",
        backend="local",
    )
    return Path(result.checkpoint_path)


@pytest.fixture(scope="session")
def archive(taught: Path) -> Archive:
    return ship_directory(taught).archive


@pytest.fixture
def place(scene: Scene, archive: Archive) -> Scene:
    scene.kubectl.apply(*archive.config_maps())
    return scene


Job = Callable[..., Object]


@pytest.fixture
def job(archive: Archive) -> Job:
    """Makes the manifest of examples/grpo_replicas.yaml for what this machine has: the demo's task, no GPU."""

    def make(name: str, *, steps: int, pause: float = 0.0, **spec: Any) -> Object:
        found: Any = yaml.safe_load((ROOT / "examples/grpo_replicas.yaml").read_text())
        found["metadata"]["name"] = name
        example = found["spec"]
        changes: Object = {
            "model": "bundle://model",
            "bundles": [archive.spec("model").model_dump(mode="json", by_alias=True, exclude_none=True)],
            "dataset": {"inline": ROWS},
            "reward": {"source": SORTED.replace("PAUSE", str(pause))},
            "training": {"maxSteps": steps, "batchSize": 32, "learningRate": 3e-4, "saveEvery": 5},
            "grpo": {"maxNewTokens": 10},
            "rollout": {"gpusPerReplica": 0, "resources": {"memory": "4Gi"}},
            "resources": {"gpusPerNode": 0},
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
            "output": {"size": "1Gi"},
        }
        for change in (changes, spec):
            for key, value in change.items():
                both = isinstance(value, dict) and key not in ("dataset", "reward")
                example[key] = example.get(key, {}) | value if both else value
        return {**found, "spec": {key: value for key, value in example.items() if value is not None}}

    return make


def ready(status: Object, wanted: int) -> bool:
    return bool(status["rollout"]["ready"] == wanted == status["rollout"]["replicas"])


def replicas_of(scene: Scene, name: str) -> list[Object]:
    """Its replicas' pods, by name."""
    selector = f"{names.LABEL_JOB}={name},{names.LABEL_COMPONENT}={names.COMPONENT_ROLLOUT}"
    return sorted(Kubectl(scene.namespace).items("pods", "-l", selector), key=lambda pod: str(pod["metadata"]["name"]))
