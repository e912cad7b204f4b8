"""What ends an attempt is told apart: the user's error, memory, a pod that was taken away."""

from __future__ import annotations

from pathlib import Path

from e2e.kubectl import Object
from e2e.scene import FINAL, Scene, metrics_of

RAISING = """\
def check(response: str) -> float:
    if len(response) >= 0:
        raise RuntimeError("the judge is out of order")
    return 1.0


def reward(prompt: str, response: str) -> float:
    return check(response)
"""


def final(status: Object) -> bool:
    return status["phase"] in FINAL


def test_a_reward_that_raises_fails_the_job_at_once_with_the_users_traceback(scene: Scene):
    job = scene.apply(scene.manifests.grpo("raising", steps=3, reward={"source": RAISING}))
    status = job.phase("Failed")
    failure = status["failure"]
    assert (failure["cause"], failure["exitCode"]) == ("UserError", 40)
    assert "the judge is out of order" in failure["message"]
    assert "line 3, in check" in failure["traceback"]
    assert 'raise RuntimeError("the judge is out of order")' in failure["traceback"]
    assert len(status["attempts"]) == 1
    assert failure["pod"] == job.pod()["metadata"]["name"]


def test_a_pod_that_hits_its_memory_limit_is_told_apart_and_counted(scene: Scene):
    # torch alone takes more than that
    manifest = scene.manifests.sft("greedy", steps=3, backoffLimit=1, resources={"memory": "160Mi"})
    job = scene.apply(manifest)
    status = job.phase("Failed")
    assert [(a["cause"], a["counted"]) for a in status["attempts"]] == [("OutOfMemory", True)] * 2
    assert status["countedFailures"] == 2
    assert status["failure"]["cause"] == "OutOfMemory"
    assert "spec.resources.memory" in status["failure"]["message"]
    ended = job.pod(attempt=2)["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["reason"] == "OOMKilled"


def test_deleting_a_pod_costs_no_retry_and_no_step(scene: Scene, tmp_path: Path):
    steps = 24
    job = scene.apply(scene.manifests.grpo("moved", steps=steps, pause=0.03, backoffLimit=0))
    job.reached(3)
    scene.kubectl("delete", "pod", job.pod()["metadata"]["name"], "--wait=false")
    status = job.phase("Succeeded")
    first, second = status["attempts"]
    assert (first["cause"], first["counted"], second["cause"]) == ("Preempted", False, "Succeeded")
    assert second["fromStep"] == first["toStep"] >= 3
    assert status.get("countedFailures", 0) == 0
    records = metrics_of(job.read_output(tmp_path))
    assert [record["step"] for record in records] == list(range(1, steps + 1))


def test_a_pod_that_is_deleted_by_force_goes_on_from_the_last_checkpoint(scene: Scene):
    job = scene.apply(scene.manifests.grpo("forced", steps=16, pause=0.06, backoffLimit=0))
    job.until(lambda status: status["checkpoint"]["latestStep"] >= 5, "a checkpoint")
    scene.kubectl("delete", "pod", job.pod()["metadata"]["name"], "--grace-period=0", "--force")
    status = job.phase("Succeeded")
    assert [a["counted"] for a in status["attempts"][:-1]] == [False]
    assert status["attempts"][-1]["fromStep"] >= 5
