"""Why the pods of an attempt do not run yet, in words: from what scheduler, kubelet and Job controller report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl_operator import reasons
from nemo_rl_operator.observe import PodView

MOST_NAMED = 3
"""Late pods that a message names."""


@dataclass(frozen=True)
class Waiting:
    """What an attempt waits for. Pending: something outside the job must change; Starting: it is on its way."""

    phase: Literal["Pending", "Starting"]
    reason: str
    message: str
    fatal: bool = False


def waiting(pods: tuple[PodView, ...], spec: RLTrainingJobSpec, image: str, warning_event: str) -> Waiting:
    """What keeps the pods from running; the reason of the first pod that says one."""
    for pod in pods:
        if pod.phase != "Pending":
            continue
        if pod.unschedulable:
            return unschedulable(pod.unschedulable, spec)
        if pod.waiting and (found := container(pod.waiting, pod.waiting_message, image, _image_volumes(spec))):
            return found
        if pod.init_waiting:
            text = f"the trainer in pod {pod.name} waits for init container {pod.init_waiting}"
            return Waiting("Starting", reasons.INIT_CONTAINER, text)
    if warning_event:
        return from_warning(warning_event)
    nodes = spec.resources.nodes
    if not pods:
        return Waiting("Starting", reasons.PODS_PENDING, reasons.PODS_PENDING_MESSAGE)
    if nodes > 1:
        running = sum(pod.phase == "Running" for pod in pods)
        text = reasons.PODS_STARTING_MESSAGE.format(running=running, nodes=nodes, others=late_pods(pods, nodes))
        return Waiting("Starting", reasons.STARTING, text)
    return Waiting("Starting", reasons.STARTING, "the pod starts")


def late_pods(pods: tuple[PodView, ...], nodes: int) -> str:
    """The first pods that do not run yet, by name, and what each does instead."""
    known = {pod.index: pod for pod in pods}
    late = [
        _late_pod(index, known.get(index))
        for index in range(nodes)
        if index not in known or known[index].phase == "Pending"
    ]
    more = [f"{len(late) - MOST_NAMED} more"] if len(late) > MOST_NAMED else []
    return ", ".join([*late[:MOST_NAMED], *more])


def _late_pod(index: int, pod: PodView | None) -> str:
    if pod is None:
        return f"the pod with index {index}, which is not made yet"
    what = pod.waiting or ("without a node" if not pod.scheduled else "")
    return f"{pod.name} ({what})" if what else pod.name


def unschedulable(message: str, spec: RLTrainingJobSpec) -> Waiting:
    """The scheduler's message, for example `0/8 nodes are available: 8 Insufficient nvidia.com/gpu.`"""
    missing = re.search(r'persistentvolumeclaim "([^"]+)" not found', message)
    if missing:
        cure = "create it, or leave spec.output.claim out"
        return Waiting("Pending", reasons.MISSING_CLAIM, f"claim {missing[1]} does not exist; {cure}")
    if "unbound immediate PersistentVolumeClaims" in message:
        text = "waiting for a claim to be bound; is there a default StorageClass, or the one in spec.output?"
        return Waiting("Pending", reasons.UNBOUND_CLAIM, text)
    if found := re.search(r"device class (\S+) does not exist", message):
        text = f"DeviceClass {found[1]}, which {_templates(spec)} names, does not exist; is the driver of the devices installed?"
        return Waiting("Pending", reasons.MISSING_CLAIM, text)
    total = re.match(r"0/(\d+) nodes", message)
    body = message.split(":", 1)[-1].split("preemption:", 1)[0].strip(" .")
    parts = [_constraint(part.strip(), spec) for part in re.split(r", (?=\d+ )", body) if part.strip()]
    of = f"0 of {total[1]} nodes fit" if total else "no node fits"
    wanted = _wanted(body, spec)
    return Waiting("Pending", reasons.UNSCHEDULABLE, f"waiting for {wanted}: {of} ({'; '.join(parts)})")


def _wanted(body: str, spec: RLTrainingJobSpec) -> str:
    ask = spec.resources
    wanted = []
    devices = {ask.gpu_resource: ask.gpus_per_node} | ask.extra
    wanted += [f"{count} × {name}" for name, count in devices.items() if count and name in body]
    if "Insufficient cpu" in body and ask.cpu:
        wanted.append(f"{ask.cpu} cpu")
    if "Insufficient memory" in body and ask.memory:
        wanted.append(f"{ask.memory} memory")
    if "Insufficient ephemeral-storage" in body and ask.ephemeral_storage:
        wanted.append(f"{ask.ephemeral_storage} ephemeral-storage")
    if NO_DEVICES in body and ask.claims:
        wanted.append(f"devices of {_templates(spec)}")
    text = " and ".join(wanted)
    if not text:
        return "a node"
    return f"{text} on each of {ask.nodes} nodes" if ask.nodes > 1 else text


NO_DEVICES = "cannot allocate all claims"
"""The scheduler's words for claims (DRA) whose devices a node does not have, or not free."""


def _templates(spec: RLTrainingJobSpec) -> str:
    return f"spec.resources.claims ({', '.join(claim.template for claim in spec.resources.claims)})"


def _constraint(part: str, spec: RLTrainingJobSpec) -> str:
    """One clause of the scheduler's message in plain words."""
    count, _, text = part.partition(" ")
    if found := re.match(r"Insufficient (\S+)", text):
        return f"{count} have too little {found[1].rstrip('.')} free"
    if NO_DEVICES in text:
        return f"{count} have no such devices free"
    if "untolerated taint" in text or "had taint" in text:
        taint = re.search(r"\{([^}]*)\}", text)  # Kubernetes 1.34 says no more than that there are some
        which = f"the taint {taint[1].rstrip(': ')}" if taint else "taints that the job does not tolerate"
        return f"{count} have {which}, see spec.tolerations"
    if "node affinity/selector" in text or "node selector" in text:
        return f"{count} do not match spec.nodeSelector or spec.affinity"
    if "topology spread constraints" in text:
        return f"{count} do not fit spec.topologySpreadConstraints"
    if "Too many pods" in text:
        return f"{count} run too many pods"
    if "volume node affinity conflict" in text:
        return f"{count} cannot reach the volume of a claim"
    if "unschedulable" in text:
        return f"{count} are cordoned"
    return part


def _image_volumes(spec: RLTrainingJobSpec) -> dict[str, str]:
    """The volumes of images by what they name."""
    return {volume.image.reference: volume.name for volume in spec.volumes if volume.image is not None}


def container(reason: str, message: str, image: str, volumes: Mapping[str, str] | None = None) -> Waiting | None:
    """What a waiting container says; None for the ordinary steps of a start. `volumes`: those of images, by their references."""
    volumes = volumes or {}
    if reason in ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "RegistryUnavailable"):
        field = "spec.image"
        for reference, volume in volumes.items():
            if reference in message and image not in message:
                image, field = f"{reference} of volume {volume}", f"spec.volumes[{volume}].image"
        text = f"cannot pull image {image}: {_pull(reason, message, field)}"
        return Waiting("Starting", reasons.PULL, text)
    if reason == "InvalidImageName":
        text = f"image {image} is no valid image name; correct spec.image in a new job"
        return Waiting("Starting", reason, text, fatal=True)
    if reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        said = _config(message or reason)
        if volumes and said.startswith("the container cannot start"):
            said += reasons.RUNTIME_OF_IMAGE_VOLUMES.format(volumes=", ".join(sorted(volumes.values())))
        return Waiting("Starting", reasons.CONFIG, said)
    return None


def _pull(reason: str, message: str, field: str) -> str:
    text = message.lower()
    if reason == "ErrImageNeverPull":
        return f"it is not on the node and {_policy_of(field)} is Never"
    if any(word in text for word in ("unauthorized", "authentication required", "denied", "forbidden")):
        return "the registry refuses access; check the name and spec.imagePullSecrets"
    if any(word in text for word in ("not found", "manifest unknown", "no such manifest")):
        return f"the registry has no such image; check {field}"
    if any(word in text for word in ("no such host", "timeout", "connection refused", "i/o timeout", "deadline")):
        return "the registry does not answer from the node"
    if "x509" in text:
        return "the node does not trust the registry's certificate"
    return "the kubelet tries again" + (f" ({message[:150]})" if message else "")


def _policy_of(field: str) -> str:
    return "spec.imagePullPolicy" if field == "spec.image" else f"{field}.pullPolicy"


def _config(message: str) -> str:
    if found := re.search(r'(secret|configmap) "([^"]+)" not found', message):
        return f"waiting for {found[1].capitalize()} {found[2]}, which spec.env or spec.envFrom names; create it"
    if found := re.search(r"couldn't find key (\S+) in Secret (\S+)", message):
        return f"Secret {found[2].split('/')[-1]} has no key {found[1]}, which spec.env names; add it"
    if "runAsNonRoot" in message:
        return "the image runs as root, which trainer pods may not; give it a numeric USER"
    return f"the container cannot start: {message[:300]}"


def from_warning(message: str) -> Waiting:
    """A warning Event of the Job controller, the kubelet or the attach controller about the attempt."""
    if found := re.search(r"exceeded quota: ([^,]+), requested: (.+?), used: (.+?), limited: (.+)", message):
        text = f"waiting for quota {found[1]}: asked for {found[2]}, in use {found[3]}, limit {found[4]}"
        return Waiting("Pending", reasons.QUOTA, text)
    if "violates PodSecurity" in message:
        text = f"the namespace's pod security refuses the pods: {message[:300]}"
        return Waiting("Pending", reasons.POD_REFUSED, text)
    if found := re.search(r'service ?account "?([^"\s]+)"? not found|serviceaccount "([^"]+)" not found', message):
        text = f"service account {found[1] or found[2]} does not exist; create it or change spec.serviceAccountName"
        return Waiting("Pending", reasons.POD_REFUSED, text)
    if found := re.search(
        r'RuntimeClass "?([^"\s]+)"? not found|runtimeclass\.node\.k8s\.io "([^"]+)" not found', message
    ):
        text = f"RuntimeClass {found[1] or found[2]} does not exist; create it or change spec.runtimeClassName"
        return Waiting("Pending", reasons.POD_REFUSED, text)
    if found := re.search(r"no PriorityClass with name (\S+) was found", message):
        text = f"PriorityClass {found[1]} does not exist; create it or change spec.priorityClassName"
        return Waiting("Pending", reasons.POD_REFUSED, text)
    if found := re.search(r'resource claim template "([^"]+)": .*not found', message):
        text = f"ResourceClaimTemplate {found[1]} does not exist; create it or change spec.resources.claims"
        return Waiting("Pending", reasons.MISSING_CLAIM, text)
    if "Multi-Attach" in message:
        text = "a claim is still attached to another node; it is freed when the pods there end"
        return Waiting("Starting", reasons.MOUNT, text)
    if found := re.search(r'(configmap|secret|persistentvolumeclaim) "([^"]+)" not found', message, re.IGNORECASE):
        return Waiting("Starting", reasons.MOUNT, f"waiting for {found[1].lower()} {found[2]}, which the pod mounts")
    if "FailedMount" in message or "FailedAttachVolume" in message or "MountVolume" in message:
        return Waiting("Starting", reasons.MOUNT, f"a volume is not ready: {message[:300]}")
    if "is forbidden" in message:
        return Waiting("Pending", reasons.POD_REFUSED, f"the cluster refuses the pods: {message[:300]}")
    return Waiting("Starting", reasons.STARTING, message[:300])
