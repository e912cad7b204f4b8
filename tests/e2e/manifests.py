"""Builders of the manifests that users write: small jobs of each algorithm for the demo's model, on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from e2e.kubectl import Object
from nemo_rl.backends.kubernetes.ship.archive import Archive
from nemo_rl.backends.kubernetes.ship.data import ship_directory
from nemo_rl.job import names

MODEL = "model"
ROOT = Path(__file__).resolve().parents[2]
REWARD = """\
import time


def reward(prompt: str, response: str, answer: str) -> float:
    time.sleep(PAUSE)
    return sum(given == wanted for given, wanted in zip(response, answer)) / len(answer)
"""


def demo() -> Any:
    """examples/demo.py as a module: its model and its rows are those of all jobs here."""
    spec = importlib.util.spec_from_file_location("nemo_rl_demo", ROOT / "examples/demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_archive(folder: Path) -> Archive:
    """The demo's model, packed as the client packs what it ships."""
    return ship_directory(demo().make_model(folder, seed=0)).archive


def reward(pause: float = 0.0) -> Object:
    """An inline reward: the share of characters that are right. It takes `pause` seconds for each completion."""
    return {"source": REWARD.replace("PAUSE", str(pause))}


class Manifests:
    """Manifests of jobs that train the model of one archive."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.rows = demo().make_rows(32, seed=0, without=set())

    def config_maps(self) -> list[Object]:
        """What the namespace of the jobs must hold."""
        return self.archive.config_maps()

    def grpo(self, name: str, *, steps: int, pause: float = 0.0, **spec: Any) -> Object:
        settings = {"grpo": {"numGenerationsPerPrompt": 4, "maxNewTokens": 8}, "reward": reward(pause)}
        return self._job(name, "grpo", self.rows, steps, settings | spec)

    def sft(self, name: str, *, steps: int, **spec: Any) -> Object:
        rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in self.rows]
        return self._job(name, "sft", rows, steps, spec)

    def dpo(self, name: str, *, steps: int, **spec: Any) -> Object:
        rows = [
            {"prompt": row["prompt"], "chosen": row["answer"], "rejected": row["answer"][::-1] + "0"}
            for row in self.rows
        ]
        return self._job(name, "dpo", rows, steps, spec)

    def _job(self, name: str, algorithm: str, rows: list[Object], steps: int, spec: Object) -> Object:
        """spec wins over what is set here; sections are merged field by field."""
        training = {"maxSteps": steps, "maxEpochs": 10_000, "batchSize": 4, "learningRate": 1e-3, "saveEvery": 5}
        resources = {"gpusPerNode": 0}
        base: Object = {
            "model": f"bundle://{MODEL}",
            "algorithm": algorithm,
            "dataset": {"inline": rows},
            "bundles": [self.archive.spec(MODEL).model_dump(mode="json", by_alias=True, exclude_none=True)],
            "output": {"size": "1Gi"},
            "terminationGracePeriodSeconds": 60,
            # a model this small gains nothing from more, and several pods share the machine
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        }
        more = {key: value for key, value in spec.items() if key not in ("training", "resources")}
        base |= more
        base["training"] = training | spec.get("training", {})
        base["resources"] = resources | spec.get("resources", {})
        return {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name},
            "spec": base,
        }
