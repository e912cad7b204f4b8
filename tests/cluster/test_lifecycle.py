"""A job's life as a user sees it: phases, conditions, columns, and kubectl itself."""

from __future__ import annotations

import re

import pytest

from cluster.api import eventually
from cluster.manifests import result
from cluster.operator_process import IMAGE, Operator
from cluster.scene import Scene
from nemo_rl.job import names

pytestmark = pytest.mark.usefixtures("operator")
ORDER = ["Pending", "Starting", "Running", "Succeeded"]


def test_phases_come_in_order_and_each_once(scene: Scene) -> None:
    seen = scene.record()
    scene.submit()
    pod = scene.attempt(1)
    scene.phase("Starting", "Pending")
    pod.run()
    scene.phase("Running")
    pod.exit(0, result(10))
    scene.phase("Succeeded")
    eventually(lambda: seen and seen[-1].get("phase") == "Succeeded", "the recorder saw the end")
    phases = [status["phase"] for status in seen if "phase" in status]
    order = [phase for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase]
    assert order == [phase for phase in ORDER if phase in order]
    assert order[-2:] == ["Running", "Succeeded"]


def test_status_of_a_job_that_succeeded_is_complete(scene: Scene) -> None:
    created = scene.submit(training={"maxSteps": 10})
    pod = scene.attempt(1).run()
    pod.serve({"step": 4, "totalSteps": 10, "metrics": {"reward": 0.61}, "secondsRemaining": 840})
    running = scene.until(lambda s: s["progress"]["step"] == 4, "progress is shown")
    assert running["phase"] == "Running"
    assert running["progress"]["text"] == "4/10"
    assert running["progress"]["percent"] == 40
    assert running["progress"]["eta"] == "14m"
    assert running["progress"]["metrics"] == {"reward": "0.61"}
    checkpoint = {"latest": "x/checkpoint-10", "latestStep": 10, "best": "x/checkpoint-8", "bestStep": 8}
    pod.exit(0, result(10, metrics={"reward": 0.9}, checkpoint=checkpoint))
    status = scene.phase("Succeeded")
    assert status["observedGeneration"] == created["metadata"]["generation"]
    assert status["attempt"] == 1
    assert [a["cause"] for a in status["attempts"]] == ["Succeeded"]
    assert status["attempts"][0]["job"] == names.attempt_job("x", 1)
    assert status["result"]["totalSteps"] == 10
    assert status["result"]["metrics"] == {"reward": "0.9"}
    assert status["checkpoint"]["best"] == "x/checkpoint-8"
    assert status["startTime"] <= status["completionTime"]
    values = {c["type"]: c["status"] for c in status["conditions"]}
    assert {k: values[k] for k in ("Accepted", "Complete", "Finished", "Running")} == {
        "Accepted": "True",
        "Complete": "True",
        "Finished": "True",
        "Running": "False",
    }
    assert values.get("Failed", "False") == "False"
    assert all(c["reason"] and c["observedGeneration"] for c in status["conditions"])


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_smallest_manifest_of_each_algorithm_trains(scene: Scene, algorithm: str) -> None:
    scene.submit(algorithm=algorithm)
    assert scene.succeed()["phase"] == "Succeeded"


def test_default_image_is_the_operators(scene: Scene) -> None:
    scene.submit()
    assert scene.attempt(1).object["spec"]["containers"][0]["image"] == IMAGE


def test_kubectl_get_shows_the_columns(scene: Scene) -> None:
    scene.submit(algorithm="grpo")
    pod = scene.attempt(1).run()
    pod.serve({"step": 120, "totalSteps": 500, "metrics": {"reward": 0.61}, "secondsRemaining": 840})
    scene.until(lambda s: s["progress"]["step"] == 120, "progress is shown")
    header, row = scene.kubectl("get", names.SHORT_NAME).splitlines()
    assert header.split() == ["NAME", "ALGO", "MODEL", "PHASE", "STEP", "SCORE", "ETA", "AGE"]
    assert row.split()[:7] == ["x", "grpo", "tiny", "Running", "120/500", "0.61", "14m"]
    wide = scene.kubectl("get", names.SHORT_NAME, "-o", "wide").splitlines()[0].split()
    assert {"GPUS", "QUEUE", "ATTEMPT", "REASON", "CHECKPOINT"} <= set(wide)


@pytest.mark.parametrize(
    ("algorithm", "metrics", "score"),
    [
        ("sft", {"loss": 1.25, "reward": 9}, "1.25"),
        ("dpo", {"loss": 0.7, "preference_accuracy": 0.875}, "0.875"),
    ],
)
def test_the_score_is_what_the_algorithm_is_judged_by(
    scene: Scene, algorithm: str, metrics: dict[str, float], score: str
) -> None:
    scene.submit(algorithm=algorithm)
    pod = scene.attempt(1).run()
    pod.serve({"step": 120, "totalSteps": 500, "metrics": metrics, "secondsRemaining": 840})
    scene.until(lambda s: s["score"] == score, "the score is shown")
    assert scene.kubectl("get", names.SHORT_NAME).splitlines()[1].split()[5] == score


def test_resource_is_in_its_category_and_not_in_all(scene: Scene) -> None:
    scene.submit()
    assert f"{names.SINGULAR}.{names.GROUP}/x" in scene.kubectl("get", "ml", "-o", "name")
    assert names.GROUP not in scene.kubectl("get", "all", "-o", "name")


def test_a_job_restored_without_its_status_is_not_trained_again_unasked(scene: Scene) -> None:
    scene.submit(job_labels={names.LABEL_RESTORED: "nightly-2026-11-28"})
    status = scene.phase("Pending")
    assert status["reason"] == "Restored"
    assert f"kubectl label rlj x {names.LABEL_RESTORED}-" in status["message"]
    assert scene.jobs() == []
    scene.kubectl("label", names.SHORT_NAME, "x", f"{names.LABEL_RESTORED}-")
    scene.succeed()


def test_a_job_restored_with_its_status_is_left_as_it_is(scene: Scene) -> None:
    scene.submit(suspend=True, job_labels={names.LABEL_RESTORED: "nightly"})
    scene.message("restored")
    done = {"phase": "Succeeded", "reason": "Succeeded", "message": "training ended after 9 steps"}
    scene.api.patch(names.PLURAL, scene.namespace, "x", {"status": done}, "status")
    scene.change(suspend=False)
    generation = scene.job()["metadata"]["generation"]
    scene.until(lambda s: s["observedGeneration"] == generation, "it was seen")
    assert scene.status()["phase"] == "Succeeded"
    assert scene.jobs() == []


def test_kubectl_describe_shows_status_and_events(scene: Scene) -> None:
    scene.submit()
    scene.succeed()
    eventually(lambda: len(scene.events()) >= 2, "events of the start and of the end")
    text = scene.kubectl("describe", names.SHORT_NAME, "x")
    for expected in ("Phase:", "Succeeded", "Conditions:", "Attempts:", "Events:", "attempt 1"):
        assert expected.lower() in text.lower()


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("spec.grpo", ["numGenerationsPerPrompt", "normalizeRewards", "Default 16"]),
        ("spec.training.learningRate", ["Peak learning rate", "Default 1e-6 for grpo"]),
        ("spec.output.serveUntil", ["RFC 3339"]),
        ("status.progress", ["secondsRemaining", "metrics"]),
        ("status.attempts", ["exitCode", "counted"]),
    ],
)
def test_kubectl_explain_describes_fields(scene: Scene, field: str, expected: list[str]) -> None:
    text = scene.kubectl("explain", f"{names.SHORT_NAME}.{field}")
    for word in expected:
        assert word in text
    assert "<no description>" not in text


def test_explain_has_a_description_for_every_field(scene: Scene) -> None:
    crd = scene.api.get("customresourcedefinitions", None, names.CRD_NAME)
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    missing: list[str] = []

    def walk(where: str, schema: dict[str, object]) -> None:
        for name, child in (schema.get("properties") or {}).items():  # type: ignore[attr-defined]
            if not child.get("description") and where:
                missing.append(f"{where}.{name}")
            walk(f"{where}.{name}", child)
        if isinstance(schema.get("items"), dict):
            walk(f"{where}[]", schema["items"])  # type: ignore[arg-type]

    for part in ("spec", "status"):
        walk(part, root["properties"][part])
    assert missing == []


def test_kubectl_wait_for_finished_ends_for_success_and_failure(scene: Scene) -> None:
    scene.submit("good")
    scene.submit("bad")
    scene.attempt(1, "good").run().exit(0, result(1))
    scene.attempt(1, "bad").run().exit(40, "")
    for name in ("good", "bad"):
        scene.kubectl("wait", "--for=condition=Finished", f"{names.SHORT_NAME}/{name}", "--timeout=40s")
    scene.kubectl("wait", "--for=condition=Complete", f"{names.SHORT_NAME}/good", "--timeout=5s")
    scene.kubectl("wait", "--for=condition=Failed", f"{names.SHORT_NAME}/bad", "--timeout=5s")


def test_kubectl_delete_takes_the_children_but_for_the_retained_claim(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2})
    pods = [scene.attempt(1, index=i).run() for i in (0, 1)]
    scene.phase("Running")
    scene.kubectl("delete", names.SHORT_NAME, "x", "--timeout=60s")
    for kind, name in [
        ("jobs", names.attempt_job("x", 1)),
        ("services", "x"),
        ("configmaps", names.frozen_job("x")),
        *(("pods", pod.name) for pod in pods),
    ]:
        scene.gone(kind, name)
    assert scene.api.find("persistentvolumeclaims", scene.namespace, names.output_claim("x"))


def test_deleting_takes_the_claim_unless_it_is_retained(scene: Scene) -> None:
    scene.submit(output={"retain": False})
    scene.attempt(1)
    scene.kubectl("delete", names.SHORT_NAME, "x", "--timeout=60s")
    scene.gone("persistentvolumeclaims", names.output_claim("x"))


def test_same_name_can_be_used_again(scene: Scene) -> None:
    scene.submit()
    first = scene.attempt(1).run()
    scene.kubectl("delete", names.SHORT_NAME, "x", "--timeout=60s")
    scene.submit()
    eventually(lambda: not first.alive, "the old pod is gone")
    eventually(lambda: scene.attempt(1).uid != first.uid, "a pod of the new job")
    assert scene.succeed()["attempt"] == 1


def test_no_finalizer_and_no_annotation_is_put_on_users_objects(scene: Scene) -> None:
    scene.submit()
    scene.succeed()
    meta = scene.job()["metadata"]
    assert "finalizers" not in meta
    assert "annotations" not in meta


def test_events_are_few_and_not_repeated(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    for step in range(5):
        pod.serve({"step": step, "totalSteps": 10})
        scene.until(lambda s, step=step: s["progress"]["step"] == step, f"step {step}")  # type: ignore[misc]
    pod.exit(0, result(10))
    scene.phase("Succeeded")
    eventually(lambda: len(scene.events()) >= 2, "events of the start and of the end")
    events = scene.events()
    assert len({(e["reason"], e["message"]) for e in events}) == len(events)
    assert all(e.get("count", 1) == 1 for e in events)
    assert len(events) <= 6


def test_operator_serves_health_and_metrics_without_names_of_jobs(scene: Scene, operator: Operator) -> None:
    scene.submit("a-job-with-a-telling-name")
    scene.succeed(name="a-job-with-a-telling-name")
    assert operator.probe("/healthz") == 200
    metrics = operator.metrics()
    assert any(re.match(r"\w*reconcile\w*", name) for name in metrics)
    assert not [name for name in metrics if "telling-name" in name]
