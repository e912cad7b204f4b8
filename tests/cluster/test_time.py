"""Suspension, queues, deadlines and the end of kept time: what acts by itself, and what waits."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.api import Object, eventually
from cluster.manifests import bundle, result
from cluster.scene import Scene
from nemo_rl.job import names
from nemo_rl.job.status import Cause

pytestmark = pytest.mark.usefixtures("operator")


def live_jobs(scene: Scene) -> list[str]:
    return [job["metadata"]["name"] for job in scene.jobs() if "deletionTimestamp" not in job["metadata"]]


def test_job_created_suspended_makes_no_job_until_it_is_resumed(scene: Scene) -> None:
    scene.submit(suspend=True)
    scene.phase("Suspended")
    assert scene.condition("Suspended")["status"] == "True"
    assert scene.jobs() == []
    scene.change(suspend=False)
    assert scene.succeed()["attempt"] == 1
    assert scene.condition("Suspended")["status"] == "False"


@pytest.mark.parametrize(
    "moment", ["waiting for bundles", "before the pod is scheduled", "pulling the image", "running"]
)
def test_suspend_frees_the_pods_and_resume_goes_on(scene: Scene, moment: str) -> None:
    if moment == "waiting for bundles":
        scene.submit(bundles=[bundle("code", 1)])
        scene.message("bundle")
    else:
        scene.submit()
        pod = scene.attempt(1)
        if moment == "pulling the image":
            pod.wait_for("ContainerCreating")
        if moment == "running":
            pod.run()
            scene.phase("Running")
    scene.change(suspend=True)
    scene.phase("Suspended")
    eventually(lambda: not live_jobs(scene), "no Job is left")
    eventually(lambda: not scene.api.list("pods", scene.namespace), "no pod is left")
    if moment == "waiting for bundles":
        part = {"metadata": {"name": "code-part-0"}, "binaryData": {"part": ""}}
        scene.api.create("configmaps", scene.namespace, part)
    scene.change(suspend=False)
    number = 1 if moment == "waiting for bundles" else 2
    status = scene.succeed(attempt=number)
    assert status["attempt"] == number
    if number == 2:
        assert status["attempts"][0]["cause"] == Cause.SUSPENDED
        assert status["attempts"][0]["counted"] is False


def test_suspend_between_two_attempts_holds_the_next_back(scene: Scene) -> None:
    scene.submit(backoffLimit=5)
    scene.attempt(1).run().oom()
    scene.change(suspend=True)
    scene.phase("Suspended")
    eventually(lambda: not live_jobs(scene) or scene.jobs()[0]["status"].get("failed"), "no Job is live")
    scene.change(suspend=False)
    # the second attempt may have begun, and been stopped, before the suspension was seen
    open_attempt = scene.until(lambda s: "endTime" not in s["attempts"][-1], "a next attempt")["attempt"]
    assert open_attempt in (2, 3)
    assert scene.succeed(attempt=open_attempt)["countedFailures"] == 1


def test_job_that_ends_well_while_it_is_stopped_has_succeeded(scene: Scene) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    scene.phase("Running")
    pod.when_stopped(0, result(10))
    scene.change(suspend=True)
    status = scene.phase("Suspended", "Succeeded")
    if status["phase"] == "Suspended":
        scene.change(suspend=False)
        scene.succeed(attempt=2)


def test_suspending_a_finished_job_changes_nothing(scene: Scene) -> None:
    scene.submit()
    before = scene.succeed()
    scene.change(suspend=True)
    generation = scene.job()["metadata"]["generation"]
    eventually(lambda: scene.status().get("observedGeneration") in (generation, generation - 1), "it was seen")
    assert scene.status()["phase"] == "Succeeded"
    assert scene.status()["completionTime"] == before["completionTime"]


def test_deadline_fails_the_job_and_stops_its_pods(scene: Scene) -> None:
    scene.submit(activeDeadlineSeconds=600)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    scene.change(activeDeadlineSeconds=2)
    status = scene.phase("Failed")
    assert status["failure"]["cause"] == Cause.DEADLINE
    assert "activeDeadlineSeconds is 2" in status["failure"]["message"]
    eventually(lambda: not pod.alive, "the pod is stopped")


def test_deadline_does_not_run_while_suspended(scene: Scene) -> None:
    scene.submit(activeDeadlineSeconds=600)
    scene.attempt(1).run()
    scene.phase("Running")
    scene.change(suspend=True)
    suspended = scene.phase("Suspended")
    scene.change(activeDeadlineSeconds=suspended.get("activeSeconds", 0) + 3)
    until = time.monotonic() + 5
    eventually(lambda: time.monotonic() > until, "more than the deadline has passed", 10)
    assert scene.status()["phase"] == "Suspended"
    scene.change(suspend=False)
    assert scene.phase("Failed")["failure"]["cause"] == Cause.DEADLINE


def test_deadline_may_be_extended(scene: Scene) -> None:
    scene.submit(activeDeadlineSeconds=10)
    pod = scene.attempt(1).run()
    scene.change(activeDeadlineSeconds=600)
    until = time.monotonic() + 11
    eventually(lambda: time.monotonic() > until, "the first deadline has passed", 20)
    assert scene.status()["phase"] == "Running"
    pod.exit(0, result(1))
    scene.phase("Succeeded")


@pytest.mark.parametrize("seconds", [0, 2])
def test_finished_job_is_deleted_after_its_time_to_live(scene: Scene, seconds: int) -> None:
    scene.submit(ttlSecondsAfterFinished=seconds)
    scene.attempt(1).run().exit(0, result(1))
    scene.gone(names.PLURAL, "x")
    scene.gone("jobs", names.attempt_job("x", 1))


def test_time_to_live_may_be_set_after_the_end(scene: Scene) -> None:
    scene.submit()
    scene.succeed()
    scene.change(ttlSecondsAfterFinished=0)
    scene.gone(names.PLURAL, "x")


KUEUE = "kueue.x-k8s.io"
HAS_STATUS = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def define(kind: str, plural: str, scope: str) -> Object:
    """One of Kueue's kinds, without Kueue; in the version that older releases serve alone."""
    version = {"name": "v1beta1", "served": True, "storage": True, "schema": {"openAPIV3Schema": HAS_STATUS}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{KUEUE}"},
        "spec": {
            "group": KUEUE,
            "scope": scope,
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [version | {"subresources": {"status": {}}}],
        },
    }


@pytest.fixture
def workloads(scene: Scene) -> Iterator[Callable[..., None]]:
    """Kueue's kinds, and what Kueue does with the Workload of job `x`: sets conditions."""
    kinds = [
        define("Workload", "workloads", "Namespaced"),
        define("WorkloadPriorityClass", "workloadpriorityclasses", "Cluster"),
    ]
    scene.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": kinds}))
    eventually(lambda: "priority" in scene.kubectl("api-resources", "--api-group", KUEUE), "Kueue's kinds are served")

    def play(message: str = "", **conditions: bool) -> None:
        held = eventually(lambda: find_workload(scene), "the job has a Workload")
        old = {c["type"]: c for c in (held.get("status") or {}).get("conditions") or ()}
        new = {
            kind: {
                "type": kind,
                "status": str(holds),
                "reason": "Preempted" if kind == "Evicted" else kind,
                "message": message,
            }
            for kind, holds in conditions.items()
        }
        patch = {"status": {"conditions": list((old | new).values())}}
        scene.kubectl(
            *("patch", "workloads", "x", "-n", scene.namespace, "--subresource=status", "--type=merge"),
            f"--patch={json.dumps(patch)}",
        )

    yield play
    for kind in kinds:
        scene.kubectl("delete", "crd", kind["metadata"]["name"])


def find_workload(scene: Scene) -> Object | None:
    text = scene.kubectl("get", "workloads", "-n", scene.namespace, "-o", "json")
    found = json.loads(text)["items"]
    return next((w for w in found if w["metadata"]["name"] == names.workload("x")), None)


def holds(scene: Scene, kind: str) -> bool | None:
    found = ((find_workload(scene) or {}).get("status") or {}).get("conditions") or ()
    return next((c["status"] == "True" for c in found if c["type"] == kind), None)


def test_job_with_a_queue_runs_on_the_quota_of_its_one_workload(scene: Scene, workloads: Callable[..., None]) -> None:
    high = {"apiVersion": f"{KUEUE}/v1beta1", "kind": "WorkloadPriorityClass", "metadata": {"name": "high"}, "value": 7}
    scene.kubectl("create", "-f", "-", stdin=json.dumps(high))
    scene.submit(job_labels={names.LABEL_QUEUE: "team", names.LABEL_PRIORITY: "high"})
    assert "team" in scene.phase("Queued")["message"]
    workloads("insufficient quota for nvidia.com/gpu", QuotaReserved=False)
    assert scene.message("insufficient quota")["phase"] == "Queued"
    asked = find_workload(scene)
    assert asked is not None
    assert (asked["spec"]["queueName"], asked["spec"]["priority"]) == ("team", 7)
    assert asked["spec"]["priorityClassName"] == "high"
    assert scene.jobs() == []
    workloads(QuotaReserved=True, Admitted=True)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    eventually(lambda: holds(scene, "PodsReady"), "Kueue is told that the pods run")
    workloads("a job of higher priority came", Evicted=True)
    scene.phase("Queued")
    assert not pod.alive
    eventually(lambda: holds(scene, "QuotaReserved") is False, "the quota is given back")
    assert holds(scene, "Requeued") is True
    place = asked["metadata"]["uid"]
    workloads(Evicted=False, QuotaReserved=True, Admitted=True)
    scene.attempt(2).run().exit(1)
    scene.succeed(attempt=3)
    held = find_workload(scene)
    assert held is not None
    assert held["metadata"]["uid"] == place
    eventually(lambda: holds(scene, "Finished"), "Kueue is told that the job has finished")


def test_deadline_does_not_run_in_the_queue(scene: Scene, workloads: Callable[..., None]) -> None:
    scene.submit(job_labels={names.LABEL_QUEUE: "team"}, activeDeadlineSeconds=5)
    scene.phase("Queued")
    until = time.monotonic() + 6
    eventually(lambda: time.monotonic() > until, "more than the deadline has passed", 10)
    assert scene.status()["phase"] == "Queued"
    workloads(QuotaReserved=True, Admitted=True)
    assert scene.succeed()["phase"] == "Succeeded"


def test_the_deadline_does_not_count_what_a_queue_took_back(scene: Scene, workloads: Callable[..., None]) -> None:
    scene.submit(job_labels={names.LABEL_QUEUE: "team"}, activeDeadlineSeconds=12)
    scene.phase("Queued")
    workloads(QuotaReserved=True, Admitted=True)
    scene.attempt(1).run()
    scene.phase("Running")
    workloads("a job of higher priority came", Evicted=True)
    scene.phase("Queued")
    eventually(lambda: holds(scene, "QuotaReserved") is False, "the quota is given back")
    until = time.monotonic() + 13
    eventually(lambda: time.monotonic() > until, "more than the deadline has passed", 20)
    workloads(Evicted=False, QuotaReserved=True, Admitted=True)
    assert scene.succeed(attempt=2)["activeSeconds"] < 12


def test_without_kueue_a_job_with_a_queue_says_so_and_goes_on_when_it_comes(scene: Scene, request: Any) -> None:
    scene.submit(job_labels={names.LABEL_QUEUE: "team"})
    scene.message("has no Kueue")
    assert scene.jobs() == []
    play = request.getfixturevalue("workloads")
    play(QuotaReserved=True, Admitted=True)
    assert scene.succeed()["phase"] == "Succeeded"


def test_job_waits_for_its_bundles_and_says_how_many(scene: Scene) -> None:
    scene.submit(bundles=[bundle("code", 2)], reward={"builtin": None, "bundle": "code"})
    scene.message("2 of 2", "bundle")
    for part in range(2):
        body = {"metadata": {"name": f"code-part-{part}"}, "immutable": True, "binaryData": {"part": ""}}
        scene.api.create("configmaps", scene.namespace, body)
    assert scene.succeed()["phase"] == "Succeeded"


def test_job_whose_bundles_never_come_fails_and_names_them(scene: Scene) -> None:
    scene.submit(bundles=[bundle("code", 2)])
    part = {"metadata": {"name": "code-part-0"}, "binaryData": {"part": ""}}
    scene.api.create("configmaps", scene.namespace, part)
    status = scene.phase("Failed")
    assert status["failure"]["cause"] == Cause.BUNDLES_MISSING
    assert "code-part-1" in status["failure"]["message"]
    assert scene.jobs() == []


def future(seconds: int) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_output_is_served_while_asked_for_and_no_longer(scene: Scene) -> None:
    scene.submit()
    scene.succeed()
    assert scene.api.find("pods", scene.namespace, names.files_pod("x")) is None
    scene.change(output={"serveUntil": future(600)})
    files = scene.kubelet.named(scene.namespace, names.files_pod("x")).run()
    spec = files.object["spec"]
    volume = next(v for v in spec["volumes"] if "persistentVolumeClaim" in v)
    assert volume["persistentVolumeClaim"]["claimName"] == names.output_claim("x")
    mount = next(m for m in spec["containers"][0]["volumeMounts"] if m["name"] == volume["name"])
    assert mount["readOnly"] is True
    assert spec["automountServiceAccountToken"] is False
    scene.change(output={"serveUntil": future(1)})
    scene.gone("pods", names.files_pod("x"))
    assert scene.status()["phase"] == "Succeeded"


def test_files_pod_goes_with_the_job(scene: Scene) -> None:
    scene.submit(output={"serveUntil": future(600)})
    scene.succeed()
    scene.kubelet.named(scene.namespace, names.files_pod("x"))
    scene.kubectl("delete", names.SHORT_NAME, "x", "--timeout=60s")
    scene.gone("pods", names.files_pod("x"))
