"""What somebody else made is not the job's, whatever its labels and owners say: frozen jobs, Jobs, Services, claims."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import pytest

from cluster.api import Object, eventually
from cluster.manifests import result
from cluster.operator_process import Operator
from cluster.scene import Scene
from nemo_rl.job import names

WATCH_SECONDS = 3.0
"""For so long nothing must happen."""


def owner(scene: Scene) -> Object:
    """What anybody can write: that the job `x` controls it."""
    uid = scene.job()["metadata"]["uid"]
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "x", "uid": uid, "controller": True}


def forge_job(scene: Scene, name: str, number: str) -> None:
    uid = scene.job()["metadata"]["uid"]
    labels = {names.LABEL_JOB: "x", names.LABEL_JOB_UID: uid, names.LABEL_COMPONENT: "trainer"}
    labels[names.LABEL_ATTEMPT] = number
    pod = {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "evil:1"}]}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"completionMode": "Indexed", "completions": 1, "parallelism": 1, "backoffLimit": 0, "template": template}
    meta = {"name": name, "labels": labels, "ownerReferences": [owner(scene)]}
    scene.api.create("jobs", scene.namespace, {"metadata": meta, "spec": spec})


def forge_frozen_job(scene: Scene, **spec: Any) -> Object:
    """The frozen job `x-job` with other content, immutable and owned as the operator's is."""
    meta = scene.job()["metadata"]
    found = {"name": "x", "namespace": scene.namespace, "uid": meta["uid"]}
    job = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": found, "spec": scene.job()["spec"] | spec}
    body = {
        "metadata": {"name": "x-job", "ownerReferences": [owner(scene)]},
        "immutable": True,
        "data": {"job.json": json.dumps(job)},
    }
    return scene.api.create("configmaps", scene.namespace, body)


EVIL = {"source": "import os\ndef reward(prompt, response): return len(os.environ['HF_TOKEN'])"}


def test_a_forged_frozen_job_starts_no_pod(scene: Scene, operator: Operator):
    scene.submit(suspend=True)
    scene.phase("Suspended")
    forge_frozen_job(scene, reward=EVIL)
    scene.change(suspend=False)
    scene.message("ConfigMap x-job exists with other content (spec.reward")
    assert scene.condition("Accepted")["reason"] == "NameConflict"
    assert not scene.jobs()
    scene.api.delete("configmaps", scene.namespace, "x-job")
    scene.succeed()


def test_a_frozen_job_that_is_swapped_between_attempts_starts_no_pod(scene: Scene, operator: Operator):
    scene.submit(backoffLimit=0)
    first = scene.attempt(1).run()
    scene.phase("Running")
    scene.api.delete("configmaps", scene.namespace, "x-job")
    forge_frozen_job(scene, reward=EVIL)
    first.evict()
    scene.message("ConfigMap x-job exists with other content (spec.reward")
    assert len(scene.jobs()) == 1


def test_the_digest_of_the_frozen_job_is_in_the_arguments_of_the_pods(scene: Scene, operator: Operator):
    scene.submit()
    scene.phase("Starting")
    content = scene.api.get("configmaps", scene.namespace, "x-job")["data"]["job.json"]
    pod = scene.jobs()[0]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == [f"--job-sha256={hashlib.sha256(content.encode()).hexdigest()}"]
    assert "maxSteps" not in content, "defaults that the API server filled in are the image's own"


def test_a_forged_second_attempt_is_not_the_jobs(scene: Scene, operator: Operator):
    scene.submit(backoffLimit=0)
    real = scene.attempt(1).run()
    scene.phase("Running")
    forge_job(scene, "x-2", "2")
    scene.attempt(2).run().exit(0, result(9999))
    time.sleep(WATCH_SECONDS)
    assert scene.status()["phase"] == "Running", scene.status().get("result")
    real.exit(0, result(10))
    assert scene.phase("Succeeded")["result"]["totalSteps"] == 10


def test_a_forged_job_in_the_place_of_the_next_attempt_is_said_and_not_followed(scene: Scene, operator: Operator):
    scene.submit(backoffLimit=0)
    first = scene.attempt(1).run()
    scene.phase("Running")
    forge_job(scene, "x-2", "2")
    first.evict()
    scene.message("Job x-2 exists with other content", "containers")
    assert scene.status()["attempt"] == 1
    scene.api.delete("jobs", scene.namespace, "x-2")
    eventually(lambda: images_of(scene, "x-2") - {"evil:1"}, "a pod of the operator's Job")
    scene.succeed(attempt=2)


def images_of(scene: Scene, job: str) -> set[str]:
    """Of the pods of a Job: their images, once none of them is on its way out."""
    pods = [p for p in scene.api.list("pods", scene.namespace) if p["metadata"]["name"].startswith(f"{job}-")]
    images = {p["spec"]["containers"][0]["image"] for p in pods}
    return images if len(images) == 1 else set()


@pytest.mark.parametrize("number", ["9" * 30, "2", "1000"])
def test_a_forged_number_does_not_stop_the_status(number: str, scene: Scene, operator: Operator):
    scene.submit()
    real = scene.attempt(1).run()
    scene.phase("Running")
    forge_job(scene, "innocent", number)
    time.sleep(1)
    real.exit(0, result(10))
    assert scene.phase("Succeeded")["result"]["totalSteps"] == 10


def test_a_forged_service_is_not_used(scene: Scene, operator: Operator):
    scene.submit(suspend=True, resources={"nodes": 2})
    scene.phase("Suspended")
    spec = {"clusterIP": "None", "selector": {"app": "attacker"}, "ports": [{"port": 29400}]}
    meta = {"name": "x", "ownerReferences": [owner(scene)]}
    scene.api.create("services", scene.namespace, {"metadata": meta, "spec": spec})
    scene.change(suspend=False)
    scene.message("Service x exists with other content (selector")
    assert not scene.jobs()
    scene.api.delete("services", scene.namespace, "x")
    scene.attempt(1)
    assert scene.api.get("services", scene.namespace, "x")["spec"]["selector"][names.LABEL_JOB] == "x"


def test_a_claim_of_another_size_made_beforehand_is_said_and_refused(scene: Scene, operator: Operator):
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    meta = {"name": "x-output", "labels": {names.LABEL_JOB: "x"}}
    scene.api.create("persistentvolumeclaims", scene.namespace, {"metadata": meta, "spec": spec})
    scene.submit(output={"size": "2Gi"})
    scene.message("it has 1Gi, spec.output.size asks for 2Gi", "set spec.output.claim to x-output")
    assert not scene.jobs()
    scene.submit("y", output={"claim": "x-output"})
    scene.succeed(name="y")
