"""Jobs with as many inline rows as the API server takes cost the operator little memory, also when it starts anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
