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


def test_memory_raised_while_suspended_gives_the_result_of_a_job_that_had_it_from_the_start(
    scene: Scene, tmp_path: Path
):
    steps, more = 12, {"memory": "3Gi"}
    roomy = scene.apply(scene.manifests.grpo("roomy", steps=steps, resources=more))
    short = scene.apply(scene.manifests.grpo("short", steps=steps, pause=0.05, resources={"memory": "2Gi"}))
    short.reached(2)
    refused = scene.kubectl(
        "patch", "rlj", "short", "--type=merge", "-p", '{"spec": {"resources": {"memory": "3Gi"}}}', check=False
    )
    assert "spec.resources may change only while the job is suspended" in refused
    short.patch(suspend=True)
    saved = short.phase("Suspended")["checkpoint"]["latestStep"]
    assert 2 <= saved < steps
    short.patch(resources=more)
    short.patch(suspend=False)
    status = short.phase("Succeeded")
    assert status["attempts"][1]["fromStep"] == saved
    assert short.pod(attempt=2)["spec"]["containers"][0]["resources"]["limits"]["memory"] == "3Gi"
    ends = [roomy.phase("Succeeded"), status]
    runs = [job.read_output(tmp_path / job.name) for job in (roomy, short)]
    whole, resumed = (metrics_of(run) for run in runs)
    assert [record["step"] for record in resumed] == list(range(1, steps + 1)), "each step once"
    assert resumed == whole
    kept = [run.parent / end["result"]["checkpoint"]["latest"] for run, end in zip(runs, ends, strict=True)]
    weights, same = ((checkpoint / "model.safetensors").read_bytes() for checkpoint in kept)
    assert weights == same
