"""Runs as training writes them, made by hand: for what a test says of the page, not of training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def run(
    folder: Path,
    *,
    steps: int = 20,
    total_steps: int = 20,
    finished: bool = True,
    algorithm: str = "grpo",
    model: str = "Qwen/Qwen2.5-0.5B",
    completion: str = "4",
    prompt: str = "2+2=",
    **metrics: float,
) -> Path:
    """The folder of a run with run.json, metrics.jsonl and completions.jsonl."""
    folder.mkdir(parents=True)
    settings = {"model": {"name": model}, "algorithm": algorithm, "learning_rate": 1e-6, "seed": 0}
    record: dict[str, Any] = {
        "format": 2,
        "status": "finished" if finished else "unfinished",
        "sha256": "",
        "started": "2026-11-01T10:00:00+00:00",
        "total_steps": total_steps,
        "first_total_steps": total_steps,
        "kept": [],
        "settings": settings,
    }
    (folder / "run.json").write_text(json.dumps(record))
    write_steps(folder, range(1, steps + 1), **metrics)
    sample = {"step": steps, "prompt": prompt, "completion": completion, "reward": 0.5}
    (folder / "completions.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def write_steps(folder: Path, steps: range, **metrics: float) -> None:
    """Appends these steps to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as stream:
        for step in steps:
            row = {"step": step, "reward": 1 - math.exp(-step / 10), "loss": 0.1 / step, "step_seconds": 2.0} | metrics
            stream.write(json.dumps(row) + "\n")
