"""What a user or the cluster does in the middle of training: suspend, resume, a deadline, the end of the operator."""

from __future__ import annotations

from pathlib import Path

from e2e.kubectl import eventually
from e2e.operator_pod import OperatorPod
from e2e.scene import SECONDS, Scene, metrics_of

LONG = 100_000


def test_suspend_saves_and_frees_the_pod_and_resume_goes_on_at_that_step(scene: Scene, tmp_path: Path):
    steps = 24
    job = scene.apply(scene.manifests.grpo("paused", steps=steps, pause=0.03))
    job.reached(3)
    job.patch(suspend=True)
    status = job.phase("Suspended")
    saved = status["checkpoint"]["latestStep"]
    assert saved >= 3
    assert status["attempts"][0]["toStep"] == saved
    assert not job.pods(attempt=1)
    job.patch(suspend=False)
    status = job.phase("Succeeded")
    assert status["attempts"][1]["fromStep"] == saved
    assert [(a["cause"], a["counted"]) for a in status["attempts"]] == [("Suspended", False), ("Succeeded", False)]
    records = metrics_of(job.read_output(tmp_path))
    assert [record["step"] for record in records] == list(range(1, steps + 1))


def test_a_job_that_runs_over_its_deadline_fails_and_its_pod_ends(scene: Scene):
    job = scene.apply(scene.manifests.grpo("endless", steps=LONG, pause=0.03))
    job.reached(1)
    job.patch(activeDeadlineSeconds=1)
    status = job.phase("Failed")
    assert status["failure"]["cause"] == "DeadlineExceeded"
    assert "activeDeadlineSeconds is 1" in status["failure"]["message"]
    job.no_pods()


def test_killing_the_operator_in_the_middle_of_training_is_invisible_to_the_job(scene: Scene, operator: OperatorPod):
    job = scene.apply(scene.manifests.grpo("steady", steps=40, pause=0.03))
    before = job.reached(2)["progress"]["step"]
    pod = job.pod()["metadata"]["uid"]
    killed = operator.kill()
    eventually(
        lambda: (found := operator.ready()) and found["metadata"]["uid"] != killed, "another operator pod", SECONDS
    )
    job.reached(before + 1)  # it follows the job that it did not start
    status = job.phase("Succeeded")
    assert status["attempt"] == 1
    assert [pod["metadata"]["uid"] for pod in job.pods()] == [pod]
    assert job.phases == ["Starting", "Running", "Succeeded"]
