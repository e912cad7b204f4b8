"""The test's own parts: what a played pod does to a real Job is what a real pod would do."""

from __future__ import annotations

import urllib.request
from typing import Any

from cluster.api import Object, eventually
from cluster.scene import Scene
from nemo_rl.job import names


def plain_job(scene: Scene, name: str, **spec: Any) -> None:
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "test"}]}}
    body = {"metadata": {"name": name}, "spec": {"backoffLimit": 0, "template": template, **spec}}
    scene.api.create("jobs", scene.namespace, body)


def conditions(scene: Scene, name: str) -> set[str]:
    found = scene.api.get("jobs", scene.namespace, name).get("status", {}).get("conditions", [])
    return {c["type"] for c in found if c["status"] == "True"}


def test_pod_that_exits_with_zero_completes_its_job(scene: Scene) -> None:
    plain_job(scene, "good")
    scene.kubelet.pod(scene.namespace, "good").run().exit(0, {"steps": 1})
    eventually(lambda: "Complete" in conditions(scene, "good"), "the Job is Complete")


def test_pod_that_fails_fails_its_job_and_keeps_its_termination_message(scene: Scene) -> None:
    plain_job(scene, "bad")
    pod = scene.kubelet.pod(scene.namespace, "bad").run()
    pod.exit(40, {"message": "no such column"})
    eventually(lambda: "Failed" in conditions(scene, "bad"), "the Job is Failed")
    state: Object = pod.object["status"]["containerStatuses"][0]["state"]["terminated"]
    assert state["exitCode"] == 40
    assert "no such column" in state["message"]


def test_deleting_a_job_stops_its_running_pod(scene: Scene) -> None:
    plain_job(scene, "gone")
    pod = scene.kubelet.pod(scene.namespace, "gone").run()
    scene.api.delete("jobs", scene.namespace, "gone")
    scene.gone("pods", pod.name)


def test_pods_of_an_indexed_job_serve_progress_at_addresses_of_their_own(scene: Scene) -> None:
    plain_job(scene, "many", completionMode="Indexed", completions=2, parallelism=2)
    for index in (0, 1):
        pod = scene.kubelet.pod(scene.namespace, "many", index).run()
        pod.serve({"step": index})
        address = pod.object["status"]["podIP"]
        with urllib.request.urlopen(f"http://{address}:{names.TRAINER_PORT}/progress", timeout=5) as response:
            assert response.read() == b'{"step": %d}' % index
