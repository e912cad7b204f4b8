"""Jobs of several nodes on a real API server: late pods, a pod of eight that dies, hangs, and nodes that are lost."""

from __future__ import annotations

import time

import pytest

from cluster.api import Object, eventually
from cluster.kubelet import PlayedPod
from cluster.manifests import result
from cluster.scene import Scene
from nemo_rl.job.status import Cause

pytestmark = pytest.mark.usefixtures("operator")


def test_four_late_starts_cost_no_attempt_and_the_fifth_trains(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2}, backoffLimit=0, startupTimeoutSeconds=2, terminationGracePeriodSeconds=2)
    for attempt in range(1, 5):
        first, late = (scene.attempt(attempt, index=i) for i in (0, 1))
        first.run()
        late.wait_for("ContainerCreating")
        scene.message("1 of 2 pods run", late.name, "ContainerCreating")
        status = scene.until(
            lambda s, attempt=attempt: s["attempts"][attempt - 1].get("cause"),
            f"attempt {attempt} gives its nodes back",
        )
        record = status["attempts"][attempt - 1]
        assert (record["cause"], record["counted"]) == (Cause.STARTUP_TIMEOUT, False)
        assert late.name in record["message"]
    pods = [scene.attempt(5, index=i).run() for i in (0, 1)]
    status = scene.phase("Running")
    assert status["attempts"][4]["runningTime"]
    assert "countedFailures" not in status
    for pod in reversed(pods):
        pod.exit(0, result(7) if pod is pods[0] else "")
    scene.phase("Succeeded")


def test_a_pod_that_is_late_within_its_time_is_waited_for(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2}, backoffLimit=0)
    first, late = (scene.attempt(1, index=i) for i in (0, 1))
    first.run()
    late.wait_for("ContainerCreating")
    scene.message("1 of 2 pods run", late.name)
    time.sleep(3)
    late.run()
    assert len(scene.phase("Running")["attempts"]) == 1


def test_a_dead_pod_of_eight_restarts_all_and_the_status_is_true_all_the_time(scene: Scene) -> None:
    scene.submit(resources={"nodes": 8}, terminationGracePeriodSeconds=3)
    pods = [scene.attempt(1, index=i).run() for i in range(8)]
    scene.phase("Running")
    seen = scene.record()
    for pod in pods:
        pod.when_stopped(1, failure_word("RankFailed", "another rank ended this run"))
    died = time.monotonic()
    pods[3].exit(139)
    for index in range(8):
        scene.attempt(2, index=index).run()
    scene.until(lambda s: s["phase"] == "Running" and s["attempt"] == 2, "all train again")
    took = time.monotonic() - died
    assert took < 3 + 30, f"{took:.0f} s"
    first = scene.status()["attempts"][0]
    assert (first["cause"], first["counted"], first["exitCode"]) == (Cause.ERROR, True, 139)
    after = [s for s in seen if s.get("attempt") == 1]
    assert after, "the failure was said"
    assert not [s for s in after if "trains on 8 pods" in s["message"]], after
    assert any(pods[3].name in s["message"] for s in after)


def failure_word(cause: str, message: str, **more: object) -> Object:
    return {"kind": "failure", "exitCode": 1, "cause": cause, "message": message, **more}


def test_a_hang_is_counted_and_its_stacks_are_in_the_status(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2}, backoffLimit=0, terminationGracePeriodSeconds=2)
    pods = [scene.attempt(1, index=i).run() for i in (0, 1)]
    scene.phase("Running")
    pods[0].when_stopped(1, failure_word("RankFailed", "another rank ended this run, rank 1: Stalled"))
    stack = 'rank 1:\n  File "reward.py", line 3, in reward\n    time.sleep(10**9)\nhangs here'
    pods[1].exit(1, failure_word("Stalled", "no sign of progress for 1800 s", traceback=stack))
    status = scene.phase("Failed")
    assert (status["failure"]["cause"], status["failure"]["pod"]) == (Cause.STALLED, pods[1].name)
    assert "time.sleep(10**9)" in status["failure"]["traceback"]


def lose(pod: PlayedPod, scene: Scene) -> None:
    """The node is silent, and the taint manager deletes its pod."""
    pod.silent = True
    scene.kubectl("delete", "pod", pod.name, "--wait=false")


def test_a_lost_node_is_replaced_where_the_job_says_so(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2}, backoffLimit=0, terminationGracePeriodSeconds=1, onNodeLost="replace")
    pods = [scene.attempt(1, index=i).run() for i in (0, 1)]
    scene.phase("Running")
    lose(pods[1], scene)
    again = [scene.attempt(2, index=i).run() for i in (0, 1)]
    status = scene.until(lambda s: s["phase"] == "Running" and s["attempt"] == 2, "it trains again")
    record = status["attempts"][0]
    assert (record["cause"], record["counted"]) == (Cause.NODE_LOST, False)
    assert pods[1].name in record["message"]
    assert "deletionTimestamp" in pods[1].object["metadata"], "nobody pretended that it is gone"
    eventually(lambda: not pods[0].alive, "the other pod of the attempt was stopped")
    pods[1].silent = False  # the node comes back, and its kubelet ends the pod
    pods[1].stop()
    for pod in reversed(again):
        pod.exit(0, result(7) if pod is again[0] else "")
    status = scene.phase("Succeeded")
    assert len(status["attempts"]) == 2
    scene.gone("pods", pods[1].name)


def test_a_lost_node_is_waited_for_where_nothing_is_said(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2}, backoffLimit=0, terminationGracePeriodSeconds=1)
    pods = [scene.attempt(1, index=i).run() for i in (0, 1)]
    scene.phase("Running")
    lose(pods[1], scene)
    scene.message(f"kubectl delete pod {pods[1].name} --force")
    time.sleep(4)
    assert len(scene.jobs()) == 1


def test_progress_that_cannot_be_read_is_said_and_taken_back(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    scene.message("trains on 1 pod", "progress cannot be read")
    pod.serve({"step": 3, "totalSteps": 9})
    scene.until(lambda s: s.get("progress", {}).get("step") == 3 and "cannot" not in s["message"], "progress")
