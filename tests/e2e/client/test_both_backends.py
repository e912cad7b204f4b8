"""The public API does the same wherever it runs: each test here trains in this process and in a pod."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from e2e.client import shipped
from e2e.client.conftest import Rows
from e2e.client.desk import Desk
from e2e.scene import metrics_of
from nemo_rl.backends.kubernetes.job import Job
from nemo_rl.run.metrics import read_history

BACKENDS = ("local", "kubernetes")
ALGORITHMS = ("grpo", "sft", "dpo")
STEPS = {"grpo": 4, "sft": 3, "dpo": 3}


class Runs:
    """One run of each algorithm on each backend, made when it is first asked for."""

    def __init__(self, tiny: Path, rows: Rows, settings: dict[str, Any]) -> None:
        self.model, self.rows, self.settings = tiny, rows, settings
        self.results: dict[tuple[str, str], nemo_rl.TrainResult] = {}
        self.outputs: dict[tuple[str, str], str] = {}
        self.jobs: dict[str, Job] = {}

    def of(self, algorithm: str, backend: str) -> nemo_rl.TrainResult:
        if (algorithm, backend) not in self.results:
            if backend == "kubernetes":
                self._submit_two(algorithm)
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                found = self.jobs[algorithm].result() if backend == "kubernetes" else self.train(algorithm, backend)
            self.results[algorithm, backend] = found
            self.outputs[algorithm, backend] = output.getvalue()
        return self.results[algorithm, backend]

    def _submit_two(self, algorithm: str) -> None:
        """This one, and the next beside it."""
        place = ALGORITHMS.index(algorithm)
        for each in ALGORITHMS[place : place + 2]:
            self.jobs[each] = self.jobs.get(each) or self.train(each, "kubernetes", wait=False)

    def train(self, algorithm: str, backend: str, **more: Any) -> Any:
        keywords = {**self.settings, "max_steps": STEPS[algorithm], "learning_rate": 1e-3, "seed": 3}
        keywords |= {"output_dir": f"{backend}-{algorithm}", "backend": backend} | self._only(algorithm) | more
        return nemo_rl.train(self.model, self._data(algorithm), algorithm=algorithm, **keywords)

    def _data(self, algorithm: str) -> Rows:
        if algorithm == "sft":
            return [{"prompt": row["prompt"], "completion": row["answer"]} for row in self.rows]
        if algorithm == "dpo":
            return [
                {"prompt": row["prompt"], "chosen": row["answer"], "rejected": row["answer"] + "0"} for row in self.rows
            ]
        return self.rows

    def _only(self, algorithm: str) -> dict[str, Any]:
        if algorithm != "grpo":
            return {}
        return {
            "reward_fn": {"right": shipped.right, "short": shipped.short},
            "reward_weights": {"short": 0.5},
            "max_steps": 9,
            "num_generations_per_prompt": 4,
            "max_new_tokens": 8,
            "validation_dataset": self.rows[:4],
            "eval_every": 2,
            "save_every": 2,
            "callbacks": [shipped.Watch()],
        }


@pytest.fixture(scope="module")
def runs(desk: Desk, tiny: Path, rows: Rows, settings: dict[str, Any]) -> Runs:
    return Runs(tiny, rows, settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_returns_every_step_and_a_checkpoint_that_loads(runs: Runs, algorithm: str, backend: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = runs.of(algorithm, backend)
    assert result.total_steps == STEPS[algorithm]
    start = [0] if algorithm == "grpo" else []  # its validation data are scored before training
    assert [row["step"] for row in result.history] == [*start, *range(1, STEPS[algorithm] + 1)]
    assert result.metrics == result.history[-1]
    assert result.output_dir == Path(f"{backend}-{algorithm}").resolve()
    assert result.checkpoint_path is not None
    assert Path(result.checkpoint_path).resolve().is_relative_to(result.output_dir.resolve())
    assert AutoModelForCausalLM.from_pretrained(result.checkpoint_path).config.hidden_size == 128
    assert AutoTokenizer.from_pretrained(result.checkpoint_path).eos_token == "<|endoftext|>"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_has_a_trainer_that_goes_on_and_a_plot(runs: Runs, backend: str, tmp_path: Path) -> None:
    result = runs.of("sft", backend)
    assert result.trainer.current_step == 3
    result.trainer.save_checkpoint(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").exists()
    result.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "<polyline" in result._repr_html_()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_seed_gives_the_same_metrics_and_the_same_weights(runs: Runs, algorithm: str) -> None:
    here, there = (runs.of(algorithm, backend) for backend in BACKENDS)
    assert here.output_dir is not None and there.output_dir is not None
    assert metrics_of(here.output_dir) == metrics_of(there.output_dir)
    assert here.checkpoint_path is not None and there.checkpoint_path is not None
    weights = [Path(result.checkpoint_path or "", "model.safetensors").read_bytes() for result in (here, there)]
    assert weights[0] == weights[1]


def test_the_same_seed_gives_the_same_completions(runs: Runs) -> None:
    assert runs.of("grpo", "local") and runs.of("grpo", "kubernetes")
    here, there = (read_history(Path(f"{backend}-grpo/completions.jsonl")) for backend in BACKENDS)
    assert here == there != []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_callback_prints_here_and_ends_the_run(runs: Runs, backend: str) -> None:
    result = runs.of("grpo", backend)
    lines = runs.outputs["grpo", backend].splitlines()
    assert [line for line in lines if line.startswith("watched")] == [f"watched step {n} of 9" for n in (1, 2, 3, 4)]
    assert sum(line.startswith("step=") for line in lines) == result.total_steps == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_reward_and_validation_are_in_the_metrics(runs: Runs, backend: str) -> None:
    history = runs.of("grpo", backend).history
    for row in history[1:]:
        assert row["reward"] == pytest.approx(row["reward/right"] + 0.5 * row["reward/short"])
    assert [row["step"] for row in history if row.get("validation_reward") is not None] == [0, 2, 4]


# --- what goes wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"reward_fn": shipped.returns_nothing}, nemo_rl.RewardError, "None"),
        ({"reward_fn": shipped.raises}, nemo_rl.RewardError, "no such key"),
        ({"reward_fn": shipped.names_a_column_that_is_not_there}, TypeError, "truth"),
        ({"reward_fn": None}, ValueError, "reward_fn is required"),
        ({"max_stepz": 3}, TypeError, "max_steps"),
        ({"dataset": [{"colour": "red"}]}, nemo_rl.DatasetError, "colour"),
        ({"model": "./no-such-folder"}, ValueError, "not a folder"),
    ],
    ids=["None", "raises", "column", "no reward", "keyword", "rows", "model"],
)
def test_a_mistake_is_said_before_anything_starts(
    desk: Desk, runs: Runs, more: dict[str, Any], error: type[Exception], words: str, backend: str, tmp_path: Path
) -> None:
    before = len(desk.jobs())
    arguments = {"model": runs.model, "dataset": runs.rows, "reward_fn": shipped.right, "max_steps": 2} | runs.settings
    with pytest.raises(error, match=words):
        nemo_rl.train(**arguments | {"backend": backend, "output_dir": tmp_path} | more)
    assert len(desk.jobs()) == before
    assert read_history(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reward_that_fails_later_raises_here_with_the_users_line(runs: Runs, backend: str) -> None:
    keywords = runs.settings | {"num_generations_per_prompt": 4, "max_new_tokens": 4, "max_steps": 9, "save_every": 1}
    with pytest.raises((nemo_rl.RewardError, nemo_rl.TrainingFailed), match="divides by nothing") as caught:
        nemo_rl.train(
            runs.model, runs.rows, shipped.fails_later(), backend=backend, output_dir=f"{backend}-failing", **keywords
        )
    assert isinstance(caught.value, nemo_rl.TrainingFailed) == (backend == "kubernetes")
    assert "in __call__" in caught.value.traceback
    assert 'raise ZeroDivisionError("this reward divides by nothing")' in caught.value.traceback
    if isinstance(caught.value, nemo_rl.TrainingFailed):
        assert caught.value.step is not None and 1 <= caught.value.step < 9
        assert caught.value.checkpoint is not None and "/checkpoints/step-" in caught.value.checkpoint
        assert caught.value.cause


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reward_that_says_the_same_of_everything_is_warned_about(
    desk: Desk, runs: Runs, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keywords = runs.settings | {"num_generations_per_prompt": 2, "max_new_tokens": 2, "max_steps": 1}
    keywords |= {"wait": False} if backend == "kubernetes" else {}
    nemo_rl.train(
        runs.model, runs.rows, lambda prompt, response: 0.5, backend=backend, output_dir=f"{backend}-flat", **keywords
    )
    assert "the reward gave 0.5" in capsys.readouterr().out
