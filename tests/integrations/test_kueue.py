"""Jobs in queues of the real Kueue: its scheduler, its webhooks and its quota; the pods are played."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster.api import Object, eventually
from cluster.manifests import result
from cluster.scene import Scene
from integrations.conftest import Queues, labels
from lab.kueue import FRAMEWORK, Kueue
from nemo_rl.job import names
from nemo_rl.job.status import Cause

pytestmark = pytest.mark.usefixtures("kueue", "operator")
MakeQueues = Callable[..., Queues]


def submit(scene: Scene, name: str = "x", cpu: int = 1, priority: str = "", queue: str = "team", **spec: Any) -> None:
    resources = {"cpu": str(cpu), **spec.pop("resources", {})}
    scene.submit(name, job_labels=labels(queue, priority), resources=resources, **spec)


def workload(scene: Scene, name: str = "x") -> Object:
    return scene.api.get("workloads", scene.namespace, names.workload(name))


def condition(scene: Scene, kind: str, name: str = "x") -> str:
    found = (workload(scene, name).get("status") or {}).get("conditions") or ()
    return next((c["status"] for c in found if c["type"] == kind), "")


def test_a_job_waits_for_quota_is_preempted_goes_on_and_succeeds(
    scene: Scene, queues: MakeQueues, priorities: None
) -> None:
    """The whole story; its deadline is shorter than its wait in the queue."""
    quota = queues(1)
    quota.local(scene.namespace)
    submit(scene, "first", priority="low")
    first = scene.attempt(1, "first").run()
    submit(scene, "x", priority="low", activeDeadlineSeconds=8)
    status = scene.message("waits in queue team", "cpu", name="x")
    assert status["phase"] == "Queued"
    assert scene.jobs("x") == []
    place = workload(scene)["metadata"]["uid"]
    until = time.monotonic() + 9
    eventually(lambda: time.monotonic() > until, "it waited longer than its deadline", 30)
    first.exit(0, result(1))
    pod = scene.attempt(1).run()
    scene.phase("Running")
    assert pod.object["spec"]["nodeSelector"] == {"pool": quota.name}, "the flavor's nodes"
    submit(scene, "urgent", priority="high")
    scene.phase("Queued")
    assert not pod.alive
    scene.attempt(1, "urgent").run().exit(0, result(1))
    again = scene.attempt(2).run()
    assert workload(scene)["metadata"]["uid"] == place, "one place for all attempts"
    again.exit(0, result(10))
    status = scene.phase("Succeeded")
    assert [a["cause"] for a in status["attempts"]] == [Cause.PREEMPTED, "Succeeded"]
    assert "counted_failures" not in status
    eventually(lambda: condition(scene, "Finished") == "True", "Kueue knows that it has finished")
    eventually(lambda: quota.usage() == 0, "the quota is free")


def test_a_retry_keeps_its_place_and_its_quota(scene: Scene, queues: MakeQueues) -> None:
    quota = queues(1)
    quota.local(scene.namespace)
    submit(scene)
    pod = scene.attempt(1).run()
    submit(scene, "next")
    scene.message("waits in queue team", name="next")
    place = workload(scene)["metadata"]["uid"]
    pod.exit(1)
    again = scene.attempt(2)
    assert workload(scene)["metadata"]["uid"] == place
    assert condition(scene, "Admitted") == "True"
    assert scene.status("next")["phase"] == "Queued", "nobody took its quota meanwhile"
    again.run().exit(0, result(1))
    scene.phase("Succeeded")
    scene.attempt(1, "next").run().exit(0, result(1))
    scene.phase("Succeeded", name="next")


def test_two_nodes_are_admitted_together_or_not_at_all(scene: Scene, queues: MakeQueues) -> None:
    quota = queues(3)
    quota.local(scene.namespace)
    submit(scene, "one", cpu=2)
    one = scene.attempt(1, "one").run()
    submit(scene, resources={"nodes": 2})
    scene.message("waits in queue team")
    assert scene.jobs() == []
    eventually(lambda: quota.usage() == 2, "nothing is held for half a job")
    one.exit(0, result(1))
    pods = [scene.attempt(1, index=index).run() for index in (0, 1)]
    eventually(lambda: quota.usage() == 2, "both nodes count")
    scene.phase("Running")
    eventually(lambda: condition(scene, "PodsReady") == "True", "Kueue knows that all pods run")
    for pod in pods:
        pod.exit(0, result(1))
    scene.phase("Succeeded")


def test_quota_is_not_given_back_before_the_pods_have_ended(scene: Scene, queues: MakeQueues, priorities: None) -> None:
    quota = queues(1)
    quota.local(scene.namespace)
    submit(scene, priority="low")
    pod = scene.attempt(1).run()
    scene.phase("Running")
    ended: list[float] = []
    stop = pod.stop

    def slowly() -> None:
        time.sleep(3)
        ended.append(time.monotonic())
        stop()

    pod.stop = slowly  # type: ignore[method-assign]
    submit(scene, "urgent", priority="high")
    scene.message("Kueue takes the quota back", "save a checkpoint")
    urgent = scene.attempt(1, "urgent")
    assert ended and time.monotonic() >= ended[0]
    urgent.run().exit(0, result(1))
    assert scene.succeed(attempt=2)["phase"] == "Succeeded"


def test_a_suspended_job_leaves_its_queue_and_enters_it_again(scene: Scene, queues: MakeQueues) -> None:
    quota = queues(1)
    quota.local(scene.namespace)
    submit(scene)
    scene.attempt(1).run()
    scene.phase("Running")
    scene.change(suspend=True)
    scene.phase("Suspended")
    eventually(lambda: quota.usage() == 0, "the quota is free")
    scene.change(suspend=False)
    scene.succeed(attempt=2)


def test_a_workload_that_somebody_deletes_or_deactivates_stops_the_pods(scene: Scene, queues: MakeQueues) -> None:
    queues(1).local(scene.namespace)
    submit(scene)
    scene.attempt(1).run()
    scene.phase("Running")
    scene.api.delete("workloads", scene.namespace, "x")
    scene.attempt(2).run()
    scene.phase("Running")
    scene.api.patch("workloads", scene.namespace, "x", {"spec": {"active": False}})
    scene.message("deactivated", "spec.active")
    scene.api.patch("workloads", scene.namespace, "x", {"spec": {"active": True}})
    assert scene.succeed(attempt=3)["phase"] == "Succeeded"


def test_a_queue_that_does_not_exist_is_said(scene: Scene, queues: MakeQueues) -> None:
    submit(scene, queue="nowhere")
    scene.message("waits in queue nowhere", "LocalQueue nowhere doesn't exist")
    submit(scene, "y", priority="none-such")
    scene.message("there is no WorkloadPriorityClass none-such", name="y")


def test_the_default_queue_takes_jobs_without_a_label(scene: Scene, queues: MakeQueues) -> None:
    quota = queues(1)
    quota.local(scene.namespace, "default")
    scene.submit("x", resources={"cpu": "1"})
    pod = scene.attempt(1).run()
    eventually(lambda: quota.usage() == 1, "once, and not for the Job as well")
    made = scene.api.get("jobs", scene.namespace, names.attempt_job("x", 1))
    assert names.LABEL_QUEUE not in made["metadata"]["labels"]
    scene.submit("y", resources={"cpu": "1"})
    scene.message("waits in queue default", name="y")
    pod.exit(0, result(1))
    scene.succeed(name="y")


@pytest.fixture
def configured(kueue: Kueue, request: pytest.FixtureRequest) -> Any:
    """Kueue with another configuration for one test."""
    kueue.configure(**request.param)
    yield
    kueue.configure()


EVERYTHING = {"manageJobsWithoutQueueName": True}
UNTOLD = {"integrations": {"frameworks": ["batch/job"]}}


@pytest.mark.parametrize("configured", [EVERYTHING], indirect=True)
def test_where_kueue_manages_every_job_ours_run_on_their_workloads_quota(
    configured: None, scene: Scene, queues: MakeQueues
) -> None:
    quota = queues(1)
    quota.local(scene.namespace)
    submit(scene)
    scene.attempt(1).run()
    scene.phase("Running")
    eventually(lambda: quota.usage() == 1, "once")
    scene.attempt(1).exit(1)
    scene.succeed(attempt=2)


@pytest.mark.parametrize("configured", [UNTOLD | EVERYTHING], indirect=True)
def test_where_kueue_was_not_told_of_our_kind_the_message_says_who_can_help(
    configured: None, scene: Scene, queues: MakeQueues
) -> None:
    queues(1).local(scene.namespace)
    submit(scene)
    scene.message("externalFrameworks", FRAMEWORK)
    scene.submit("unqueued", resources={"cpu": "1"})
    scene.message("kubectl label rlj unqueued", name="unqueued")
    scene.kubectl("label", names.SHORT_NAME, "unqueued", f"{names.LABEL_QUEUE}=team")
    scene.message("waits in queue team", name="unqueued")


@pytest.mark.parametrize("configured", [UNTOLD], indirect=True)
def test_where_kueue_queues_our_jobs_by_itself_they_run_all_the_same(
    configured: None, scene: Scene, queues: MakeQueues
) -> None:
    """A namespace with a default queue: Kueue puts every Job in it whose maker it does not know."""
    quota = queues(1, memory="64Gi", **{"ephemeral-storage": "64Gi"})  # of a Job, its default requests count too
    quota.local(scene.namespace, "default")
    scene.submit("x", resources={"cpu": "1"})
    pod = scene.attempt(1).run()
    scene.phase("Running")
    eventually(lambda: quota.usage() == 1, "once")
    assert scene.api.find("workloads", scene.namespace, "x") is None, "the Job has a Workload of Kueue's"
    scene.submit("y", resources={"cpu": "1"})
    scene.message("waits in queue default", name="y")
    pod.exit(0, result(1))
    scene.phase("Succeeded")
    scene.succeed(name="y")


def test_the_operator_may_end_at_any_time(
    scene: Scene, queues: MakeQueues, own_operator: Any, priorities: None
) -> None:
    operator = own_operator(scene.namespace).start().wait_ready()
    quota = queues(1)
    quota.local(scene.namespace)
    submit(scene, priority="low")
    scene.attempt(1).run()
    scene.phase("Running")
    operator.kill()
    submit(scene, "urgent", priority="high")
    operator.start().wait_ready()
    scene.attempt(1, "urgent").run()
    assert scene.phase("Queued")["attempts"][0]["cause"] == Cause.PREEMPTED
    operator.kill()
    operator.start().wait_ready()
    scene.attempt(1, "urgent").exit(0, result(1))
    causes = [attempt["cause"] for attempt in scene.succeed(attempt=2)["attempts"]]
    assert causes == [Cause.PREEMPTED, "Succeeded"]
