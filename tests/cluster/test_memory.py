"""What jobs and their pods say costs the operator little memory: many inline rows, also when it starts anew, and bombs."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from cluster.api import eventually
from cluster.manifests import result
from cluster.operator_process import Operator
from cluster.scene import Scene

JOBS = int(os.environ.get("NEMO_RL_LARGE_JOBS", "25"))
LIMIT = 250.0
"""MiB, for 200 jobs; by default there are fewer, which are still more than would fit if each were kept."""


def peak(operator: Operator) -> float:
    """MiB of resident memory that the process had at most."""
    text = Path(f"/proc/{operator.pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


@pytest.mark.timeout(900)
def test_jobs_of_a_megabyte_each_fit_into_little_memory(scene: Scene, own_operator: Callable[..., Operator]) -> None:
    rows = [
        {"prompt": f"what is {n} plus {n}, and why is that so, tell me?", "answer": str(2 * n)} for n in range(10_000)
    ]
    operator = own_operator(scene.namespace).start().wait_ready()
    before = peak(operator)
    names = [f"j{number}" for number in range(JOBS)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: scene.submit(name, dataset={"inline": rows}), names))
    eventually(lambda: len(scene.api.list("jobs", scene.namespace)) == JOBS, "all have started", 600)
    pod = scene.attempt(1, names[-1]).run()
    scene.phase("Running", name=names[-1], seconds=120)
    pod.exit(0, result())
    scene.phase("Succeeded", name=names[-1], seconds=120)
    found = peak(operator)
    operator.stop()
    operator.start().wait_ready()
    scene.attempt(1, names[0]).run()
    scene.phase("Running", name=names[0], seconds=120)
    again = peak(operator)
    print(f"peak with {JOBS} jobs of 0.9 MB: {before:.0f} MiB before, {found:.0f} MiB, after a restart {again:.0f} MiB")
    assert max(found, again) < LIMIT
    assert max(found, again) - before < 80, "what one job takes while it is looked at, and not what all take together"


BOMB = 256
"""MiB of zeros, which are 255 kB as gzip."""


def test_progress_that_unpacks_to_much_costs_little_memory(scene: Scene, own_operator: Callable[..., Operator]) -> None:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    content = b"".join(packer.compress(bytes(1 << 20)) for _ in range(BOMB)) + packer.flush()

    def explode(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in (("Encoding", "gzip"), ("Type", "application/json"), ("Length", str(len(content)))):
            handler.send_header(f"Content-{name}", value)
        handler.end_headers()
        handler.wfile.write(content)

    operator = own_operator(scene.namespace).start().wait_ready()
    jobs = [f"j{number}" for number in range(4)]
    for name in jobs:
        scene.submit(name)
    pods = [scene.attempt(1, name).run() for name in jobs]
    for name in jobs:
        scene.phase("Running", name=name)
    before = peak(operator)
    for pod in pods:
        pod.serve(explode)
    for pod in pods:
        eventually(lambda pod=pod: pod.requests >= 3, f"{pod.name} was asked")  # type: ignore[misc]
    for name, pod in zip(jobs, pods, strict=True):
        assert "progress" not in scene.status(name)
        pod.exit(0, result(7))
        assert scene.phase("Succeeded", name=name)["result"]["totalSteps"] == 7
    assert peak(operator) - before < BOMB / 4
