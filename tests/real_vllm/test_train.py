"""Runs of `train()` whose completions a real vLLM server samples."""

from __future__ import annotations

from pathlib import Path

import pytest

import nemo_rl
from unit.trainers.conftest import write_model


def many_a(prompt: str, response: str) -> float:
    return response.count("a") / 8


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("transfer", ["files", "http"])
def test_a_run_learns_and_every_step_has_passed_the_gate(vllm_python: str, tmp_path: Path, transfer: str) -> None:
    result = nemo_rl.train(
        write_model(tmp_path / "model", hidden_size=128),
        [{"prompt": f"{i % 10}={i // 10}"} for i in range(16)],
        many_a,
        output_dir=tmp_path / "out",
        max_steps=12,
        max_epochs=12,
        batch_size=4,
        num_generations_per_prompt=8,
        max_new_tokens=8,
        learning_rate=1e-2,
        rollout={"engine": "vllm", "rollout_python": vllm_python, "weight_transfer": transfer, "timeout_seconds": 1800},
    )
    history = result.history
    assert [record["step"] for record in history] == list(range(1, 13))
    assert all(record["rollout_probe"] <= 1e-4 for record in history)
    assert all(record["weight_sync_seconds"] > 0 for record in history)
    assert history[-1]["reward"] > history[0]["reward"] + 0.3
    assert "Traceback" not in (tmp_path / "out" / "rollout" / "vllm.log").read_text()


def test_an_interpreter_without_vllm_is_said_with_the_cure(tmp_path: Path) -> None:
    import sys

    with pytest.raises(
        ValueError, match=r"has no vLLM; install it there, for example: .* -m pip install 'vllm>=0.30,<0.34'"
    ):
        nemo_rl.train(
            write_model(tmp_path / "model"),
            [{"prompt": "1"}],
            many_a,
            output_dir=tmp_path / "out",
            max_new_tokens=4,
            rollout_python=sys.executable,
        )
