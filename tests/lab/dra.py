"""Devices by claims (DRA) in the lab: Kubernetes' own test driver, out of the module that the node's programs come from.

Its devices are none: for each claim that the kubelet has it prepare, it writes a CDI file, by which the container runtime gives
environment variables to the containers. containerd knows CDI from 1.7 on; Debian's 1.6 starts the containers without them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from lab import cluster, images, programs
from lab.settings import NODE, RUN, fail, need_root, say

DRIVER = "test-driver.cdi.k8s.io"
CLASS = "lab-devices"
COUNT = 4
"""Devices of the node."""
CDI = "/run/cdi"
"""Where the driver writes what a container gets, one file for each request of a prepared claim; runtimes look for it there."""
IMAGE = f"localhost/dra-test-driver:{programs.KUBERNETES_VERSION}"
NAMESPACE, NAME = "kube-system", "dra-test-driver"
SECONDS = 120


def on(count: int = COUNT) -> None:
    """From now on the lab's node offers `count` devices of the class CLASS."""
    need_root()
    if not cluster.is_up():
        fail("the lab is down; start it with `make lab-up`")
    programs.ensure(("dra-test-driver",))
    images.load_program(IMAGE, "dra-test-driver", "dra-test-driver")
    cluster.kubectl("apply", "-f", "-", input=manifest(count), text=True, stdout=subprocess.DEVNULL)
    wait = ("rollout", "status", f"daemonset/{NAME}", f"--timeout={SECONDS}s")
    cluster.kubectl("--namespace", NAMESPACE, *wait, stdout=subprocess.DEVNULL)
    say(f"{NAME} {programs.KUBERNETES_VERSION}: {count} devices by claims")


def off() -> None:
    """No devices any more."""
    need_root()
    delete = ("delete", "--ignore-not-found", "-f", "-")
    cluster.kubectl(*delete, input=manifest(COUNT), text=True, stdout=subprocess.DEVNULL)
    cluster.kubectl("delete", "resourceslices", f"--field-selector=spec.driver={DRIVER}", stdout=subprocess.DEVNULL)


def files(claim: str) -> list[Path]:
    """What the driver has written for the claim with this uid, while the kubelet has it prepared."""
    return [*Path(f"/proc/{cluster.state()['init']}/root{CDI}").glob(f"*{claim}*.json")]


def template(name: str, count: int, device_class: str = CLASS) -> dict[str, Any]:
    """A ResourceClaimTemplate for so many devices, with parameters of the driver."""
    request = {"name": "wanted", "exactly": {"deviceClassName": device_class, "count": count}}
    opaque = {"driver": DRIVER, "parameters": {"MODEL": "lab"}}
    devices = {"requests": [request], "config": [{"requests": ["wanted"], "opaque": opaque}]}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {"name": name},
        "spec": {"spec": {"devices": devices}},
    }


def device_class() -> dict[str, Any]:
    """All devices of the driver."""
    selector = {"cel": {"expression": f"device.driver == '{DRIVER}'"}}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceClass",
        "metadata": {"name": CLASS},
        "spec": {"selectors": [selector]},
    }


def arguments(node: str, count: int, plugins: str, registry: str, cdi: str) -> list[str]:
    """How the driver is told to offer `count` devices of a node, with its folders there."""
    return [
        f"--drivername={DRIVER}",
        "kubelet-plugin",
        f"--node-name={node}",
        f"--num-devices={count}",
        f"--datadir={plugins}",
        f"--plugin-registration-path={registry}",
        f"--cdi-dir={cdi}",
    ]


def manifest(count: int) -> str:
    """The driver as a DaemonSet, with the rights that its own example gives it, and a class of its devices."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME, "namespace": NAMESPACE}}
    api = "rbac.authorization.k8s.io/v1"
    rules = [
        {"apiGroups": ["resource.k8s.io"], "resources": ["resourceclaims"], "verbs": ["get"]},
        {"apiGroups": ["resource.k8s.io"], "resources": ["resourceclaims/status"], "verbs": ["update"]},
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]},
        {
            "apiGroups": ["resource.k8s.io"],
            "resources": ["resourceslices"],
            "verbs": ["get", "list", "watch", "create", "update", "patch", "delete"],
        },
    ]
    role = {"apiVersion": api, "kind": "ClusterRole", "metadata": {"name": NAME}, "rules": rules}
    binding = {
        "apiVersion": api,
        "kind": "ClusterRoleBinding",
        "metadata": {"name": NAME},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NAME},
        "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}],
    }
    # the kubelet and the driver find each other's sockets by their paths on the node
    plugins, registry = f"{RUN}/kubelet/plugins", f"{RUN}/kubelet/plugins_registry"
    folders = {"plugin": f"{plugins}/{DRIVER}", "registry": registry, "cdi": CDI}
    container = {
        "name": "driver",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "args": arguments(NODE, count, plugins, registry, CDI),
        "volumeMounts": [{"name": name, "mountPath": place} for name, place in folders.items()],
    }
    volumes = [
        {"name": name, "hostPath": {"path": place, "type": "DirectoryOrCreate"}} for name, place in folders.items()
    ]
    labels = {"app": NAME}
    pod = {
        "serviceAccountName": NAME,
        "containers": [container],
        "volumes": volumes,
        "terminationGracePeriodSeconds": 5,
    }
    daemons = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [account, role, binding, device_class(), daemons]})
