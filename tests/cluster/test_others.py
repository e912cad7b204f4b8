"""What others do in a job's pods and namespace: sidecars, strangers' pods, odd times. None of it holds or fails the job."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cluster.api import eventually
from cluster.manifests import result
from cluster.scene import Scene
from nemo_rl.job import names
from nemo_rl.job.names import ExitCode, attempt_job
from nemo_rl.job.status import Cause

pytestmark = pytest.mark.usefixtures("operator")


def stranger(scene: Scene, attempt: int, **meta: Any) -> None:
    """A pod that somebody else made with the labels of an attempt of job x."""
    uid = scene.job()["metadata"]["uid"]
    labels = {names.LABEL_JOB: "x", names.LABEL_JOB_UID: uid, names.LABEL_ATTEMPT: str(attempt)}
    labels[names.LABEL_COMPONENT] = names.COMPONENT_TRAINER
    spec = {"containers": [{"name": "a", "image": "a"}]}
    scene.api.create(
        "pods", scene.namespace, {"metadata": {"name": "stranger", "labels": labels, **meta}, "spec": spec}
    )


@pytest.mark.parametrize("code", [0, 1])
def test_a_sidecar_that_ends_after_the_trainer_decides_nothing(scene: Scene, code: int) -> None:
    scene.submit(backoffLimit=0)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    phase = "Failed" if code else "Succeeded"
    pod.states(phase, pod.ended(0, result(4)), mesh_proxy=pod.ended(code))
    assert scene.phase("Succeeded")["result"]["totalSteps"] == 4


def test_a_sidecar_that_dies_first_decides_nothing(scene: Scene) -> None:
    scene.submit(backoffLimit=0)
    pod = scene.attempt(1).run()
    pod.states("Running", {"running": {"startedAt": pod.started}}, mesh_proxy=pod.ended(1))
    scene.phase("Running")
    pod.states("Failed", pod.ended(0, result(4)), mesh_proxy=pod.ended(1))
    scene.phase("Succeeded")


def test_a_sidecar_whose_image_cannot_be_pulled_does_not_hold_the_trainer(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1)
    waits = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    pod.states("Pending", {"running": {"startedAt": pod.now()}}, mesh_proxy=waits)
    assert scene.phase("Running")["message"] == "attempt 1 trains on 1 pod"


def test_a_sidecar_that_never_ends_holds_neither_the_end_nor_the_gpus(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    scene.phase("Running")
    pod.states("Running", pod.ended(0, result(4)), mesh_proxy={"running": {"startedAt": pod.started}})
    scene.phase("Succeeded")
    scene.gone("jobs", attempt_job("x", 1))
    scene.gone("pods", pod.name)
    assert scene.status()["phase"] == "Succeeded"


def test_a_user_error_beside_a_sidecar_that_goes_on_is_final(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    pod.states("Running", pod.ended(ExitCode.USER_ERROR), mesh_proxy={"running": {"startedAt": pod.started}})
    assert scene.phase("Failed")["failure"]["cause"] == Cause.USER_ERROR
    scene.gone("pods", pod.name)


def test_a_crash_beside_sidecars_is_retried_on_all_nodes(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2}, backoffLimit=1)
    goes_on = {"running": {"startedAt": scene.attempt(1).started}}
    first, second = (scene.attempt(1, index=i).run() for i in (0, 1))
    scene.phase("Running")
    second.states("Running", second.ended(139), mesh_proxy=goes_on)
    scene.message(second.name, "exited with 139")
    [scene.attempt(2, index=i).run() for i in (0, 1)]
    status = scene.phase("Running")
    assert (status["attempts"][0]["cause"], status["attempts"][0]["counted"]) == (Cause.ERROR, True)
    assert not first.alive


def test_an_init_container_of_others_that_fails_is_said_in_words(scene: Scene) -> None:
    scene.submit(backoffLimit=0)
    pod = scene.attempt(1)
    init = [{"name": "vault-agent", "state": pod.ended(137, "no token", "OOMKilled")}]
    pod.states("Failed", {"waiting": {"reason": "PodInitializing"}}, init)
    status = scene.phase("Failed")
    assert status["failure"]["cause"] == Cause.START_FAILED
    assert "init container vault-agent exited with 137 (OOMKilled: no token)" in status["failure"]["message"]


def test_a_strangers_pod_does_not_hold_the_start(scene: Scene) -> None:
    scene.submit(suspend=True)
    scene.phase("Suspended")
    stranger(scene, 7)
    scene.change(suspend=False)
    scene.attempt(1).run()
    scene.phase("Running")


@pytest.mark.parametrize("attempt", [1, 2, 99])
def test_a_strangers_pod_does_not_hold_the_retry(scene: Scene, attempt: int) -> None:
    scene.submit(backoffLimit=0)
    first = scene.attempt(1).run()
    scene.phase("Running")
    stranger(scene, attempt)
    first.evict()
    assert scene.succeed(attempt=2)["attempts"][0]["counted"] is False


def test_pods_that_were_left_behind_by_an_orphaning_deletion_do_not_hold_the_next_attempt(scene: Scene) -> None:
    scene.submit(backoffLimit=0)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    scene.kubectl("delete", "job", attempt_job("x", 1), "--cascade=orphan", "--wait=false")
    scene.attempt(2).run()
    assert scene.phase("Running")["attempts"][0]["cause"] == Cause.JOB_DELETED
    assert pod.alive, "nobody asked us to delete it"


@pytest.mark.parametrize("when", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "2026-01-01t00:00:00z"])
def test_any_time_that_the_api_server_takes_is_read(scene: Scene, when: str) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    scene.phase("Running")
    scene.change(output={"serveUntil": when})
    pod.exit(0, result(2))
    scene.phase("Succeeded")


def quota(scene: Scene, **hard: str) -> None:
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": hard}}
    scene.api.create("resourcequotas", scene.namespace, body)
    eventually(lambda: scene.api.get("resourcequotas", scene.namespace, "q").get("status", {}).get("used"), "its use")


@pytest.mark.parametrize("what", ["count/jobs.batch", "pods"])
def test_the_deadline_does_not_run_while_the_quota_is_full(scene: Scene, what: str) -> None:
    scene.submit(activeDeadlineSeconds=5, backoffLimit=0)
    first = scene.attempt(1).run()
    scene.phase("Running")
    quota(scene, **{what: "1" if what != "pods" else "0"})
    first.evict()
    scene.message("quota")
    time.sleep(8)
    status = scene.status()
    assert (status["phase"], status.get("activeSince")) == ("Pending", None)
    scene.api.delete("resourcequotas", scene.namespace, "q")
    scene.succeed(attempt=2)


def test_the_deadline_does_not_run_while_a_pod_has_no_node(scene: Scene) -> None:
    scene.submit(activeDeadlineSeconds=2)
    pod = scene.attempt(1)
    pod.unschedulable("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")
    scene.phase("Pending")
    time.sleep(4)
    assert scene.status()["phase"] == "Pending"
    pod.run()
    assert scene.phase("Failed")["failure"]["cause"] == Cause.DEADLINE


def test_a_job_that_is_suspended_on_a_lost_node_does_not_fail_by_its_deadline(scene: Scene) -> None:
    scene.submit(activeDeadlineSeconds=5, terminationGracePeriodSeconds=1)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    pod.silent = True
    scene.change(suspend=True)
    scene.message("suspending")
    time.sleep(7)
    assert scene.status()["reason"] == "Stopping"
    scene.kubectl("delete", "pod", pod.name, "--force", "--wait=false")
    scene.phase("Suspended")


def test_a_pod_that_something_holds_is_named(scene: Scene) -> None:
    scene.submit(backoffLimit=0)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    pod.silent = True
    scene.kubectl("delete", "job", attempt_job("x", 1), "--cascade=background", "--wait=false")
    scene.message("waiting for pod", pod.name)
    pod.silent = False
    pod.stop()
    scene.succeed(attempt=2)
