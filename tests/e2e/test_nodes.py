"""Two pods train one job, and a pod that is killed costs the steps since the last checkpoint, but not the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.kubectl import Object, eventually
from e2e.scene import SECONDS, Scene, TrainingJob, metrics_of

STEPS = 10
SAVE_EVERY = 3
# slow enough to be killed between a checkpoint and the end, until that has happened
REWARD = """
import os, time

def reward(prompt: str, response: str, answer: str) -> float:
    if PAUSE and not os.path.exists("/output/killed"):
        time.sleep(PAUSE)
    return sum(given == wanted for given, wanted in zip(response, answer)) / len(answer)
"""


def two_nodes(scene: Scene, name: str, *, pause: float = 0.0) -> Object:
    training = {"saveEvery": SAVE_EVERY}
    reward = {"source": REWARD.replace("PAUSE", str(pause))}
    return scene.manifests.grpo(name, steps=STEPS, training=training, reward=reward, resources={"nodes": 2})


@pytest.fixture(scope="module")
def nodes(new_scene: Any) -> Scene:
    return new_scene("nodes")


@pytest.fixture(scope="module")
def undisturbed(nodes: Scene, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingJob, list[Object]]:
    """A job of two pods that nobody disturbs, and its metrics."""
    job = nodes.apply(two_nodes(nodes, "calm"))
    job.phase("Succeeded")
    return job, metrics_of(job.read_output(tmp_path_factory.mktemp("calm")))


def test_two_pods_train_one_job(undisturbed: tuple[TrainingJob, list[Object]]):
    job, records = undisturbed
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert len(job.pods(attempt=1)) == 2
    assert job.status["result"]["totalSteps"] == STEPS
    assert f"step={STEPS}/{STEPS}" in job.log(index=0)
    assert "step=" not in job.log(index=1)  # rank 0 speaks for all


@pytest.mark.parametrize("index", [0, 1])
def test_a_job_goes_on_from_its_last_checkpoint_when_either_pod_is_killed(
    nodes: Scene, undisturbed: tuple[TrainingJob, list[Object]], index: int, tmp_path: Path
):
    job = nodes.apply(two_nodes(nodes, f"killed-{index}", pause=0.3))
    job.until(lambda status: status["checkpoint"]["latestStep"] >= SAVE_EVERY, "a checkpoint")
    job.kill_worker("/output/killed", index=index)
    status = job.phase("Succeeded")
    first, second = status["attempts"]
    assert (first["cause"], first["counted"], second["cause"]) == ("Error", True, "Succeeded")
    assert SAVE_EVERY <= second["fromStep"] <= STEPS
    assert second["fromStep"] % SAVE_EVERY == 0
    assert metrics_of(job.read_output(tmp_path)) == undisturbed[1]


@pytest.mark.long
def test_a_pod_that_is_held_back_is_waited_for_and_then_both_train(new_scene: Any):
    scene = new_scene("held-back")
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "pods"}, "spec": {"hard": {"pods": "1"}}}
    scene.kubectl.apply(quota)
    job = scene.apply(two_nodes(scene, "held"))
    job.until(
        lambda status: "1 of 2 pods" in status.get("message", "") or "quota" in status.get("message", ""), "one pod"
    )
    eventually(
        lambda: "1 of 2 pods are here; waiting for held-1-1" in job.log(index=0), "the pod says for whom", SECONDS
    )
    assert job.status["phase"] != "Running"
    scene.kubectl.apply(quota | {"spec": {"hard": {"pods": "9"}}})
    status = job.phase("Succeeded")
    assert [attempt["cause"] for attempt in status["attempts"]] == ["Succeeded"]
    assert status["attempts"][0]["runningTime"]


@pytest.mark.long
def test_a_run_that_hangs_is_stopped_with_its_stack(nodes: Scene):
    hangs = {"source": "import time\n\ntime.sleep(10**9)\n\n\ndef reward(prompt, response, answer):\n    return 1.0\n"}
    limits = {"startupTimeoutSeconds": 20, "stallTimeoutSeconds": 10, "backoffLimit": 0}
    job = nodes.apply(nodes.manifests.grpo("hangs", steps=3, reward=hangs, **limits))
    status = job.phase("Failed")
    assert status["failure"]["cause"] == "Stalled"
    assert "no sign of progress" in status["failure"]["message"]
    assert "hangs here" in status["failure"]["traceback"]
    assert "Current thread" in job.log(index=0) or "Thread 0x" in job.log(index=0)
