"""The definition, the operator and the trainer image need not be of one version: no job suffers from what is newer or older."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.api import Object, eventually
from cluster.manifests import result
from cluster.operator_process import Operator
from cluster.scene import Scene
from cluster.server import Cluster, await_policy, define
from nemo_rl.job import changes, crd, names

OwnOperator = Callable[..., Operator]
DEFINITION = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{names.CRD_NAME}"
Change = Callable[[Object], None]


@pytest.fixture
def definition(cluster: Cluster, operators: object) -> Iterator[Callable[[Change], None]]:
    """A function that changes the schema of the resource's definition; it is set right again afterwards."""

    def put(content: Object) -> None:
        found = cluster.api.request("GET", DEFINITION)
        cluster.api.request(
            "PUT", DEFINITION, {**found, "spec": {**found["spec"], "versions": content["spec"]["versions"]}}
        )
        time.sleep(2)  # the API server takes the old storage down, ends all watches, and serves the new one

    def change(how: Change) -> None:
        content = copy.deepcopy(crd.crd())
        how(content["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"])
        put(content)

    yield change
    put(crd.crd())


@pytest.fixture
def no_policy(cluster: Cluster, operators: object) -> Iterator[None]:
    """As where somebody removed the policy that says what of a job may change."""
    for kind in ("validatingadmissionpolicybinding", "validatingadmissionpolicy"):
        cluster.kubectl("delete", kind, changes.NAME)
    await_policy(cluster.api, there=False)
    yield
    define(cluster.api, cluster.kubectl)


def newer(root: Object) -> None:
    """As a next version might have it."""
    fields = root["spec"]["properties"]
    fields["training"]["properties"]["fp8"] = {"type": "boolean", "default": False}
    fields["resources"]["properties"]["fabric"] = {"type": "string", "default": "auto"}
    fields["later"] = {"type": "object", "default": {}, "properties": {"mode": {"type": "string", "default": "x"}}}


def test_a_newer_definition_disturbs_no_running_job(
    scene: Scene, own_operator: OwnOperator, definition: Callable[[Change], None]
) -> None:
    operator = own_operator(scene.namespace).start().wait_ready()
    jobs = ["runs", "ends", "retried", "waits"]
    for name in jobs[:3]:
        scene.submit(name)
    pods = {name: scene.attempt(1, name).run() for name in jobs[:3]}
    for name in jobs[:3]:
        scene.phase("Running", name=name)
    definition(newer)
    pods["runs"].serve({"step": 3})
    scene.until(lambda s: s["progress"]["step"] == 3, "its status is written", "runs")
    scene.submit("waits")
    time.sleep(5)
    operator.stop()
    operator.start().wait_ready()
    assert scene.job("runs")["spec"]["training"]["fp8"] is False, "the API server fills it in"
    pods["ends"].exit(0, result())
    pods["retried"].evict()
    assert scene.phase("Succeeded", name="ends")["attempt"] == 1
    assert scene.succeed(attempt=2, name="retried")["phase"] == "Succeeded"
    assert scene.succeed(name="waits")["phase"] == "Succeeded"
    status = scene.phase("Running", name="runs")
    assert "spec.training.fp8" in scene.condition("Accepted", "runs")["message"]
    assert [a["number"] for a in status["attempts"]] == [1]
    pods["runs"].exit(0, result())
    scene.phase("Succeeded", name="runs")
    log = operator.log.read_text()
    assert log.count("fields that this version does not know") == 2, "once by each process, however many jobs there are"


def test_a_value_of_the_future_stops_no_running_job(
    scene: Scene, own_operator: OwnOperator, definition: Callable[[Change], None], no_policy: None
) -> None:
    """Without the policy, so that the test can play an operator that accepted it."""

    def with_value(root: Object) -> None:
        root["spec"]["properties"]["training"]["properties"]["precision"]["enum"].append("fp4")

    operator = own_operator(scene.namespace).start().wait_ready()
    scene.submit()
    pod = scene.attempt(1).run()
    scene.phase("Running")
    definition(with_value)
    scene.change(training={"precision": "fp4"})
    scene.until(lambda s: scene.condition("Accepted").get("status") == "False", "Accepted=False")
    assert "spec.training.precision" in scene.condition("Accepted")["message"]
    assert scene.status()["phase"] == "Running"
    operator.kill()
    operator.start().wait_ready()
    pod.exit(0, result())
    scene.phase("Succeeded")


def test_a_status_field_that_an_older_definition_lacks_makes_nobody_ill(
    scene: Scene, own_operator: OwnOperator, definition: Callable[[Change], None]
) -> None:
    def older(root: Object) -> None:
        for name in ("gpus", "activeSince", "activeSeconds", "progress"):
            del root["status"]["properties"][name]

    operator = own_operator(scene.namespace).start().wait_ready()
    definition(older)
    scene.submit()
    pod = scene.attempt(1).run()
    scene.phase("Running")
    version = scene.job()["metadata"]["resourceVersion"]
    for step in range(1, 20):
        pod.serve({"step": step})
        time.sleep(0.3)
        assert operator.probe("/healthz") == 200, operator.say("/healthz")
    assert int(scene.job()["metadata"]["resourceVersion"]) - int(version) < 2000
    writes = [n for n in operator.metrics().items() if "api_calls_total" in n[0] and "PATCH" in n[0]]
    assert sum(count for _, count in writes) < 45, writes
    pod.exit(0, result())
    scene.phase("Succeeded")


def test_two_operators_at_once_run_each_step_once(
    scene: Scene, own_operator: OwnOperator, definition: Callable[[Change], None]
) -> None:
    """One of them has met the newer definition from its start, the other while it ran."""
    first = own_operator(scene.namespace).start().wait_ready()
    scene.submit("early")
    early = scene.attempt(1, "early").run()
    scene.phase("Running", name="early")
    definition(newer)
    second = own_operator(scene.namespace).start().wait_ready()
    scene.submit("late")
    late = scene.attempt(1, "late").run()
    for name, pod in (("early", early), ("late", late)):
        scene.phase("Running", name=name)
        pod.exit(0, result())
        status = scene.phase("Succeeded", name=name)
        assert [a["number"] for a in status["attempts"]] == [1]
        assert len(scene.jobs(name)) == 1
    eventually(lambda: first.probe("/healthz") == second.probe("/healthz") == 200, "both are well")


def test_without_the_policy_a_change_is_said_and_the_job_goes_on_as_it_was(
    scene: Scene, own_operator: OwnOperator, no_policy: None
) -> None:
    operator = own_operator(scene.namespace).start().wait_ready()
    scene.submit(backoffLimit=1)
    first = scene.attempt(1).run()
    scene.phase("Running")
    scene.change(model="other", training={"maxSteps": 77}, backoffLimit=2)
    scene.until(lambda s: scene.condition("Accepted").get("reason") == "ChangeNotTaken", "the change is refused")
    said = scene.condition("Accepted")["message"]
    assert "spec.model, spec.training.maxSteps" in said and "backoffLimit" not in said
    operator.kill()
    first.exit(1)
    operator.start().wait_ready()
    second = scene.attempt(2).run()
    arguments = [pod.object["spec"]["containers"][0]["args"] for pod in (first, second)]
    assert arguments[0] == arguments[1], "the digest of the same frozen job"
    second.exit(0, result())
    scene.phase("Succeeded")
