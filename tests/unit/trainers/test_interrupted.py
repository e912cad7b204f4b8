"""A run that a signal stops at a chosen point, above all after the weights of a step moved, goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nemo_rl
from nemo_rl.errors import TrainingInterrupted

ROWS = {
    "grpo": [{"prompt": f"{i}="} for i in range(10, 22)],
    "sft": [{"prompt": f"{i}=", "completion": f"{i % 10}a"} for i in range(10, 22)],
    "dpo": [{"prompt": f"{i}=", "chosen": "ab", "rejected": f"c{i % 3}"} for i in range(10, 22)],
}
ALGORITHMS = list(ROWS)
STEPS = 5
"""Three steps are an epoch."""


def share_of_a(prompt: str, response: str) -> float:
    return response.count("a") / 6


class Recorder(nemo_rl.Callback):
    """Remembers the hooks that were called, also across resumes; can stop the run after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[list[Any]] = []
        self.stop_after = stop_after

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        self.calls.append(["epoch_begin", epoch])

    def on_step_begin(self, trainer: Any, step: int) -> None:
        self.calls.append(["step_begin", step])

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        self.calls.append(["step_end", step, "validated" if any("validation" in name for name in metrics) else ""])
        if step == self.stop_after:
            trainer.should_stop = True

    def on_epoch_end(self, trainer: Any, epoch: int, metrics: dict[str, Any]) -> None:
        self.calls.append(["epoch_end", epoch])

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class Terminate(nemo_rl.Callback):
    """Sends SIGTERM to this process: in the evaluation of a step, or before a step begins."""

    def __init__(self, *, in_evaluation_of: int | None = None, before: int | None = None) -> None:
        self.in_evaluation_of, self.before = in_evaluation_of, before

    def on_train_begin(self, trainer: Any) -> None:
        evaluate = trainer.evaluate

        def terminated(validation: Any) -> Any:
            if trainer.current_step == self.in_evaluation_of:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(validation)

        trainer.evaluate = terminated

    def on_step_begin(self, trainer: Any, step: int) -> None:
        if step == self.before:
            os.kill(os.getpid(), signal.SIGTERM)


class Runs:
    """Runs of one algorithm with the same settings, and what came of them."""

    def __init__(self, algorithm: str, model: str, **keywords: Any) -> None:
        self.algorithm, self.model, self.rows = algorithm, model, ROWS[algorithm]
        self.more_callbacks: Callable[[], list[Any]] = list
        self.keywords = {"max_steps": STEPS, "max_epochs": 9, "batch_size": 4, "learning_rate": 1e-2, "save_every": 3}
        if algorithm == "grpo":
            self.keywords |= {"num_generations_per_prompt": 4, "max_new_tokens": 6, "logged_completions": 4}
        self.keywords |= {"validation_dataset": ROWS[algorithm][:4], **keywords}
        self.calls: list[list[Any]] = []

    def run(self, output: Path, terminate: Terminate | None = None, stop_after: int | None = None) -> Any:
        recorder = Recorder(stop_after)
        try:
            return nemo_rl.train(
                self.model,
                self.rows,
                share_of_a if self.algorithm == "grpo" else None,
                algorithm=self.algorithm,
                callbacks=[recorder, terminate or Terminate(), *self.more_callbacks()],
                output_dir=output,
                backend="local",
                log_level="warning",
                **self.keywords,
            )
        finally:
            self.calls = recorder.calls

    def stopped(self, output: Path, terminate: Terminate, stop_after: int | None = None) -> TrainingInterrupted:
        with pytest.raises(TrainingInterrupted) as raised:
            self.run(output, terminate, stop_after)
        return raised.value

    def outcome(self, result: Any, output: Path) -> dict[str, Any]:
        """All that must be equal."""
        timed = ("_seconds", "_per_second")
        completions = (output / "completions.jsonl").read_text()
        return {
            "weights": torch.cat([p.detach().flatten() for p in result.trainer.model.parameters()]).tolist(),
            "history": [{k: v for k, v in line.items() if not k.endswith(timed)} for line in result.history],
            "metrics": {k: v for k, v in result.metrics.items() if not k.endswith(timed)},
            "completions": [json.loads(line) for line in completions.splitlines()],
            "calls": self.calls,
            "best": Path(result.checkpoint_path).name,
            "steps": result.total_steps,
        }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_that_is_stopped_in_its_evaluation_is_finished_by_the_next_run(
    algorithm: str, tiny_model: str, tmp_path: Path
) -> None:
    runs = Runs(algorithm, tiny_model)
    expected = runs.outcome(runs.run(tmp_path / "unbroken"), tmp_path / "unbroken")
    output = tmp_path / "broken"
    for _ in range(2):  # the next run may be stopped at the same point again
        stopped = runs.stopped(output, Terminate(in_evaluation_of=3))
        assert stopped.step == 3
        assert (stopped.checkpoint_path or "").endswith("step-00000003")
        state = json.loads((output / "checkpoints" / "step-00000003" / "state.json").read_text())
        assert state["metric"] is None, "it was not measured"
        lines = (output / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert runs.outcome(runs.run(output), output) == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_a_callback_ended_and_a_signal_stopped_in_its_last_evaluation_ends_there(
    algorithm: str, tiny_model: str, tmp_path: Path
) -> None:
    runs = Runs(algorithm, tiny_model)
    expected = runs.outcome(runs.run(tmp_path / "unbroken", stop_after=4), tmp_path / "unbroken")
    assert expected["steps"] == 4
    assert any("validation" in name for name in expected["metrics"]), "the last checkpoint is measured"
    output = tmp_path / "broken"
    assert runs.stopped(output, Terminate(in_evaluation_of=4), stop_after=4).step == 4
    assert runs.outcome(runs.run(output, stop_after=4), output) == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_stop_between_checkpoints_changes_neither_the_best_one_nor_what_callbacks_see(
    algorithm: str, tiny_model: str, tmp_path: Path
) -> None:
    runs = Runs(algorithm, tiny_model, validation_dataset=None, save_every=2)
    expected = runs.outcome(runs.run(tmp_path / "unbroken"), tmp_path / "unbroken")
    output = tmp_path / "broken"
    assert runs.stopped(output, Terminate(before=4)).step == 3
    assert runs.stopped(output, Terminate(before=4)).step == 3
    assert runs.outcome(runs.run(output), output) == expected
    metrics = {
        path.parent.name: json.loads(path.read_text())["metric"]
        for path in output.glob("checkpoints/step-*/state.json")
    }
    unbroken = {
        path.parent.name: json.loads(path.read_text())["metric"]
        for path in (tmp_path / "unbroken").glob("checkpoints/step-*/state.json")
    }
    assert metrics.items() >= unbroken.items()


@pytest.mark.parametrize("keywords", [{"in_evaluation_of": 3}, {"before": 3}])
def test_adapters_and_their_reference_go_on(keywords: dict[str, int], tiny_model: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    runs = Runs("grpo", tiny_model, lora_rank=2, beta=0.1, num_iterations=2)
    expected = runs.outcome(runs.run(tmp_path / "unbroken"), tmp_path / "unbroken")
    output = tmp_path / "broken"
    runs.stopped(output, Terminate(**keywords))
    assert runs.outcome(runs.run(output), output) == expected


class Split(nemo_rl.DataModule):
    """Rows of its own to train and to validate on."""

    def train_rows(self) -> list[dict[str, str]]:
        return ROWS["sft"]

    def validation_rows(self) -> list[dict[str, str]]:
        return [{"prompt": "1=", "completion": "c"}]  # gets worse as training goes on


def test_a_data_module_and_early_stopping_go_on_where_they_were(tiny_model: str, tmp_path: Path) -> None:
    runs = Runs("sft", tiny_model, validation_dataset=None, max_steps=9, eval_every=1, learning_rate=3e-2)
    runs.rows = Split()  # type: ignore[assignment]
    runs.more_callbacks = lambda: [nemo_rl.EarlyStoppingCallback("validation_loss", patience=3)]
    expected = runs.outcome(runs.run(tmp_path / "unbroken"), tmp_path / "unbroken")
    assert 3 < expected["steps"] < 9, "it stopped early"
    output = tmp_path / "broken"
    runs.stopped(output, Terminate(in_evaluation_of=expected["steps"] - 2))
    runs.stopped(output, Terminate(before=expected["steps"]))
    assert runs.outcome(runs.run(output), output) == expected


def test_a_run_that_ended_early_and_was_killed_before_it_said_so_does_not_go_on(
    tiny_model: str, tmp_path: Path
) -> None:
    class DiesAtTheEnd(Terminate):
        def on_train_end(self, trainer: Any, result: Any) -> None:
            raise ConnectionError("the node is gone")

    runs = Runs("sft", tiny_model)
    expected = runs.outcome(runs.run(tmp_path / "unbroken", stop_after=3), tmp_path / "unbroken")
    output = tmp_path / "broken"
    with pytest.raises(ConnectionError):
        runs.run(output, DiesAtTheEnd(), stop_after=3)
    assert runs.outcome(runs.run(output), output) == expected


def test_a_trainer_that_was_stopped_early_trains_again_when_it_is_asked_to(tiny_model: str, tmp_path: Path) -> None:
    trainer = nemo_rl.SFTTrainer.from_pretrained(
        tiny_model, output_dir=tmp_path / "run", max_steps=3, batch_size=4, log_level="warning"
    )
    assert trainer.fit(ROWS["sft"], callbacks=[Recorder(stop_after=2)]).total_steps == 2
    assert trainer.fit(ROWS["sft"]).total_steps == 3


def test_what_a_callback_adds_to_the_metrics_is_in_the_result_and_in_no_checkpoints_way(
    tiny_model: str, tmp_path: Path
) -> None:
    class Adds(nemo_rl.Callback):
        def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
            metrics["mine"] = torch.tensor(float(step))

    runs = Runs("sft", tiny_model, validation_dataset=None)
    runs.more_callbacks = lambda: [Adds()]
    runs.stopped(tmp_path, Terminate(before=3))
    assert runs.run(tmp_path).metrics["mine"] == STEPS
