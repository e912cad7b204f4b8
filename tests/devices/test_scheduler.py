"""What a job says while its claims lack something, by the words of the real scheduler and controller; no pods run here.

A control plane with a scheduler and the controller of claims, and Kubernetes' own test driver for a node that nobody plays.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.api import Api, eventually
from cluster.kubelet import Kubelet
from cluster.operator_process import Operators
from cluster.scene import Scene, run_kubectl
from cluster.server import define
from lab import dra, programs
from lab.control_plane import CONTROLLERS, ControlPlane
from lab.dra import template

NODE = "somewhere"
ROOM = {"cpu": "8", "memory": "64Gi", "ephemeral-storage": "64Gi", "pods": "20"}


@pytest.fixture(scope="module")
def claims_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A namespace of a cluster that has one node with the driver's devices, and our operator."""
    folder = tmp_path_factory.mktemp("devices")
    plane = ControlPlane(folder, (*CONTROLLERS, "resourceclaim-controller"))
    kubectl = run_kubectl(programs.path("kubectl"), plane.kubeconfig, folder / "cache")
    operators = Operators(plane.kubeconfig, folder)
    with tempfile.TemporaryDirectory(prefix="dra-") as sockets:  # their paths must be short
        try:
            plane.start(lambda: define(Api(plane.kubeconfig), kubectl))
            plane.commands["kube-scheduler"] = [
                str(programs.path("kube-scheduler")),
                f"--kubeconfig={plane.kubeconfig}",
                "--leader-elect=false",
                "--secure-port=0",
            ]
            plane.launch("kube-scheduler")
            body: dict[str, Any] = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}
            kubectl("create", "-f", "-", stdin=json.dumps(body))
            ready = [{"type": "Ready", "status": "True", "reason": "Played"}]
            status = {"status": {"capacity": ROOM, "allocatable": ROOM, "conditions": ready}}
            kubectl("patch", "node", NODE, "--subresource=status", "--type=merge", "-p", json.dumps(status))
            kubectl("patch", "node", NODE, "--type=merge", "-p", json.dumps({"spec": {"taints": None}}))
            (Path(sockets) / dra.DRIVER).mkdir()
            plane.commands["dra-test-driver"] = [
                str(programs.path("dra-test-driver")),
                f"--kubeconfig={plane.kubeconfig}",
                *dra.arguments(NODE, dra.COUNT, sockets, sockets, f"{sockets}/cdi"),
            ]
            plane.launch("dra-test-driver")
            kubectl("create", "-f", "-", stdin=json.dumps(dra.device_class()))
            operators.share()
            kubelet = Kubelet(Api(plane.kubeconfig))
            yield Scene(kubelet.api, kubectl, kubelet, "claims").open()
            kubelet.close()
        finally:
            operators.close()
            plane.stop()


def submit(scene: Scene, name: str, claimed: str) -> None:
    """A job that needs nothing but a node and devices by this template."""
    asked = {"gpusPerNode": 0, "claims": [{"template": claimed}]}
    scene.submit(name, "sft", resources=asked, output={"uri": "s3://bucket/runs"})


def offer(scene: Scene, name: str, count: int, device_class: str = dra.CLASS) -> None:
    scene.kubectl("create", "-f", "-", stdin=json.dumps(template(name, count, device_class)))


def devices_of(scene: Scene, name: str) -> list[str]:
    """The devices that the scheduler has given to the pod of a job."""
    found = []
    for claim in json.loads(scene.kubectl("get", "resourceclaims", "-o", "json"))["items"]:
        if claim["metadata"]["ownerReferences"][0]["name"].startswith(f"{name}-1-0-"):
            found += [
                r["device"] for r in claim.get("status", {}).get("allocation", {}).get("devices", {}).get("results", ())
            ]
    return found


def test_a_template_that_is_missing_and_then_asks_for_too_much(claims_scene: Scene) -> None:
    submit(claims_scene, "wishful", "many")
    status = claims_scene.message(
        "ResourceClaimTemplate many does not exist; create it or change spec.resources.claims", name="wishful"
    )
    assert (status["phase"], status["reason"]) == ("Pending", "MissingClaim")
    offer(claims_scene, "many", dra.COUNT + 1)
    words = "waiting for devices of spec.resources.claims (many): 0 of 1 nodes fit (1 have no such devices free)"
    status = claims_scene.message(words, name="wishful", seconds=120)
    assert (status["phase"], status["reason"]) == ("Pending", "Unschedulable")


def test_a_device_class_that_is_missing(claims_scene: Scene) -> None:
    offer(claims_scene, "unknown", 1, "nobodys-devices")
    submit(claims_scene, "classless", "unknown")
    words = "DeviceClass nobodys-devices, which spec.resources.claims (unknown) names, does not exist"
    status = claims_scene.message(words, name="classless")
    assert (status["phase"], status["reason"]) == ("Pending", "MissingClaim")


def test_each_job_gets_devices_of_its_own_until_none_is_left(claims_scene: Scene) -> None:
    offer(claims_scene, "three", 3)
    offer(claims_scene, "one", 1)
    for name in ("three", "one"):
        submit(claims_scene, name, name)
        eventually(lambda name=name: devices_of(claims_scene, name), f"devices of {name}")  # type: ignore[misc]
        pod = claims_scene.attempt(1, name)
        eventually(lambda pod=pod: pod.object["spec"].get("nodeName") == NODE, f"{name} has its node")  # type: ignore[misc]
    first, second = devices_of(claims_scene, "three"), devices_of(claims_scene, "one")
    assert len({*first, *second}) == len(first) + len(second) == dra.COUNT
    submit(claims_scene, "late", "one")
    claims_scene.message("waiting for devices of spec.resources.claims (one): 0 of 1 nodes fit", name="late")
