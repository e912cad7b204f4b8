"""A job whose pod cannot start says what it waits for, in words, and starts when it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from e2e.kubectl import Kubectl, eventually
from e2e.scene import SECONDS, Scene

GPU = "nvidia.com/gpu"
IMAGE = "localhost/no-such-image:1"
Advertise = Callable[[int], None]


def gpus() -> dict[str, int]:
    """What each node offers."""
    nodes = Kubectl().items("nodes")
    return {node["metadata"]["name"]: int(node["status"]["allocatable"].get(GPU, 0)) for node in nodes}


@pytest.fixture
def advertise() -> Iterator[Advertise]:
    """Makes the first node offer GPUs, as a device plugin would; afterwards it offers as many as before."""
    node, before = next(iter(sorted(gpus().items())))
    path = "/status/capacity/" + GPU.replace("/", "~1")

    def patch(count: int) -> None:
        change = json.dumps([{"op": "add", "path": path, "value": str(count)}])
        Kubectl()("patch", "node", node, "--subresource=status", "--type=json", "-p", change)
        eventually(lambda: gpus()[node] == count, f"{node} offers {count} {GPU}", SECONDS)

    yield patch
    patch(before)


def test_an_unknown_image_is_named_with_what_keeps_it_away(scene: Scene):
    job = scene.apply(scene.manifests.sft("imageless", steps=1, image=IMAGE))
    status = job.message(f"cannot pull image {IMAGE}: ")
    assert (status["phase"], status["reason"]) == ("Starting", "ImagePull")


def test_a_job_waits_in_words_for_gpus_and_its_pod_gets_them_when_they_come(scene: Scene, advertise: Advertise):
    wanted = max(gpus().values()) + 1
    job = scene.apply(scene.manifests.sft("wishful", steps=1, resources={"gpusPerNode": wanted}))
    status = job.message(f"waiting for {wanted} × {GPU}: 0 of ")
    assert (status["phase"], status["reason"], status["gpus"]) == ("Pending", "Unschedulable", wanted)
    advertise(wanted)
    job.phase("Running", "Succeeded")
    resources = job.pod()["spec"]["containers"][0]["resources"]
    assert resources["limits"][GPU] == resources["requests"][GPU] == str(wanted)
