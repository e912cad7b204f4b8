"""Why a job does not run yet, in words; and how far it is, whatever its pod says."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler

import pytest

from cluster.api import eventually
from cluster.kubelet import Answer, answer, endless
from cluster.manifests import result
from cluster.operator_process import Operator
from cluster.scene import Scene
from nemo_rl.job import names

pytestmark = pytest.mark.usefixtures("operator")


def test_lack_of_gpus_is_worded(scene: Scene) -> None:
    scene.submit(resources={"gpusPerNode": 2})
    scene.attempt(1).unschedulable("0/8 nodes are available: 8 Insufficient nvidia.com/gpu.")
    status = scene.message("2 × nvidia.com/gpu")
    assert status["phase"] in ("Pending", "Starting")
    assert "8" in status["message"]


@pytest.mark.parametrize(
    ("message", "fragments"),
    [
        ("0/3 nodes are available: 3 Insufficient cpu.", ["cpu"]),
        ("0/3 nodes are available: 3 node(s) had untolerated taint {gpu: true}.", ["taint"]),
        ("0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims.", ["claim"]),
        ('0/1 nodes are available: persistentvolumeclaim "mine" not found.', ["mine"]),
        ("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.", ["selector"]),
    ],
)
def test_scheduling_trouble_is_worded(scene: Scene, message: str, fragments: list[str]) -> None:
    scene.submit()
    scene.attempt(1).unschedulable(message)
    scene.message(*fragments)


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff"])
def test_image_trouble_is_worded_with_the_image(scene: Scene, reason: str) -> None:
    scene.submit(image="registry.example/no-such:1")
    scene.attempt(1).wait_for(reason, "Back-off pulling image: not found")
    status = scene.message("registry.example/no-such:1")
    assert status["phase"] in ("Pending", "Starting")


def test_missing_secret_is_worded(scene: Scene) -> None:
    variable = {"name": "T", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    scene.submit(env=[variable])
    scene.attempt(1).wait_for("CreateContainerConfigError", 'secret "hub" not found')
    scene.message("secret", "hub")


def test_impossible_image_name_is_final(scene: Scene) -> None:
    scene.submit(image="Not A Name")
    scene.attempt(1).wait_for("InvalidImageName", "couldn't parse image name")
    assert "Not A Name" in scene.phase("Failed")["failure"]["message"]


def test_exceeded_quota_is_worded(scene: Scene) -> None:
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    scene.api.create("resourcequotas", scene.namespace, quota)
    eventually(
        lambda: scene.api.get("resourcequotas", scene.namespace, "none").get("status", {}).get("hard"), "the quota acts"
    )
    scene.submit()
    scene.message("quota")


def test_trouble_that_ends_is_no_longer_told(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1)
    pod.unschedulable("0/8 nodes are available: 8 Insufficient nvidia.com/gpu.")
    scene.message("nvidia.com/gpu")
    pod.run()
    assert "nvidia" not in scene.phase("Running")["message"]


def hang(handler: BaseHTTPRequestHandler) -> None:
    threading.Event().wait(30)


def gigabyte(handler: BaseHTTPRequestHandler) -> None:
    for _ in endless(handler):
        pass


def redirect(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "http://127.0.0.1:1/")
    handler.end_headers()


BAD_PROGRESS: dict[str, Answer | bytes] = {
    "hangs": hang,
    "deep nesting": b'{"step": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "a gigabyte": gigabyte,
    "redirects": redirect,
    "an error": lambda handler: answer(handler, b"{}", 500),
    "no JSON": b"\x00\xff garbage",
    "a list": b"[1, 2, 3]",
    "no step": b'{"totalSteps": 5}',
    "a negative step": b'{"step": -1}',
    "an endless number": b'{"step": 1e999}',
    "not a number": b'{"step": NaN}',
    "a huge number": b'{"step": 1' + b"0" * 4000 + b"}",
    "text for a number": b'{"step": "many"}',
}


def test_bad_progress_harms_neither_its_job_nor_others(scene: Scene, operator: Operator) -> None:
    jobs = {f"bad-{i}": content for i, content in enumerate(BAD_PROGRESS.values())}
    for name in jobs:
        scene.submit(name)
    pods = {name: scene.attempt(1, name) for name in jobs}
    for name, pod in pods.items():
        pod.serve(jobs[name])
        pod.run()
    for name, pod in pods.items():
        eventually(lambda pod=pod: pod.requests >= 2, f"{name} was asked twice")  # type: ignore[misc]
    scene.submit("good")
    good = scene.attempt(1, "good").run()
    good.serve({"step": 3, "totalSteps": 5})
    scene.until(lambda s: s["progress"]["text"] == "3/5", "the good job's progress", "good")
    for name, pod in pods.items():
        assert "progress" not in scene.status(name)
        pod.exit(0, result(5))
    for name in jobs:
        assert scene.phase("Succeeded", name=name)["result"]["totalSteps"] == 5
    assert operator.probe("/healthz") == 200


def test_of_progress_with_a_part_that_cannot_be_used_the_rest_is_shown(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    pod.serve(b'{"step": 1, "totalSteps": 5, "metrics": ' + b"[" * 30_000 + b"]" * 30_000 + b"}")
    assert scene.until(lambda s: s["progress"]["text"] == "1/5", "the step")["progress"].get("metrics", {}) == {}
    pod.exit(0, result(5))
    scene.phase("Succeeded")


def test_surplus_in_progress_is_cut_before_it_reaches_the_status(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    pod.serve({"step": 1, "text": "t" * 5000, "metrics": {f"m{i:05}": i for i in range(2000)}, "unknown": {"a": 1}})
    status = scene.until(lambda s: s["progress"]["step"] == 1, "progress is shown")
    assert len(status["progress"]["metrics"]) <= 64
    assert len(json.dumps(status)) < 16_000
    assert "unknown" not in status["progress"]


def test_progress_over_the_cap_is_not_read_to_its_end(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    sent: list[int] = []

    def big(handler: BaseHTTPRequestHandler) -> None:
        for count in endless(handler):
            sent.append(count)

    pod.serve(big)
    eventually(lambda: pod.requests >= 2, "it was asked twice")
    pod.exit(0, result(1))
    scene.phase("Succeeded")
    # sockets buffer a few megabytes on their own; a reader of everything would reach the gigabyte
    assert max(sent) < 256 << 20


def test_step_never_goes_back_within_an_attempt_by_a_lie_of_the_pod(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    pod.serve({"step": 5, "totalSteps": 10})
    scene.until(lambda s: s["progress"]["step"] == 5, "step 5")
    asked = pod.requests
    pod.serve(b'{"step": 2')
    eventually(lambda: pod.requests > asked + 1, "it was asked again")
    assert scene.status()["progress"]["step"] == 5


def test_termination_message_needs_no_progress(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    pod.exit(0, result(10, metrics={"reward": 1.0}))
    status = scene.phase("Succeeded")
    assert status["result"]["metrics"] == {"reward": "1"}
    assert status["progress"]["text"] == "10/10" if "progress" in status else True
    assert names.PLURAL in scene.kubectl("api-resources", "--api-group", names.GROUP)
