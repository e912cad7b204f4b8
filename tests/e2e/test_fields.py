"""One job with all that a real node may need, as far as the admission policy allows it; its devices are played."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from charts import render
from e2e.kubectl import Kubectl, Object, eventually
from e2e.scene import RESTRICTED, SECONDS, Scene, TrainingJob

GPU, NIC = "example.com/slice-1g", "rdma/hca"
POLICY = {
    "allowedResources": [GPU, NIC],
    "allowedRuntimeClasses": ["e2e-fields"],
    "allowedVolumes": ["configMap", "secret", "persistentVolumeClaim", "emptyDir"],
    "allowedClaims": ["shared-*"],
    "allowedCapabilities": ["IPC_LOCK"],
    "allowedResourceClaimTemplates": ["lab-*"],
    "hostNetwork": True,
}
GO = "/volumes/scratch/go"
REWARD = f"""
import os, time

def reward(prompt: str, response: str) -> float:
    if not os.path.exists("{GO}"):  # until somebody has looked
        time.sleep(0.05)
    return float(len(response))
"""
LOOK = """
import json, os, re
status = open("/proc/self/status").read()
print(json.dumps({
    "bounding": int(re.search(r"CapBnd:\\s+(\\S+)", status)[1], 16),
    "user": os.getuid(),
    "secret": open("/etc/ssl/corporate/ca.crt").read(),
    "claim": os.listdir("/volumes/corpus"),
    "writable": [d for d in ("/volumes/rows", "/volumes/corpus", "/etc/ssl/corporate", "/volumes/scratch") if os.access(d, os.W_OK)],
    "hca": os.environ["NCCL_IB_HCA"],
}))
"""
IPC_LOCK = 1 << 14


@pytest.fixture
def devices() -> Iterator[None]:
    """Makes the first node offer devices, as their plugins would."""
    node = min(node["metadata"]["name"] for node in Kubectl().items("nodes"))

    def offer(count: str) -> None:
        paths = (f"/status/capacity/{name.replace('/', '~1')}" for name in (GPU, NIC))
        change = json.dumps([{"op": "add", "path": path, "value": count} for path in paths])
        Kubectl()("patch", "node", node, "--subresource=status", "--type=json", "-p", change)

    def offered() -> set[str]:
        allocatable = Kubectl().json("node", node)["status"]["allocatable"]
        return {allocatable.get(name, "0") for name in (GPU, NIC)}

    offer("2")
    eventually(lambda: offered() == {"2"}, f"{node} offers devices", SECONDS)
    yield
    offer("0")


@pytest.fixture
def place(new_scene: Callable[[str], Scene]) -> Iterator[Scene]:
    """A namespace that allows pods with more rights than others, under a policy of its own in place of the release's."""
    scene = new_scene("fields")
    Kubectl()("label", "namespace", scene.namespace, "--overwrite", f"{RESTRICTED}=privileged")
    values = {"admissionPolicy": POLICY, "watchNamespaces": [scene.namespace], "crds": {"enabled": False}}
    objects = render(values, namespace=scene.namespace)
    own = [o for o in objects if o["kind"].startswith("ValidatingAdmissionPolicy")]
    runtime = {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "e2e-fields"},
        "handler": "runc",
    }
    others = [
        b
        for b in Kubectl().items("validatingadmissionpolicybindings")
        if "nemo-rl" in b["metadata"].get("labels", {}).get("app.kubernetes.io/part-of", "")
    ]
    elsewhere = {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": [scene.namespace]}
    try:
        for binding in others:
            change(binding, {"namespaceSelector": {"matchExpressions": [*expressions(binding), elsewhere]}})
        Kubectl().apply(*own, runtime)
        yield scene
    finally:
        for binding in others:
            change(binding, binding["spec"].get("matchResources"))
        for kind, name in [(o["kind"], o["metadata"]["name"]) for o in [*own, runtime]]:
            Kubectl()("delete", kind, name, "--ignore-not-found", "--wait=false", check=False)


def expressions(binding: Object) -> list[Any]:
    return list(
        ((binding["spec"].get("matchResources") or {}).get("namespaceSelector") or {}).get("matchExpressions") or ()
    )


def change(binding: Object, matched: Object | None) -> None:
    patch = json.dumps(
        [
            {
                "op": "add" if matched else "remove",
                "path": "/spec/matchResources",
                **({"value": matched} if matched else {}),
            }
        ]
    )
    Kubectl()(
        "patch",
        "validatingadmissionpolicybinding",
        binding["metadata"]["name"],
        "--type=json",
        "-p",
        patch,
        check=bool(matched),
    )


def everything(place: Scene, name: str, **resources: Any) -> Object:
    """A manifest with all that the policy allows; what it names is made. It trains until somebody has looked, and then to its end."""
    rows = "\n".join(json.dumps(row) for row in place.manifests.rows)
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
    place.kubectl.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "rows"}, "data": {"rows.jsonl": rows}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ca"}, "stringData": {"ca.crt": "certificate"}},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "shared-corpus"}, "spec": claim},
    )
    asked = {"gpusPerNode": 1, "gpuResource": GPU, "extra": {NIC: 2}, "memory": "2Gi", "ephemeralStorage": "1Gi"}
    return place.manifests.grpo(
        name,
        steps=40,
        dataset={"path": "/volumes/rows/rows.jsonl"},
        reward={"source": REWARD},
        resources=asked | resources,
        runtimeClassName="e2e-fields",
        topologySpreadConstraints=[{"topologyKey": "kubernetes.io/hostname"}],
        volumes=[
            {"name": "rows", "configMap": {"name": "rows"}},
            {"name": "ca", "mountPath": "/etc/ssl/corporate", "secret": {"secretName": "ca"}},
            {"name": "corpus", "persistentVolumeClaim": {"claimName": "shared-corpus"}},
            {"name": "scratch", "emptyDir": {"sizeLimit": "64Mi"}},
        ],
        env=[{"name": "OMP_NUM_THREADS", "value": "1"}, {"name": "NCCL_IB_HCA", "value": "mlx5"}],
        capabilities=["IPC_LOCK"],
        hostNetwork=True,
    )


def taken(place: Scene, manifest: Object) -> TrainingJob:
    """The job, once the policy is in force, which is a moment after it is made."""
    limit = time.monotonic() + SECONDS
    while "created" not in (
        said := place.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(manifest), check=False)
    ):
        assert time.monotonic() < limit, said
        time.sleep(0.5)
    return place.apply(manifest)


def look(job: TrainingJob) -> None:
    """All that `everything` names has reached the container, and nothing besides."""
    found = json.loads(job.execute("python", "-c", LOOK))
    assert found["bounding"] == IPC_LOCK, "that capability, and no other"
    assert found["user"] != 0
    assert (found["secret"], found["hca"]) == ("certificate", "mlx5")
    assert found["writable"] == ["/volumes/scratch"]
    pod = job.pod()
    limits = pod["spec"]["containers"][0]["resources"]["limits"]
    assert {k: v for k, v in limits.items() if "/" in k} == {GPU: "1", NIC: "2"}
    assert pod["status"]["podIP"] == pod["status"]["hostIP"], "the node's network"
    assert pod["spec"]["runtimeClassName"] == "e2e-fields"


def test_a_job_with_all_that_the_policy_allows_trains(place: Scene, devices: None):
    manifest = everything(place, "everything")
    job = taken(place, manifest)
    job.reached(1)
    look(job)
    job.execute("touch", GO)
    status = job.phase("Succeeded")
    assert (status["result"]["totalSteps"], status["attempt"]) == (40, 1)
    refused = json.loads(json.dumps(manifest))
    refused["metadata"]["name"] = "other"
    refused["spec"]["resources"]["extra"] = {"vendor.example/fpga": 1}
    said = place.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(refused), check=False)
    assert re.search(r"this cluster allows nvidia.com/gpu, example.com/slice-1g, rdma/hca", said), said
