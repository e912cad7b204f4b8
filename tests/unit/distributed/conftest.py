"""Runs of one and of several ranks, as torchrun would start them, and what is compared between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ports import free_port
from unit.trainers.conftest import write_model

PROGRAM = Path(__file__).with_name("ranks.py")
SECONDS = 200
"""Far beyond what any run takes, after which a run counts as hanging: its ranks are ended, and their codes are negative."""


class Launcher:
    """Starts ranks as children of one process that has the engine loaded: a rank costs no import."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[3])
        self.server = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.server.stdout
        assert self.server.stdout.readline() == "ready\n"

    def run(self, size: int, output: Path, seconds: float = SECONDS, **job: Any) -> list[int]:
        """Trains on that many ranks, in the environment that torchrun makes; returns their exit codes, by rank."""
        assert self.server.stdin and self.server.stdout
        job = {"output": str(output), "keywords": {}, "size": size, "port": free_port(), "seconds": seconds, **job}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        codes: list[int] = json.loads(self.server.stdout.readline())
        return codes

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=30)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    started = Launcher()
    yield started
    started.close()


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what may differ between equal runs."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("_seconds", "_per_second"))} for line in lines]


def assert_same_run(found: Path, expected: Path, step: int, tolerance: float = 1e-5) -> None:
    """Weights, metrics and completions."""
    import torch
    from safetensors.torch import load_file

    weights = [load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for run in (found, expected)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[1].items():
        torch.testing.assert_close(
            weights[0][name], weight, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    lines, expected_lines = metrics_of(found), metrics_of(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    for line, expected_line in zip(lines, expected_lines, strict=True):
        assert line == pytest.approx(expected_line, abs=1e-4, rel=1e-4)
    assert completions_of(found) == completions_of(expected)


def completions_of(output: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (output / "completions.jsonl").read_text().splitlines()]
    return [(line["step"], line["prompt"], line["completion"], line["reward"]) for line in lines]


def write_family(folder: Path, tokenizer: str, kind: str, **settings: Any) -> str:
    """Writes a randomly initialised model of a type of transformers beside the characters' tokenizer; returns the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    known = AutoTokenizer.from_pretrained(tokenizer)
    known.save_pretrained(folder)
    small = {"vocab_size": len(known), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **small, bos_token_id=None, **settings)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("tiny-model"))
