"""Numbers are those that were measured: absent where nothing was, and at the start and the end of a run where they are wanted."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from nemo_rl.trainers.passes import Passes

PAIRS = [{"prompt": f"{i}=", "chosen": "ab", "rejected": f"c{i % 3}"} for i in range(40)]
TEXTS = [{"prompt": f"{i}=", "completion": "a"} for i in range(20)]


class StopAt(nemo_rl.Callback):
    def __init__(self, step: int, raising: bool = False) -> None:
        self.step, self.raising = step, raising

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        if step == self.step:
            if self.raising:
                raise KeyboardInterrupt
            trainer.should_stop = True


class Terminate(nemo_rl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train(model: str, rows: Any, output: Path, **more: Any) -> Any:
    keywords: dict[str, Any] = dict(max_epochs=9, batch_size=2, backend="local", log_level="error", output_dir=output)
    if more.get("algorithm", "grpo") == "grpo":
        keywords |= dict(num_generations_per_prompt=2, max_new_tokens=4)
    return nemo_rl.train(model, rows, **keywords | more)


def test_validation_is_measured_before_the_first_step_and_after_an_early_stop(tiny_model, tmp_path):
    result = train(
        tiny_model,
        TEXTS,
        tmp_path / "run",
        algorithm="sft",
        max_steps=6,
        callbacks=[StopAt(3)],
        validation_dataset=TEXTS[:4],
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [(line["step"], "validation_loss" in line) for line in lines] == [
        (0, True),
        (1, False),
        (2, False),
        (3, True),
    ]
    assert lines[-1]["validation_loss"] == result.metrics["validation_loss"]
    assert "loss" in lines[-1]


def test_rewards_that_all_failed_give_no_mean_and_no_best(tiny_model, tmp_path):
    def only_answers(prompt: str, response: str, answer: Any = None) -> float:
        return float(len(response)) if answer else 1 / 0

    rows = [{"prompt": f"{i}=", "answer": "a"} for i in range(8)]
    result = train(
        tiny_model, rows, tmp_path / "run", reward_fn=only_answers, max_steps=2, save_every=1, on_reward_error="drop",
        validation_dataset=[{"prompt": "1="}],
    )  # fmt: skip
    assert all("validation_reward" not in row for row in result.history)
    assert result.metrics["validation_reward_errors"] == 1
    assert {"kl", "reward"} & set(result.metrics) == {"reward"}, "no reference model, so no divergence from it"
    state = json.loads((Path(result.checkpoint_path) / "state.json").read_text())
    assert state["metric"] is None


def test_a_step_without_a_reward_has_no_mean(tiny_model, tmp_path):
    def fails(prompt: str, response: str) -> float:
        raise ValueError("never")

    result = train(
        tiny_model, [{"prompt": "1="}] * 4, tmp_path / "run", reward_fn=fails, max_steps=1, on_reward_error="drop"
    )
    assert {"reward", "reward_std", "clip_fraction", "flat_group_fraction"}.isdisjoint(result.metrics)
    assert result.metrics["reward_errors"] == 4


def test_an_unchanged_policy_is_never_clipped(tiny_model, tmp_path):
    result = train(
        tiny_model, [{"prompt": f"{i}="} for i in range(8)], tmp_path / "run", reward_fn=lambda prompt, response: sum(map(ord, response)) % 7,
        max_steps=2, num_iterations=3, learning_rate=1e-12, precision="bf16", clip_low=1e-3, clip_high=1e-3,
    )  # fmt: skip
    assert [row["clip_fraction"] for row in result.history] == [0.0, 0.0]


def test_references_are_computed_for_the_pairs_to_come_and_once(tiny_model, tmp_path, monkeypatch):
    counts: list[int] = []
    inner = Passes.sum_logprobs

    def counted(self: Any, policy: Any, sequences: Any, temperature: float = 1.0) -> Any:
        counts.append(len(sequences))
        return inner(self, policy, sequences, temperature)

    monkeypatch.setattr(Passes, "sum_logprobs", counted)
    keywords = dict(algorithm="dpo", learning_rate=1e-2, save_every=1)
    unbroken = train(tiny_model, PAIRS, tmp_path / "unbroken", max_steps=4, **keywords)
    assert counts == [16], "4 steps of 2 pairs"
    counts.clear()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, PAIRS, tmp_path / "run", max_steps=4, callbacks=[StopAt(3, raising=True)], **keywords)
    assert counts == [16]
    resumed = train(tiny_model, PAIRS, tmp_path / "run", max_steps=4, **keywords)
    assert counts == [16], "shared by the run that goes on"
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in unbroken.history]
    train(tiny_model, PAIRS, tmp_path / "run", max_steps=5, **keywords)
    assert counts == [16, 4], "a longer run computes what is new"


def test_the_first_example_is_shown_at_the_level_debug(tiny_model, tmp_path, capsys):
    train(tiny_model, TEXTS, tmp_path / "run", algorithm="sft", max_steps=1, log_level="debug")
    assert "first example: example (" in capsys.readouterr().out


def test_data_that_ends_long_before_max_steps_is_said_with_the_cure(tiny_model, tmp_path, capsys):
    result = train(
        tiny_model, TEXTS[:2], tmp_path / "run", algorithm="sft", max_steps=50, max_epochs=1, log_level="info"
    )
    assert result.total_steps == 1
    said = "2 rows in batches of 2 over 1 epoch are 1 steps, not max_steps=50; raise max_epochs to train longer"
    assert said in capsys.readouterr().out


def test_a_stop_is_told_by_the_error_alone(tiny_model, tmp_path, capsys):
    with pytest.raises(nemo_rl.TrainingInterrupted, match=r"stopped by SIGTERM; saved step 1 to .* to go on"):
        train(
            tiny_model,
            TEXTS,
            tmp_path / "run",
            algorithm="sft",
            max_steps=3,
            callbacks=[Terminate(1)],
            log_level="info",
        )
    printed = capsys.readouterr()
    assert "stopped by" not in printed.out + printed.err  # nemo-rl and a traceback print the error


def test_a_reward_is_not_ignored_without_a_word(tiny_model, tmp_path):
    trainer = nemo_rl.SFTTrainer.from_pretrained(
        tiny_model, max_steps=1, output_dir=tmp_path / "run", log_level="error"
    )
    with pytest.warns(UserWarning, match="sft uses no reward"):
        trainer.fit(TEXTS, lambda prompt, response: 1.0)


def test_the_folder_of_an_adapter_is_refused_with_the_cure(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ValueError, match=r"PEFT adapter of 'org/base'.*merge_and_unload"):
        train(str(tmp_path), TEXTS, tmp_path / "run", algorithm="sft", max_steps=1)


def test_a_callback_with_hooks_of_another_library_is_told():
    from nemo_rl.trainers.callbacks import validate_callbacks

    class Watch(nemo_rl.Callback):
        def on_evaluate(self, args: Any, **kwargs: Any) -> None: ...

    with pytest.warns(UserWarning, match="on_evaluate, which is never called; the hooks are on_train_begin"):
        validate_callbacks([Watch()])


def test_no_room_for_a_checkpoint_is_one_sentence(tiny_model, tmp_path):
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(OSError, match="no room for the checkpoint of step") as caught:
            train(tiny_model, TEXTS, tmp_path / "run", algorithm="sft", max_steps=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value)
    assert "free" in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoints/.tmp-*"))
