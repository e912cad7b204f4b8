"""Why pods do not run yet: real messages of scheduler, kubelet, Job controller and attach controller, and our words."""

from __future__ import annotations

import pytest

from nemo_rl_operator.pending import waiting
from unit.operator import make

GPU = "0/8 nodes are available: 8 Insufficient nvidia.com/gpu. preemption: 0/8 nodes are available: 8 No preemption victims found for incoming pod."
MIXED = (
    "0/5 nodes are available: 1 node(s) had untolerated taint {nvidia.com/gpu: present}, 2 Insufficient nvidia.com/gpu, "
    "2 node(s) didn't match Pod's node affinity/selector. preemption: 0/5 nodes are available: 5 Preemption is not helpful for scheduling."
)

UNSCHEDULABLE = [
    (GPU, "Unschedulable", "waiting for 2 × nvidia.com/gpu: 0 of 8 nodes fit (8 have too little nvidia.com/gpu free)"),
    (
        MIXED,
        "Unschedulable",
        "waiting for 2 × nvidia.com/gpu: 0 of 5 nodes fit (1 have the taint nvidia.com/gpu: present, see spec.tolerations; "
        "2 have too little nvidia.com/gpu free; 2 do not match spec.nodeSelector or spec.affinity)",
    ),
    (
        "0/1 nodes are available: 1 node(s) had untolerated taint(s). still not schedulable, preemption: 0/1 nodes are available: "
        "1 Preemption is not helpful for scheduling.",
        "Unschedulable",
        "waiting for a node: 0 of 1 nodes fit (1 have taints that the job does not tolerate, see spec.tolerations)",
    ),
    (
        "0/3 nodes are available: 3 Insufficient memory.",
        "Unschedulable",
        "waiting for 64Gi memory: 0 of 3 nodes fit (3 have too little memory free)",
    ),
    (
        "0/1 nodes are available: 1 node(s) were unschedulable.",
        "Unschedulable",
        "waiting for a node: 0 of 1 nodes fit (1 are cordoned)",
    ),
    (
        "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. preemption: not eligible",
        "UnboundClaim",
        "waiting for a claim to be bound; is there a default StorageClass, or the one in spec.output?",
    ),
    (
        '0/2 nodes are available: persistentvolumeclaim "data" not found. preemption: not eligible',
        "MissingClaim",
        "claim data does not exist; create it, or leave spec.output.claim out",
    ),
    (
        "no nodes available to schedule pods",
        "Unschedulable",
        "waiting for a node: no node fits (no nodes available to schedule pods)",
    ),
]


@pytest.mark.parametrize(("message", "reason", "words"), UNSCHEDULABLE)
def test_unschedulable(message: str, reason: str, words: str) -> None:
    spec = make.parsed(resources={"gpusPerNode": 2, "memory": "64Gi"})
    found = waiting((make.pod(unschedulable=message),), spec, make.IMAGE, "")
    assert (found.phase, found.reason, found.message) == ("Pending", reason, words)


CLAIMS = [
    (
        "0/3 nodes are available: 3 cannot allocate all claims. still not schedulable, preemption: 0/3 nodes are available: "
        "3 Preemption is not helpful for scheduling.",
        "Unschedulable",
        "waiting for devices of spec.resources.claims (gpus, nics) on each of 2 nodes: 0 of 3 nodes fit (3 have no such devices free)",
    ),
    (
        "0/3 nodes are available: request gpu: device class gpu.example.com does not exist. no new claims to deallocate, preemption: "
        "0/3 nodes are available: 3 Preemption is not helpful for scheduling.",
        "MissingClaim",
        "DeviceClass gpu.example.com, which spec.resources.claims (gpus, nics) names, does not exist; is the driver of the devices "
        "installed?",
    ),
]


@pytest.mark.parametrize(("message", "reason", "words"), CLAIMS)
def test_devices_of_claims_that_are_not_there(message: str, reason: str, words: str) -> None:
    claims = [{"template": "gpus", "gpus": True}, {"template": "nics"}]
    spec = make.parsed(resources={"nodes": 2, "gpusPerNode": 2, "claims": claims})
    found = waiting((make.pod(unschedulable=message),), spec, make.IMAGE, "")
    assert (found.phase, found.reason, found.message) == ("Pending", reason, words)


CONTAINER = [
    (
        "ImagePullBackOff",
        'Back-off pulling image "trainer:1": ErrImagePull: rpc error: code = NotFound desc = failed to pull and unpack image: not found',
        "cannot pull image trainer:1: the registry has no such image; check spec.image",
    ),
    (
        "ErrImagePull",
        "failed to authorize: failed to fetch oauth token: unexpected status: 401 Unauthorized",
        "cannot pull image trainer:1: the registry refuses access; check the name and spec.imagePullSecrets",
    ),
    (
        "ErrImagePull",
        "dial tcp: lookup registry.example on 10.96.0.10:53: no such host",
        "cannot pull image trainer:1: the registry does not answer from the node",
    ),
    (
        "ImagePullBackOff",
        'Back-off pulling image "trainer:1"',
        'cannot pull image trainer:1: the kubelet tries again (Back-off pulling image "trainer:1")',
    ),
    (
        "ErrImageNeverPull",
        'Container image "trainer:1" is not present with pull policy of Never',
        "cannot pull image trainer:1: it is not on the node and spec.imagePullPolicy is Never",
    ),
    (
        "CreateContainerConfigError",
        'secret "hf" not found',
        "waiting for Secret hf, which spec.env or spec.envFrom names; create it",
    ),
    (
        "CreateContainerConfigError",
        "couldn't find key token in Secret team/hf",
        "Secret hf has no key token, which spec.env names; add it",
    ),
    (
        "CreateContainerConfigError",
        "container has runAsNonRoot and image will run as root (pod: x, container: trainer)",
        "the image runs as root, which trainer pods may not; give it a numeric USER",
    ),
]


@pytest.mark.parametrize(("reason", "message", "words"), CONTAINER)
def test_a_container_that_waits(reason: str, message: str, words: str) -> None:
    pods = (make.pod(waiting=reason, waiting_message=message),)
    found = waiting(pods, make.parsed(), make.IMAGE, "")
    assert (found.phase, found.message) == ("Starting", words)


WEIGHTS = [{"name": "weights", "image": {"reference": "registry.example/qwen:2"}}]
OF_VOLUMES = [
    (
        "ErrImagePull",
        'failed to pull and unpack image "registry.example/qwen:2": failed to resolve reference: registry.example/qwen:2: not found',
        "cannot pull image registry.example/qwen:2 of volume weights: the registry has no such image; check spec.volumes[weights].image",
    ),
    (
        "ErrImageNeverPull",
        'Container image "registry.example/qwen:2" is not present with pull policy of Never',
        "cannot pull image registry.example/qwen:2 of volume weights: it is not on the node and "
        "spec.volumes[weights].image.pullPolicy is Never",
    ),
    (
        "ImagePullBackOff",
        'Back-off pulling image "trainer:1": not found',
        "cannot pull image trainer:1: the registry has no such image; check spec.image",
    ),
    (
        "CreateContainerError",
        'failed to generate container spec: failed to mkdir "": mkdir : no such file or directory',
        'the container cannot start: failed to generate container spec: failed to mkdir "": mkdir : no such file or directory; if '
        "nothing else is wrong there, the node's container runtime does not know volumes of images (weights): they need containerd "
        "2.1 or CRI-O 1.31; use a persistentVolumeClaim, or put the files into spec.image",
    ),
    (
        "CreateContainerConfigError",
        'secret "hf" not found',
        "waiting for Secret hf, which spec.env or spec.envFrom names; create it",
    ),
]


@pytest.mark.parametrize(("reason", "message", "words"), OF_VOLUMES)
def test_a_volume_of_an_image_is_told_from_the_trainers_image(reason: str, message: str, words: str) -> None:
    pods = (make.pod(waiting=reason, waiting_message=message),)
    assert waiting(pods, make.parsed(volumes=WEIGHTS), make.IMAGE, "").message == words


def test_an_image_name_that_is_none_is_fatal() -> None:
    found = waiting((make.pod(waiting="InvalidImageName"),), make.parsed(), "A B", "")
    assert found.fatal
    assert "A B is no valid image name" in found.message


EVENTS = [
    (
        'FailedCreate: Error creating: pods "x-1-0-abcde" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=2, '
        "used: requests.nvidia.com/gpu=7, limited: requests.nvidia.com/gpu=8",
        "Pending",
        "waiting for quota gpus: asked for requests.nvidia.com/gpu=2, in use requests.nvidia.com/gpu=7, limit requests.nvidia.com/gpu=8",
    ),
    (
        'FailedCreate: Error creating: pods "x-1-0-" is forbidden: error looking up service account ns/robot: serviceaccount "robot" not found',
        "Pending",
        "service account robot does not exist; create it or change spec.serviceAccountName",
    ),
    (
        'FailedCreate: Error creating: pods "x-1-0-" is forbidden: no PriorityClass with name high was found',
        "Pending",
        "PriorityClass high does not exist; create it or change spec.priorityClassName",
    ),
    (
        'FailedCreate: Error creating: pods "x-1-0-" is forbidden: pod rejected: RuntimeClass "kata" not found',
        "Pending",
        "RuntimeClass kata does not exist; create it or change spec.runtimeClassName",
    ),
    (
        'FailedResourceClaimCreation: PodResourceClaim device-0: resource claim template "gpus": '
        'resourceclaimtemplate.resource.k8s.io "gpus" not found',
        "Pending",
        "ResourceClaimTemplate gpus does not exist; create it or change spec.resources.claims",
    ),
    (
        'FailedMount: MountVolume.SetUp failed for volume "bundle-0" : configmap "b-0" not found',
        "Starting",
        "waiting for configmap b-0, which the pod mounts",
    ),
    (
        'FailedAttachVolume: Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) y',
        "Starting",
        "a claim is still attached to another node; it is freed when the pods there end",
    ),
]


@pytest.mark.parametrize(("event", "phase", "words"), EVENTS)
def test_warning_events(event: str, phase: str, words: str) -> None:
    found = waiting((), make.parsed(), make.IMAGE, event)
    assert (found.phase, found.message) == (phase, words)


def test_pod_security_is_named() -> None:
    event = (
        'FailedCreate: Error creating: pods "x" is forbidden: violates PodSecurity "restricted:latest": seccompProfile'
    )
    found = waiting((), make.parsed(), make.IMAGE, event)
    assert (found.phase, found.reason) == ("Pending", "PodRefused")


def test_an_ordinary_start_has_no_more_to_say() -> None:
    pods = (make.pod(waiting="ContainerCreating"),)
    assert waiting(pods, make.parsed(), make.IMAGE, "").phase == "Starting"
