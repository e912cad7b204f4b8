"""Rollout replicas with real vLLM in real pods: what the resource says of them, and that they train as well as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.manifests import demo
from e2e.scene import Scene
from nemo_rl.run.metrics import read_history
from replicas.conftest import HELD_OUT, RUN_SECONDS, START_SECONDS, Job, ready, replicas_of

STEPS = 30


def wide(place: Scene, name: str) -> dict[str, str]:
    """A line of kubectl get -o wide, by its columns."""
    head, line = place.kubectl("get", "rlj", name, "-o", "wide").splitlines()
    starts = [i for i, c in enumerate(head) if c != " " and (i == 0 or head[i - 1] == " ")]
    return {head[a:b].strip(): line[a:b].strip() for a, b in zip(starts, [*starts[1:], len(line) + 1], strict=True)}


def trained(place: Scene, name: str, folder: Path) -> float:
    """Accuracy of what a finished job has trained, on held-out prompts; each of its steps is once in the history."""
    place.jobs[-1].phase("Succeeded", seconds=RUN_SECONDS)
    run = place.jobs[-1].read_output(folder)
    history = read_history(run / "metrics.jsonl")
    assert [record["step"] for record in history if "loss" in record] == list(range(1, STEPS + 1))
    return float(demo().accuracy(str(sorted((run / "checkpoints").glob("step-*"))[-1]), HELD_OUT))


def test_the_example_trains_as_well_as_one_process_does(place: Scene, job: Job, taught: Path, tmp_path: Path) -> None:
    before = demo().accuracy(str(taught), HELD_OUT)
    running = place.apply(job("squares", steps=STEPS))
    running.until(lambda status: ready(status, 2), "two ready replicas", START_SECONDS)
    status = running.until(lambda s: s["bottleneck"] and s["progress"]["step"] >= 5, "a bottleneck", RUN_SECONDS)
    assert [member["name"] for member in status["rollout"]["members"]] == ["squares-rollout-0", "squares-rollout-1"]
    columns = wide(place, "squares")
    print(columns)
    assert columns["REPLICAS"] == "2/2" and columns["WAITS-FOR"] in ("Rollout", "Reward", "Training", "WeightSync")
    told = running.until(
        lambda s: all(m["weightVersion"] >= 5 and m["tokensPerSecond"] > 0 for m in s["rollout"]["members"]),
        "what both do",
        RUN_SECONDS,
    )
    assert told["rollout"]["weightVersion"] <= told["progress"]["step"] + 1
    with_replicas = trained(place, "squares", tmp_path / "squares")
    assert not [pod for pod in replicas_of(place, "squares") if "deletionTimestamp" not in pod["metadata"]]
    place.apply(job("alone", steps=STEPS, rollout=None))
    alone = trained(place, "alone", tmp_path / "alone")
    print(f"accuracy: {before:.3f} before, {with_replicas:.3f} with replicas, {alone:.3f} in process")
    assert with_replicas >= before + 0.05 and alone >= before + 0.05
    assert with_replicas == pytest.approx(alone, abs=0.1)
