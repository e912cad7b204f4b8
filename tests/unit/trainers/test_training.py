"""What training does: models learn, runs repeat, callbacks see it, rewards may fail, the best checkpoint is kept."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import nemo_rl
from nemo_rl.errors import RewardError, TrainingInterrupted
from nemo_rl.trainers import base

QUIET: dict[str, Any] = {"backend": "local", "log_level": "warning"}
PROMPTS = [{"prompt": f"{i}="} for i in range(10, 26)]
SHORT_GRPO: dict[str, Any] = {
    "batch_size": 4,
    "num_generations_per_prompt": 4,
    "max_new_tokens": 6,
    "learning_rate": 1e-3,
}


def share_of_a(prompt: str, response: str) -> float:
    return response.count("a") / 6


def weights(result: nemo_rl.TrainResult) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in result.trainer.model.parameters()])


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in history]


def test_grpo_learns_to_emit_a_wanted_token(tiny_model: str, tmp_path: Path) -> None:
    result = nemo_rl.train(
        tiny_model,
        PROMPTS,
        share_of_a,
        max_steps=40,
        max_epochs=40,
        batch_size=8,
        num_generations_per_prompt=8,
        max_new_tokens=6,
        learning_rate=1e-2,
        output_dir=tmp_path,
        **QUIET,
    )
    assert result.history[0]["reward"] < 0.3
    assert result.history[-1]["reward"] > 0.9


def test_each_thing_that_takes_a_while_before_the_first_step_is_called_by_its_name(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    begin = nemo_rl.SFTTrainer.begin_phase

    def recording(trainer: nemo_rl.SFTTrainer, name: str, *arguments: Any) -> Any:
        phases.append(name)
        return begin(trainer, name, *arguments)

    def load_tokenizer(*arguments: Any) -> Any:
        assert phases == ["loading the tokenizer"]
        return real(*arguments)

    real = base.load_tokenizer
    monkeypatch.setattr(nemo_rl.SFTTrainer, "begin_phase", recording)
    monkeypatch.setattr(base, "load_tokenizer", load_tokenizer)
    pairs = [{"prompt": "1=", "completion": "2"}]
    nemo_rl.train(tiny_model, pairs, algorithm="sft", max_steps=1, output_dir=tmp_path, **QUIET)
    assert phases[1:4] == ["reading the data", "loading the model", "getting ready"]


def test_sft_memorises_sixteen_pairs(tiny_model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}=", "completion": f"{i * 7 % 100}"} for i in range(16)]
    result = nemo_rl.train(
        tiny_model,
        rows,
        algorithm="sft",
        max_steps=150,
        max_epochs=150,
        batch_size=16,
        learning_rate=1e-2,
        output_dir=tmp_path,
        **QUIET,
    )
    assert result.metrics["loss"] < 0.1


def test_dpo_separates_all_pairs(tiny_model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}=", "chosen": "ab", "rejected": f"c{i % 5}"} for i in range(32)]
    result = nemo_rl.train(
        tiny_model,
        rows,
        algorithm="dpo",
        max_steps=20,
        max_epochs=20,
        batch_size=32,
        learning_rate=1e-3,
        output_dir=tmp_path,
        **QUIET,
    )
    assert result.history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert result.metrics["preference_accuracy"] == 1.0


def test_equal_seeds_give_equal_runs_and_other_seeds_do_not(tiny_model: str, tmp_path: Path) -> None:
    runs = [
        nemo_rl.train(
            tiny_model, PROMPTS, share_of_a, max_steps=3, seed=seed, output_dir=tmp_path / name, **SHORT_GRPO, **QUIET
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert untimed(runs[0].history) == untimed(runs[1].history)
    assert not torch.equal(weights(runs[0]), weights(runs[2]))


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_the_token_budget_never_changes_what_is_learned(algorithm: str, tiny_model: str, tmp_path: Path) -> None:
    rows: list[dict[str, str]] = PROMPTS
    if algorithm == "sft":
        rows = [{"prompt": f"{i}=", "completion": "ab" * (1 + i % 5)} for i in range(16)]
    if algorithm == "dpo":
        rows = [{"prompt": f"{i}=", "chosen": "ab" * (1 + i % 5), "rejected": "c"} for i in range(16)]
    extra = SHORT_GRPO if algorithm == "grpo" else {"batch_size": 8, "learning_rate": 1e-3}
    found = [
        weights(
            nemo_rl.train(
                tiny_model,
                rows,
                share_of_a if algorithm == "grpo" else None,
                algorithm=algorithm,
                max_steps=1,
                tokens_per_microbatch=budget,
                output_dir=tmp_path / str(budget),
                **extra,
                **QUIET,
            )
        )
        for budget in (1, 40, 100_000)
    ]
    # one AdamW step moves a weight by the learning rate whatever its gradient: tiny gradients amplify rounding
    for other in found[1:]:
        assert torch.quantile((other - found[0]).abs(), 0.99) < 1e-6


class Recorder(nemo_rl.Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_train_begin(self, trainer: Any) -> None:
        self.calls.append(("train_begin",))

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        self.calls.append(("epoch_begin", epoch))

    def on_step_begin(self, trainer: Any, step: int) -> None:
        self.calls.append(("step_begin", step))

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        assert trainer.current_step == step == metrics["step"]
        self.calls.append(("step_end", step))

    def on_epoch_end(self, trainer: Any, epoch: int, metrics: dict[str, Any]) -> None:
        self.calls.append(("epoch_end", epoch))

    def on_train_end(self, trainer: Any, result: Any) -> None:
        self.calls.append(("train_end", result.total_steps))


SFT_ROWS = [{"prompt": f"{i}=", "completion": "ab"} for i in range(6)]
SHORT_SFT: dict[str, Any] = {"algorithm": "sft", "batch_size": 4, "learning_rate": 1e-3}


def test_callbacks_see_steps_from_one_epochs_from_zero_and_the_truncated_epoch(tiny_model: str, tmp_path: Path) -> None:
    recorder = Recorder()
    nemo_rl.train(
        tiny_model, SFT_ROWS, max_steps=3, max_epochs=5, callbacks=[recorder], output_dir=tmp_path, **SHORT_SFT, **QUIET
    )
    steps = [[("step_begin", i), ("step_end", i)] for i in (1, 2, 3)]
    assert recorder.calls == [
        ("train_begin",),
        ("epoch_begin", 0),
        *steps[0],
        *steps[1],
        ("epoch_end", 0),
        ("epoch_begin", 1),
        *steps[2],
        ("epoch_end", 1),
        ("train_end", 3),
    ]


def test_a_callback_ends_the_run_and_the_last_step_is_saved(tiny_model: str, tmp_path: Path) -> None:
    class Stop(nemo_rl.Callback):
        def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
            trainer.should_stop = step == 2

    result = nemo_rl.train(
        tiny_model, SFT_ROWS, max_steps=9, max_epochs=9, callbacks=[Stop()], output_dir=tmp_path, **SHORT_SFT, **QUIET
    )
    assert result.total_steps == 2
    assert result.checkpoint_path is not None
    assert result.checkpoint_path.endswith("step-00000002")


def test_best_is_the_checkpoint_with_the_best_validation(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = nemo_rl.train(
        tiny_model,
        SFT_ROWS,
        validation_dataset=[{"prompt": "1=", "completion": "c"}],  # gets worse as training goes on
        max_steps=6,
        max_epochs=6,
        save_every=2,
        keep_checkpoints=1,
        output_dir=tmp_path,
        **(SHORT_SFT | {"learning_rate": 1e-2}),
        **(QUIET | {"log_level": "info"}),
    )
    losses = {row["step"]: row["validation_loss"] for row in result.history if "validation_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert result.checkpoint_path is not None
    assert result.checkpoint_path.endswith(f"step-{best:08d}")
    assert best < 6
    assert f"step-{best:08d}, the best, of step {best}" in capsys.readouterr().out  # the metrics are of the last step


def test_a_signal_in_the_middle_of_generation_saves_and_the_same_call_goes_on(tiny_model: str, tmp_path: Path) -> None:
    class Terminate(nemo_rl.Callback):
        def on_step_begin(self, trainer: Any, step: int) -> None:
            if step == 3 and trainer.output_dir == tmp_path / "run":
                original = trainer.tokenizer.batch_decode

                def batch_decode(*args: Any, **kwargs: Any) -> Any:  # called when a group is done, others are not
                    trainer.tokenizer.batch_decode = original
                    os.kill(os.getpid(), signal.SIGTERM)
                    return original(*args, **kwargs)

                trainer.tokenizer.batch_decode = batch_decode

    def run(folder: str, callbacks: list[Any]) -> nemo_rl.TrainResult:
        return nemo_rl.train(
            tiny_model,
            PROMPTS,
            share_of_a,
            max_steps=4,
            callbacks=callbacks,
            output_dir=tmp_path / folder,
            **SHORT_GRPO,
            **QUIET,
        )

    with pytest.raises(TrainingInterrupted) as stopped:
        run("run", [Terminate()])
    assert stopped.value.step == 2
    assert stopped.value.checkpoint_path is not None
    resumed, unbroken = run("run", []), run("unbroken", [])
    assert torch.equal(weights(resumed), weights(unbroken))
    assert untimed(resumed.history) == untimed(unbroken.history)


def failing(prompt: str, response: str) -> float:
    if prompt == "11=":
        raise RuntimeError("no score for eleven")
    return float(len(response))


@pytest.mark.parametrize("policy", ["zero", "drop"])
def test_failing_rewards_are_counted_and_the_run_goes_on(policy: str, tiny_model: str, tmp_path: Path) -> None:
    result = nemo_rl.train(
        tiny_model, PROMPTS, failing, max_steps=4, on_reward_error=policy, output_dir=tmp_path, **SHORT_GRPO, **QUIET
    )
    assert sum(row["reward_errors"] for row in result.history) == 4
    hit = next(row for row in result.history if row["reward_errors"])
    whole = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert whole
    assert hit["reward"] > 0


def test_a_raising_reward_ends_the_run_with_the_users_traceback(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="no score for eleven") as failed:
        nemo_rl.train(tiny_model, PROMPTS, failing, max_steps=4, output_dir=tmp_path, **SHORT_GRPO, **QUIET)
    assert 'raise RuntimeError("no score for eleven")' in failed.value.traceback


def test_a_hanging_reward_ends_the_run_within_its_time(tiny_model: str, tmp_path: Path) -> None:
    def hangs(prompt: str, response: str) -> float:
        while True:
            pass

    begin = time.monotonic()
    with pytest.raises(RewardError, match=r"0\.5"):
        nemo_rl.train(
            tiny_model, PROMPTS, hangs, max_steps=4, reward_timeout=0.5, output_dir=tmp_path, **SHORT_GRPO, **QUIET
        )
    assert time.monotonic() - begin < 60  # it ended at all; the limit itself is tested with the runner


def test_the_reference_of_a_resumed_run_is_the_model_at_its_start(tiny_model: str, tmp_path: Path) -> None:
    class Stop(nemo_rl.Callback):
        def on_step_begin(self, trainer: Any, step: int) -> None:
            if step == 3 and trainer.output_dir.name == "broken":
                os.kill(os.getpid(), signal.SIGTERM)

    def run(folder: str, callbacks: list[Any]) -> nemo_rl.TrainResult:
        return nemo_rl.train(
            tiny_model,
            PROMPTS,
            share_of_a,
            max_steps=4,
            beta=0.5,
            callbacks=callbacks,
            output_dir=tmp_path / folder,
            **SHORT_GRPO,
            **QUIET,
        )

    with pytest.raises(TrainingInterrupted):
        run("broken", [Stop()])
    resumed, unbroken = run("broken", []), run("unbroken", [])
    assert untimed(resumed.history) == untimed(unbroken.history)
    assert unbroken.history[-1]["kl"] > 0


@pytest.mark.filterwarnings("error::FutureWarning")
def test_adapters_train_and_the_checkpoint_holds_the_merged_model(tiny_model: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pytest.importorskip("peft")
    result = nemo_rl.train(
        tiny_model, PROMPTS, share_of_a, max_steps=2, lora_rank=4, beta=0.1, output_dir=tmp_path, **SHORT_GRPO, **QUIET
    )
    assert result.checkpoint_path is not None
    merged, start = (
        AutoModelForCausalLM.from_pretrained(result.checkpoint_path),
        AutoModelForCausalLM.from_pretrained(tiny_model),
    )
    moved = [
        name
        for (name, a), b in zip(merged.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert moved
    assert all("proj" in name for name in moved)


def test_several_updates_from_one_rollout_clip_by_the_ratio(tiny_model: str, tmp_path: Path) -> None:
    result = nemo_rl.train(
        tiny_model,
        PROMPTS,
        share_of_a,
        max_steps=3,
        num_iterations=4,
        output_dir=tmp_path,
        **(SHORT_GRPO | {"learning_rate": 2e-2}),
        **QUIET,
    )
    assert max(row["clip_fraction"] for row in result.history) > 0


def test_what_cannot_be_saved_fails_before_the_first_step(tiny_model: str, tmp_path: Path, monkeypatch) -> None:
    from nemo_rl.run import checkpoint_tensors

    def save_model(path: Path, model: Any) -> None:
        raise KeyError("model.layers.0.mlp.experts.weight")

    monkeypatch.setattr(checkpoint_tensors, "save_model", save_model)
    with pytest.raises(KeyError, match="experts"):
        nemo_rl.train(tiny_model, PROMPTS, share_of_a, max_steps=3, output_dir=tmp_path, **SHORT_GRPO, **QUIET)
    assert not [line for file in tmp_path.rglob("metrics.jsonl") for line in file.read_text().splitlines()]


def test_rows_whose_completions_score_alike_are_replaced_by_other_rows(
    tiny_model: str, tmp_path: Path, monkeypatch
) -> None:
    """Dynamic sampling: odd rows always score 0; they make way for others, as far as the rounds go."""
    from nemo_rl.trainers.grpo import GRPOTrainer

    trained: list[list[str]] = []
    inner = GRPOTrainer.train_on

    def train_on(self: Any, rollouts: Any, *values: Any) -> Any:
        trained.append([prompt.row.prompt for prompt in rollouts.prompts])
        return inner(self, rollouts, *values)

    monkeypatch.setattr(GRPOTrainer, "train_on", train_on)

    calls = itertools.count(1)

    def only_even(prompt: str, response: str) -> float:
        return 0.0 if int(prompt[:-1]) % 2 else float(next(calls))

    def run(rounds: int) -> tuple[list[dict[str, Any]], int]:
        trained.clear()
        options = {**SHORT_GRPO, **QUIET, "output_dir": tmp_path / str(rounds), "max_steps": 2}
        history = nemo_rl.train(tiny_model, PROMPTS, only_even, dynamic_sampling_rounds=rounds, **options).history
        return history, sum(int(prompt[:-1]) % 2 for prompts in trained for prompt in prompts)

    plain, odd = run(0)
    assert odd >= 2
    assert sum(row["flat_group_fraction"] * 4 for row in plain) == odd
    assert "resampled_groups" not in plain[0]
    varied, left = run(3)
    assert left < odd
    assert all(len(set(prompts)) == 4 for prompts in trained), "a batch is as large as ever, of different rows"
    drawn_odd = sum(row["flat_group_fraction"] * (4 + row["resampled_groups"]) for row in varied)
    assert left == pytest.approx(drawn_odd - sum(row["resampled_groups"] for row in varied), abs=1e-4)


def test_kl_in_the_reward_is_subtracted_before_the_advantages(tiny_model: str, tmp_path: Path, monkeypatch) -> None:
    from nemo_rl.trainers import grpo

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    inner = grpo.group_advantages

    def advantages(rewards: torch.Tensor, valid: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((rewards.clone(), valid))
        return inner(rewards, valid, **options)

    monkeypatch.setattr(grpo, "group_advantages", advantages)
    options = {**SHORT_GRPO, "learning_rate": 1e-2, "beta": 0.5, "kl_estimator": "k1", **QUIET}
    result = nemo_rl.train(
        tiny_model, PROMPTS, share_of_a, max_steps=2, use_kl_in_reward=True, output_dir=tmp_path, **options
    )
    first, second = result.history
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert seen[0][0].mean().item() == pytest.approx(first["reward"], abs=1e-6)
    tokens = second["completion_length"] * 16
    assert second["kl"] != 0.0
    assert second["reward"] - seen[1][0].mean().item() == pytest.approx(0.5 * second["kl"] * tokens / 16, rel=1e-4)


def test_the_mismatch_of_sampling_and_training_is_measured(tiny_model: str, tmp_path: Path) -> None:
    result = nemo_rl.train(tiny_model, PROMPTS, share_of_a, max_steps=1, output_dir=tmp_path, **SHORT_GRPO, **QUIET)
    assert 0 <= result.metrics["rollout_logprob_error"] < 1e-5
    assert abs(result.metrics["rollout_kl"]) < 1e-6
    assert "importance_bounded_fraction" not in result.metrics


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_type": "cispo", "dual_clip": 3.0}, "cispo, which has no such bound"),
        ({"use_leave_one_out_baseline": False, "advantage_statistics": "leave_one_out"}, "contradict each other"),
        ({"importance_min": 3.0}, "importance_min 3 above importance_max 2"),
        ({"use_kl_in_reward": True}, "set beta above 0"),
    ],
)
def test_objectives_that_do_not_fit_together_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        nemo_rl.train("nowhere", PROMPTS, share_of_a, output_dir=tmp_path, **settings, **QUIET)
