"""Real training through the front doors: a tiny model, every algorithm, the command line and a resumed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import nemo_rl
from nemo_rl.cli.main import app
from nemo_rl.job.names import ExitCode

PROMPTS = [{"prompt": f"{i} +", "answer": "y"} for i in range(8)]
TEXTS = [{"prompt": f"{i} +", "completion": "a"} for i in range(8)]
PAIRS = [{"prompt": f"{i} +", "chosen": "yes", "rejected": "no"} for i in range(8)]


@pytest.fixture(autouse=True)
def quiet_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMO_RL_BACKEND", "local")


def says_yes(prompt: str, response: str, answer: str) -> float:
    return float(response.startswith(answer))


def _train(model: Path, algorithm: str, **changed: Any) -> nemo_rl.TrainResult:
    data = {"grpo": PROMPTS, "sft": TEXTS, "dpo": PAIRS}[algorithm]
    keywords: dict[str, Any] = {
        "max_steps": 3,
        "max_epochs": 10,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "log_level": "error",
    }
    if algorithm == "grpo":
        keywords |= {"reward_fn": says_yes, "num_generations_per_prompt": 4, "max_new_tokens": 4}
    return nemo_rl.train(model, data, algorithm=algorithm, **{**keywords, **changed})


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_a_run_returns_a_loadable_checkpoint_and_every_step(tiny_model: Path, algorithm: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = _train(tiny_model, algorithm)
    assert result.total_steps == 3
    assert [row["step"] for row in result.history] == [1, 2, 3]
    assert result.metrics["loss"] == pytest.approx(result.history[-1]["loss"])
    assert result.checkpoint_path is not None
    assert Path(result.checkpoint_path).resolve().is_relative_to(Path("outputs/tiny").resolve())
    assert AutoModelForCausalLM.from_pretrained(result.checkpoint_path).config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(result.checkpoint_path).eos_token == "<eos>"
    assert result.trainer.current_step == 3


def test_grpo_raises_its_reward(tiny_model: Path):
    result = _train(tiny_model, "grpo", max_steps=30, num_generations_per_prompt=8)
    first, last = result.history[:5], result.history[-5:]
    assert sum(row["reward"] for row in last) > sum(row["reward"] for row in first) + 1.0


def test_equal_calls_give_equal_runs(tiny_model: Path):
    runs = [_train(tiny_model, "grpo", output_dir=folder).history for folder in ("a", "b")]
    for left, right in zip(*runs, strict=True):
        same = [name for name in left if not name.endswith(("_seconds", "_per_second"))]
        assert {name: left[name] for name in same} == {name: right[name] for name in same}


def test_a_live_model_is_trained_in_place(tiny_model: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = model.get_input_embeddings().weight.detach().clone()
    _train(model, "sft", tokenizer=AutoTokenizer.from_pretrained(tiny_model), output_dir="live")
    assert not before.equal(model.get_input_embeddings().weight)


def test_the_next_run_begins_beside_a_finished_one(tiny_model: Path):
    first = _train(tiny_model, "sft")
    second = _train(tiny_model, "sft")
    assert [Path(r.output_dir).name for r in (first, second)] == ["tiny", "tiny-2"]
    assert first.history == json.loads(json.dumps(first.history))


def test_a_callback_ends_the_run(tiny_model: Path):
    class Stop(nemo_rl.Callback):
        def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
            trainer.should_stop = step == 2

    assert _train(tiny_model, "sft", callbacks=[Stop()]).total_steps == 2


def test_a_reward_that_raises_ends_the_run_with_its_traceback(tiny_model: Path):
    def broken(prompt: str, response: str) -> float:
        raise KeyError("no such thing")

    with pytest.raises(nemo_rl.RewardError) as caught:
        _train(tiny_model, "grpo", reward_fn=broken)
    assert "no such thing" in caught.value.traceback


def test_data_of_the_wrong_shape_is_refused_with_its_columns(tiny_model: Path):
    with pytest.raises(nemo_rl.DatasetError, match="'colour'"):
        nemo_rl.train(tiny_model, [{"colour": "red"}], algorithm="dpo", log_level="error")


def test_a_trainer_made_by_name_fits(tiny_model: Path):
    from nemo_rl.api import create_trainer

    trainer = create_trainer(
        "SFT", model=str(tiny_model), max_steps=2, batch_size=2, log_level="error", output_dir="made"
    )
    assert trainer.fit(TEXTS).total_steps == 2


# --- the command line


def _job(folder: Path, model: Path, **training: Any) -> Path:
    spec = {
        "model": str(model),
        "dataset": {"path": "rows.jsonl"},
        "reward": {"function": "my_reward_module:says_yes"},
        "training": {"maxSteps": 3, "maxEpochs": 1000, "batchSize": 4, "learningRate": 0.01, **training},
        "grpo": {"numGenerationsPerPrompt": 4, "maxNewTokens": 4},
        "callbacks": [{"function": "my_reward_module:Printing"}],
    }
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (folder / "my_reward_module.py").write_text(
        "def says_yes(prompt, response, answer):\n    return float(response.startswith(answer))\n"
        "class Printing:\n    def on_step_end(self, trainer, step, metrics):\n        print('SEEN', step, flush=True)\n"
    )
    job = {"apiVersion": "nemo-rl.io/v1alpha1", "kind": "RLTrainingJob", "metadata": {"name": "yes"}, "spec": spec}
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`nemo-rl train` in this process, whose modules and path are as before when the test ends."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_reward_module", None)
    yield lambda *arguments: CliRunner().invoke(app, ["train", *arguments])
    sys.modules.pop("my_reward_module", None)


def test_a_job_file_trains_with_its_own_reward_and_callback(tiny_model: Path, tmp_path: Path, command_line: Any):
    _job(tmp_path, tiny_model)
    result = command_line("job.yaml", "--set", "training.maxSteps=2")
    assert result.exit_code == 0, result.stderr
    assert "SEEN 2" in result.stdout
    assert "SEEN 3" not in result.stdout
    assert "done after 2 steps" in result.stdout
    assert len((tmp_path / "outputs/yes/metrics.jsonl").read_text().splitlines()) == 2


def test_a_broken_reward_of_a_job_ends_with_40_and_its_own_traceback(
    tiny_model: Path, tmp_path: Path, command_line: Any
):
    _job(tmp_path, tiny_model)
    (tmp_path / "my_reward_module.py").write_text(
        "def says_yes(prompt, response):\n    return 1 / 0\n"
        "class Printing:\n    def on_train_begin(self, trainer): ...\n"
    )
    result = command_line("job.yaml")
    assert result.exit_code == ExitCode.USER_ERROR
    assert "return 1 / 0" in result.stderr
    assert "nemo_rl/trainers" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, ExitCode.PREEMPTED), (signal.SIGINT, 130)])
def test_a_stopped_job_saves_and_goes_on(
    tiny_model: Path, tmp_path: Path, sent: signal.Signals, code: int, command_line: Any
):
    _job(tmp_path, tiny_model, maxSteps=100000, saveEvery=None)
    command = [sys.executable, "-m", "nemo_rl.cli.main", "train", "job.yaml"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        try:
            assert any(line.startswith("SEEN 2") for line in process.stdout), "it ended by itself"
            process.send_signal(sent)
            process.stdout.read()
            assert process.wait() == code
        finally:
            process.kill()
    metrics = tmp_path / "outputs/yes/metrics.jsonl"
    saved = len(metrics.read_text().splitlines())
    assert saved >= 2
    # The number of steps is a setting, and other settings are another run: so a callback ends the one that goes on.
    module = tmp_path / "my_reward_module.py"
    module.write_text(module.read_text() + f"        trainer.should_stop = step >= {saved + 2}\n")
    again = command_line("job.yaml")
    assert again.exit_code == 0, again.stderr
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, saved + 3))
