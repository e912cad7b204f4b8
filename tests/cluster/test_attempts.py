"""What becomes of a failed attempt: told apart by its pods, retried free or counted, or final."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

import pytest

from cluster.api import eventually
from cluster.kubelet import PlayedPod
from cluster.manifests import failure, result
from cluster.scene import Scene
from nemo_rl.job.names import ExitCode, attempt_job
from nemo_rl.job.status import Cause

pytestmark = pytest.mark.usefixtures("operator")

TRACEBACK = """Traceback (most recent call last):
  File "reward.py", line 3, in reward
    return 1 / 0
ZeroDivisionError: division by zero"""

OWN_USE = (
    "The node was low on resource: {0}. Threshold quantity: 100Mi, available: 52Mi. "
    "Container trainer was using 61234Mi, request is 1Gi, has larger consumption of {0}. "
)
FINAL: dict[str, tuple[Callable[[PlayedPod], None], Cause]] = {
    "user error": (lambda p: p.run().exit(ExitCode.USER_ERROR, failure("no")), Cause.USER_ERROR),
    "bad data": (lambda p: p.run().exit(ExitCode.BAD_DATA, failure("no")), Cause.BAD_DATA),
    "non-finite": (lambda p: p.run().exit(ExitCode.NON_FINITE, failure("no")), Cause.NON_FINITE),
    "user error without a word": (lambda p: p.run().exit(ExitCode.USER_ERROR), Cause.USER_ERROR),
    # torchrun ends with 1 whatever its workers ended with: the message tells
    "user error behind torchrun": (
        lambda p: p.run().exit(1, failure("no", exit_code=int(ExitCode.USER_ERROR))),
        Cause.USER_ERROR,
    ),
}
COUNTED: dict[str, tuple[Callable[[PlayedPod], None], Cause]] = {
    "out of memory": (lambda p: p.run().oom(), Cause.OUT_OF_MEMORY),
    "unknown exit code": (lambda p: p.run().exit(3), Cause.ERROR),
    "crash": (lambda p: p.run().exit(139), Cause.ERROR),
    "success without a result": (lambda p: p.run().exit(0, ""), Cause.NO_RESULT),
    "saved although nobody asked it to stop": (lambda p: p.run().exit(ExitCode.PREEMPTED), Cause.ERROR),
    "a word that claims that it saved": (
        lambda p: p.run().exit(139, failure("saved", exit_code=int(ExitCode.PREEMPTED))),
        Cause.ERROR,
    ),
    "a word behind torchrun that claims that it saved": (
        lambda p: p.run().exit(1, failure("saved", exit_code=int(ExitCode.PREEMPTED))),
        Cause.ERROR,
    ),
    "evicted for its own memory": (lambda p: p.run().evict(OWN_USE.format("memory")), Cause.OUT_OF_MEMORY),
    "evicted for its own disk": (lambda p: p.run().evict(OWN_USE.format("ephemeral-storage")), Cause.STORAGE_EXCEEDED),
    "success with garbage": (lambda p: p.run().exit(0, "\x00{not json"), Cause.NO_RESULT),
}
FREE: dict[str, tuple[Callable[[PlayedPod], None], Cause]] = {
    "drained after a checkpoint": (lambda p: p.run().disrupt(code=75), Cause.DISRUPTED),
    "refused by the node": (
        lambda p: p.reject("UnexpectedAdmissionError", "Allocate failed: unhealthy device"),
        Cause.NODE_REJECTED,
    ),
    "no room left on the node": (
        lambda p: p.reject("OutOfmemory", "Node didn't have enough resource"),
        Cause.NODE_REJECTED,
    ),
    "evicted by the node": (lambda p: p.run().evict(), Cause.DISRUPTED),
    "drained": (lambda p: p.run().disrupt(), Cause.DISRUPTED),
    "drained, killed after the grace period": (lambda p: p.run().disrupt(code=137), Cause.DISRUPTED),
    "preempted by the scheduler before it ran": (
        lambda p: p.evict("Preempted in order to admit critical pod"),
        Cause.DISRUPTED,
    ),
}


@pytest.mark.parametrize("case", FINAL)
def test_failure_that_a_retry_cannot_cure_is_final(scene: Scene, case: str) -> None:
    play, cause = FINAL[case]
    scene.submit()
    play(scene.attempt(1))
    status = scene.phase("Failed")
    assert status["failure"]["cause"] == cause
    assert [a["cause"] for a in status["attempts"]] == [cause]
    assert len(scene.jobs()) == 1


@pytest.mark.parametrize("case", COUNTED)
def test_failure_of_unknown_origin_is_retried_and_counted(scene: Scene, case: str) -> None:
    play, cause = COUNTED[case]
    scene.submit(backoffLimit=1)
    play(scene.attempt(1))
    status = scene.until(lambda s: s["attempts"][0].get("cause"), "the attempt's end is recorded")
    assert status["attempts"][0]["cause"] == cause
    assert status["attempts"][0]["counted"] is True
    status = scene.succeed(attempt=2)
    assert [a["number"] for a in status["attempts"]] == [1, 2]
    assert status["countedFailures"] == 1


@pytest.mark.parametrize("case", FREE)
def test_disruption_is_retried_without_counting(scene: Scene, case: str) -> None:
    play, cause = FREE[case]
    scene.submit(backoffLimit=0)
    play(scene.attempt(1))
    status = scene.succeed(attempt=2)
    assert status["attempts"][0]["cause"] == cause
    assert status["attempts"][0]["counted"] is False
    assert status.get("countedFailures", 0) == 0


def test_user_error_shows_its_traceback_after_the_pods_are_gone(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    pod.exit(ExitCode.USER_ERROR, failure("ZeroDivisionError: division by zero", traceback=TRACEBACK))
    scene.phase("Failed")
    scene.api.delete("jobs", scene.namespace, attempt_job("x", 1))
    scene.gone("pods", pod.name)
    found = scene.status()["failure"]
    assert found["exitCode"] == ExitCode.USER_ERROR
    assert found["pod"] == pod.name
    assert "division by zero" in found["message"]
    assert "line 3, in reward" in found["traceback"]


def test_backoff_limit_ends_the_job_with_the_last_cause(scene: Scene) -> None:
    scene.submit(backoffLimit=2)
    for number in (1, 2, 3):
        scene.attempt(number).run().oom()
    status = scene.phase("Failed")
    assert status["failure"]["cause"] == Cause.OUT_OF_MEMORY
    assert status["failure"]["exitCode"] == 137
    assert status["countedFailures"] == 3
    assert len(status["attempts"]) == 3


def test_backoff_limit_may_be_raised_while_the_job_runs(scene: Scene) -> None:
    scene.submit(backoffLimit=0)
    pod = scene.attempt(1).run()
    scene.change(backoffLimit=1)
    pod.oom()
    assert scene.succeed(attempt=2)["phase"] == "Succeeded"


def test_only_the_newest_ten_attempts_are_kept(scene: Scene) -> None:
    scene.submit(backoffLimit=0)
    for number in range(1, 13):
        saved = {"latest": f"x/checkpoint-{number}", "latestStep": number}
        scene.attempt(number).run().disrupt(message=failure("saved", checkpoint=saved))
    status = scene.succeed(attempt=13)
    assert [a["number"] for a in status["attempts"]] == list(range(4, 14))
    assert status["attempt"] == 13


def test_disruptions_that_bring_no_checkpoint_count_in_the_end(scene: Scene) -> None:
    scene.submit(backoffLimit=0)
    for number in range(1, 10):
        scene.attempt(number).run().disrupt()
    status = scene.phase("Failed")
    assert status["failure"]["cause"] == Cause.DISRUPTED
    assert "9th attempt in a row that ended without a new checkpoint" in status["failure"]["message"]
    assert [a["counted"] for a in status["attempts"]] == [False] * 8 + [True]


def test_next_attempt_starts_only_when_all_pods_of_the_last_are_gone(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2})
    first, second = (scene.attempt(1, index=i).run() for i in (0, 1))
    scene.phase("Running")
    second.when_stopped(0)
    first.disrupt()
    retried = scene.attempt(2)
    assert not first.alive
    assert not second.alive
    assert retried.job == attempt_job("x", 2)


def test_one_failed_pod_of_several_decides_the_cause(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2})
    pods = [scene.attempt(1, index=i).run() for i in (0, 1)]
    pods[1].exit(ExitCode.USER_ERROR, failure("only rank 1 saw it", traceback=TRACEBACK))
    status = scene.phase("Failed")
    assert status["failure"]["cause"] == Cause.USER_ERROR
    assert status["failure"]["pod"] == pods[1].name


def test_a_failed_pod_of_several_is_named_while_the_others_end(scene: Scene) -> None:
    scene.submit(resources={"nodes": 3}, terminationGracePeriodSeconds=5)
    pods = [scene.attempt(1, index=i).run() for i in range(3)]
    scene.phase("Running")
    seen = scene.record()
    for pod in pods:
        pod.silent = True  # they take their time to save
    pods[1].exit(139)
    scene.message(pods[1].name, "exited with 139")
    assert scene.condition("Running")["status"] == "False"
    assert "trains on 3 pods" not in scene.status()["message"]
    for pod in (pods[0], pods[2]):
        eventually(lambda pod=pod: "deletionTimestamp" in pod.object["metadata"], "the Job controller stops the others")
    time.sleep(1.1)  # kubelets tell whole seconds
    for pod in (pods[0], pods[2]):
        pod.silent = False
        pod.stop()
    [scene.attempt(2, index=i).run() for i in range(3)]
    assert scene.phase("Running")["attempts"][0]["cause"] == Cause.ERROR
    assert not [s for s in seen if s.get("reason") == "PodFailed" and "trains on" in s["message"]]


def test_the_last_late_pod_is_named(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2})
    scene.attempt(1, index=0).run()
    late = scene.attempt(1, index=1)
    late.wait_for("ContainerCreating")
    scene.message("1 of 2 pods run", late.name, "ContainerCreating")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_wrong_clock_of_the_node_moves_no_time(scene: Scene, hours: int) -> None:
    scene.submit(backoffLimit=1, activeDeadlineSeconds=1000)
    scene.kubelet.clock[scene.namespace] = hours * 3600
    scene.attempt(1).run().oom()
    scene.attempt(2).run().exit(0, result(3))
    status = scene.phase("Succeeded")
    now = datetime.datetime.now(datetime.UTC)
    for when in (status["completionTime"], *(a["endTime"] for a in status["attempts"])):
        assert abs((datetime.datetime.fromisoformat(when) - now).total_seconds()) < 120
    assert status.get("activeSeconds", 0) < 120


def test_attempts_remember_the_steps(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    pod.serve({"step": 7, "totalSteps": 10, "checkpoint": {"latest": "x/checkpoint-5", "latestStep": 5}})
    scene.until(lambda s: s["progress"]["step"] == 7, "progress is shown")
    pod.disrupt(message=failure("saved", total_steps=7))
    status = scene.succeed(attempt=2)
    assert status["attempts"][0]["toStep"] == 7


DELETED: dict[str, tuple[int, Cause]] = {
    "saved": (ExitCode.PREEMPTED, Cause.PREEMPTED),
    "killed after the grace period": (137, Cause.DISRUPTED),
    "ended by SIGTERM": (143, Cause.DISRUPTED),
    "behind torchrun": (1, Cause.DISRUPTED),
}


@pytest.mark.parametrize("case", DELETED)
def test_pod_deleted_by_hand_is_a_free_retry(scene: Scene, case: str) -> None:
    code, cause = DELETED[case]
    scene.submit(backoffLimit=0)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    pod.when_stopped(code)
    scene.kubectl("delete", "pod", pod.name, "--wait=false")
    found = scene.succeed(attempt=2)["attempts"][0]
    assert (found["cause"], found["counted"], found["exitCode"]) == (cause, False, code)


def test_pod_evicted_by_the_api_is_a_free_retry(scene: Scene) -> None:
    scene.submit(backoffLimit=0)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    pod.when_stopped(137)
    pod.evict_by_api()
    found = scene.succeed(attempt=2)["attempts"][0]
    assert (found["cause"], found["counted"]) == (Cause.DISRUPTED, False)


def test_failure_of_a_pod_that_is_deleted_at_once_is_not_forgotten(scene: Scene) -> None:
    scene.submit(backoffLimit=1)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    pod.oom()
    scene.api.delete("pods", scene.namespace, pod.name, gracePeriodSeconds=0)
    found = scene.succeed(attempt=2)["attempts"][0]
    assert (found["cause"], found["counted"]) == (Cause.OUT_OF_MEMORY, True)


def test_one_of_several_pods_deleted_is_the_cause_not_the_peer_that_lost_it(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2}, backoffLimit=0)
    first, second = (scene.attempt(1, index=i).run() for i in (0, 1))
    scene.phase("Running")
    first.when_stopped(1)  # torchrun's code, whatever ended its workers
    second.when_stopped(1)
    scene.kubectl("delete", "pod", second.name, "--wait=false")
    eventually(lambda: not second.alive, "it ends")
    [scene.attempt(2, index=i).run() for i in (0, 1)]
    found = scene.phase("Running")["attempts"][0]
    assert (found["cause"], found["counted"]) == (Cause.DISRUPTED, False)


def test_node_that_is_lost_is_said_and_a_forced_deletion_is_the_cure(scene: Scene) -> None:
    scene.submit(backoffLimit=0, terminationGracePeriodSeconds=1)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    pod.silent = True
    scene.kubectl("delete", "pod", pod.name, "--wait=false")
    scene.message(f"kubectl delete pod {pod.name} --force")
    assert scene.status()["phase"] == "Pending"
    assert len(scene.jobs()) == 1, "the node may still run it"
    scene.kubectl("delete", "pod", pod.name, "--force", "--wait=false")
    status = scene.succeed(attempt=2)
    assert (status["attempts"][0]["cause"], status["attempts"][0]["counted"]) == (Cause.DISRUPTED, False)
    scene.gone("pods", pod.name)


def test_job_object_deleted_by_hand_is_a_free_retry(scene: Scene) -> None:
    scene.submit(backoffLimit=0)
    scene.attempt(1).run()
    scene.phase("Running")
    scene.kubectl("delete", "job", attempt_job("x", 1), "--wait=false")
    assert scene.succeed(attempt=2)["attempts"][0]["counted"] is False
