"""How long it takes from `kubectl apply` to the first training step, and where the time goes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from e2e.kubectl import Lines, Object, Watch, eventually
from e2e.scene import SECONDS, Scene
from nemo_rl.job import names

TRIES = 3
OVERHEAD_SECONDS = 3.0
"""All but imports and training: what operator, scheduler and kubelet take, and loading the model."""
TOTAL_SECONDS = 20.0


def first_seen(watch: Watch, check: Callable[[Object], bool]) -> float | None:
    """When the first object came that the check holds for."""
    for when, found in list(watch.states):
        if check(found):
            return when
    return None


def running(pod: Object) -> bool:
    return any("running" in status["state"] for status in pod["status"].get("containerStatuses", []))


def measure(scene: Scene, name: str) -> dict[str, float]:
    """Seconds of each phase of a start, in order; their sum is `total`."""
    selector = f"{names.LABEL_JOB}={name}"
    jobs, pods = Watch(scene.kubectl, "jobs", "-l", selector), Watch(scene.kubectl, "pods", "-l", selector)
    scene.kubectl("get", "jobs,pods")  # in the meantime both watches are there
    began = time.monotonic()
    job = scene.apply(scene.manifests.grpo(name, steps=1))
    pods.until(lambda: first_seen(pods, running), SECONDS)
    log = Lines(scene.kubectl, "logs", "--follow", job.pod()["metadata"]["name"])
    eventually(lambda: "phase imports=" in "\n".join(log.text), "the first step in the log", SECONDS)
    log.close()
    times = [
        ("operator", first_seen(jobs, lambda found: True)),
        ("pod", first_seen(pods, lambda found: True)),
        ("scheduling", first_seen(pods, lambda pod: "nodeName" in pod["spec"])),
        ("container", first_seen(pods, running)),
    ]
    step = next(when for when, line in log.found if line.startswith("step=1/"))
    found, last = {}, began
    for phase, when in times:
        assert when is not None, f"{phase} was not seen"
        found[phase], last = when - last, when
    inside = next(line for line in log.text if line.startswith("phase imports="))
    parts = {word: float(seconds) for word, seconds in re.findall(r"(\w+)=([\d.]+)", inside)}
    found |= parts
    found["rest"] = step - last - sum(parts.values())
    found["total"] = step - began
    jobs.close()
    pods.close()
    return found


def overhead(found: dict[str, float]) -> float:
    return found["total"] - found["imports"] - found["first_step"]


def crowding() -> float:
    """Seconds that pass while a process computes for one: 1 where it has a core for itself."""
    wall, cpu = time.monotonic(), time.process_time()
    while time.process_time() - cpu < 0.5:
        sum(range(1000))
    return max(1.0, (time.monotonic() - wall) / 0.5)


def test_a_job_takes_its_first_step_within_seconds(scene: Scene, capsys: pytest.CaptureFixture[str]):
    for number in range(TRIES):
        before = crowding()
        found = measure(scene, f"start-{number}")
        crowded = max(before, crowding())  # whoever shares the machine makes all of it slower
        with capsys.disabled():
            words = " ".join(f"{phase}={seconds:.2f}" for phase, seconds in found.items())
            print(f"\nfrom apply to the first step: {words} (machine shared by {crowded:.1f})")
        if overhead(found) < OVERHEAD_SECONDS * crowded and found["total"] < TOTAL_SECONDS * crowded:
            return
    assert overhead(found) < OVERHEAD_SECONDS * crowded, found
    assert found["total"] < TOTAL_SECONDS * crowded, found
