"""A run that is killed at any moment and started again equals an unbroken one, bit for bit."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from pathlib import Path

import pytest

from forked import ForkServer

KILLS = {"grpo": 12, "sft": 5, "dpo": 5}
"""Kill points of each algorithm: 22 in all."""
STEPS = 12

SOURCE = """
import os
import torch, torch.distributed.checkpoint, datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2TokenizerFast
import nemo_rl.trainers.grpo, nemo_rl.trainers.sft, nemo_rl.trainers.dpo, nemo_rl.api.training
from nemo_rl.errors import TrainingInterrupted

def count_a(prompt, response):
    return response.count("a") / 6

def run(algorithm, model, output):
    torch.set_num_threads(1)
    import nemo_rl
    rows = [{"prompt": f"{i}=", "completion": f"{i % 10}a", "chosen": "ab", "rejected": f"c{i % 3}"} for i in range(10, 30)]
    keep = {"grpo": ("prompt",), "sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}[algorithm]
    rows = [{name: row[name] for name in keep} for row in rows]
    extra = dict(num_generations_per_prompt=4, max_new_tokens=6, logged_completions=8) if algorithm == "grpo" else {}
    try:
        nemo_rl.train(model, rows, count_a if algorithm == "grpo" else None, algorithm=algorithm, max_steps=STEPS, max_epochs=9,
                      batch_size=4, learning_rate=1e-2, save_every=3, seed=7, output_dir=output, backend="local",
                      log_level="warning", validation_dataset=rows[:4], **extra)
    except TrainingInterrupted:
        os._exit(75)
    os._exit(0)
""".replace("STEPS", str(STEPS))


@pytest.fixture(scope="module")
def runs():
    started = ForkServer(SOURCE)
    yield started
    started.close()


def finished(output: Path) -> bool:
    """Whether the run was complete, and only its process had not ended yet."""
    record = output / "run.json"
    return record.exists() and json.loads(record.read_text())["status"] == "finished"


def outcome(output: Path) -> dict[str, object]:
    """What must be equal: weights, metrics but for times, and completions."""
    final = output / "checkpoints" / f"step-{STEPS:08d}"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = ("_seconds", "_per_second")
    return {
        "weights": hashlib.sha256((final / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines],
        "completions": (output / "completions.jsonl").read_text(),
        "best": (output / "checkpoints" / "best").resolve().name,
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("algorithm", list(KILLS))
def test_killed_runs_equal_an_unbroken_one(algorithm: str, runs: ForkServer, tiny_model: str, tmp_path: Path) -> None:
    draw = random.Random(algorithm)
    begin = time.monotonic()
    assert runs.run(algorithm, tiny_model, str(tmp_path / "unbroken")) == 0
    seconds = time.monotonic() - begin
    expected = outcome(tmp_path / "unbroken")
    assert [line["step"] for line in expected["metrics"]] == list(range(STEPS + 1)), "0 is the measurement of the start"
    codes = []
    output = tmp_path / "broken"
    while len(codes) < KILLS[algorithm]:
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        moment = draw.uniform(0.1, 0.9) * seconds
        code = runs.run(algorithm, tiny_model, str(output), kill_after=moment, number=number)
        if code == 0 or finished(output):  # it was done before the kill: compare, and go on with a fresh run
            assert outcome(output) == expected
            output = tmp_path / f"broken-{len(codes)}-{time.monotonic_ns()}"
            seconds *= 0.9  # where other work has left the machine since, runs are shorter now
            continue
        assert code in (-signal.SIGKILL, -signal.SIGTERM, 75)
        codes.append(code)
    assert runs.run(algorithm, tiny_model, str(output)) == 0
    assert outcome(output) == expected
    assert -signal.SIGKILL in codes
    assert not list(tmp_path.glob("broken*-2")), "a run that should have gone on was started anew"
