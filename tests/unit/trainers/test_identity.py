"""Which call goes on with a run, and which begins another one beside it and says why."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import pytest

import nemo_rl

ROWS = [{"prompt": f"{i}=", "completion": f"{i % 10}a"} for i in range(10, 26)]
DATED = (
    "{{ strftime_now('%d') }}={% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
)


class Stop(nemo_rl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        if step == self.step:
            raise KeyboardInterrupt


class Stream:
    """Rows that can only be read one after the other, as a streamed data set has them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def train(model: Any, output: Path, *, stop: int | None = None, rows: Any = ROWS, **changed: Any) -> Any:
    keywords: dict[str, Any] = dict(algorithm="sft", max_steps=6, max_epochs=9, batch_size=4, learning_rate=1e-2)
    keywords |= dict(save_every=2, backend="local", log_level="info", output_dir=output, tokenizer=None) | changed
    try:
        return nemo_rl.train(model, rows, callbacks=[Stop(stop)] if stop else None, **keywords)
    except KeyboardInterrupt:
        return None


def untimed(result: Any) -> list[dict[str, Any]]:
    timed = ("_seconds", "_per_second")
    return [{name: value for name, value in row.items() if not name.endswith(timed)} for row in result.history]


def weights(result: Any) -> bytes:
    return (Path(result.checkpoint_path) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tiny_model, tmp_path_factory.mktemp("unbroken") / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"activation_checkpointing": True},
        {"eval_every": 5, "validation_dataset": ROWS[:2]},
        {"save_every": 3, "keep_checkpoints": 1, "trust_remote_code": True},
        {"log_level": "warning", "logged_completions": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_no_gradient_may_differ(tiny_model, tmp_path, unbroken, change):
    train(tiny_model, tmp_path / "run", stop=4)
    result = train(tiny_model, tmp_path / "run", **change)
    assert result.output_dir == tmp_path / "run"
    assert [row["loss"] for row in result.history if row["step"]] == [row["loss"] for row in unbroken.history]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_micro_batches_may_differ_up_to_rounding(tiny_model, tmp_path, unbroken):
    train(tiny_model, tmp_path / "run", stop=4)
    result = train(tiny_model, tmp_path / "run", tokens_per_microbatch=8)
    assert result.history[-1]["loss"] == pytest.approx(unbroken.history[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01, now 0.02"),
        ({"seed": 3}, "seed was 42, now 3"),
        ({"rows": [*ROWS[:-1], {"prompt": "1=", "completion": "b"}]}, "dataset has changed"),
        ({"batch_size": 2}, "batch_size was 4, now 2"),
    ],
)
def test_what_decides_gradients_begins_beside_and_is_said(tiny_model, tmp_path, capsys, change, said):
    train(tiny_model, tmp_path / "run", stop=4)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    result = train(tiny_model, tmp_path / "run", **change)
    assert result.output_dir == tmp_path / "run-2"
    assert result.history[0]["step"] == 1
    assert said in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == kept
    with pytest.raises(ValueError, match="resume=True cannot go on"):
        train(tiny_model, tmp_path / "run", resume=True, **change | {"weight_decay": 0.5})


def test_the_folder_of_the_model_may_be_written_and_lie_elsewhere(tiny_model, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "m")
    train(tmp_path / "m", tmp_path / "run", stop=4)
    (tmp_path / "m").rename(tmp_path / "n")
    monkeypatch.chdir(tmp_path)
    result = train("./n/", tmp_path / "run")
    assert result.output_dir == tmp_path / "run"


def test_other_weights_in_the_same_folder_are_another_model(tiny_model, tmp_path, capsys):
    from unit.trainers.conftest import write_model

    write_model(tmp_path / "m", seed=1)
    train(tmp_path / "m", tmp_path / "run", stop=4)
    write_model(tmp_path / "m", seed=2)
    assert train(tmp_path / "m", tmp_path / "run").output_dir == tmp_path / "run-2"
    assert "model.weights has changed" in capsys.readouterr().out


def test_a_live_model_goes_on_from_its_interrupted_run(tiny_model, tmp_path, unbroken):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    train(model, tmp_path / "run", stop=4, tokenizer=tokenizer)
    result = train(model, tmp_path / "run", tokenizer=tokenizer)
    assert (result.output_dir, weights(result)) == (tmp_path / "run", weights(unbroken))
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    other.get_input_embeddings().weight.data.mul_(1.5)
    assert train(other, tmp_path / "run", tokenizer=tokenizer).output_dir == tmp_path / "run-2"


def test_a_dated_template_goes_on_after_midnight_with_the_same_tokens(tiny_model, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    import nemo_rl.trainers.base as base

    class Clock(datetime.datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2026, 5, cls.day, 23, 59, tzinfo=tz)

    monkeypatch.setattr(base.datetime, "datetime", Clock, raising=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = DATED

    def run(name: str, **more: Any) -> Any:
        return train(tiny_model, tmp_path / name, tokenizer=tokenizer, **more)

    one_day = run("one-day")
    run("two-days", stop=4)
    Clock.day = 22
    resumed = run("two-days")
    assert resumed.output_dir == tmp_path / "two-days"
    assert (untimed(resumed), weights(resumed)) == (untimed(one_day), weights(one_day))
    assert untimed(run("later")) != untimed(one_day), "the date is in the tokens, so another day is another run's loss"


def test_a_run_is_lengthened_to_the_weights_of_an_unbroken_one(tiny_model, tmp_path, unbroken, capsys):
    short = train(tiny_model, tmp_path / "run", max_steps=4)
    values = dataclasses.replace(short)
    longer = train(tiny_model, tmp_path / "run", max_steps=6)
    assert "had finished its 4 steps; it goes on to 6" in capsys.readouterr().out
    assert (longer.output_dir, longer.total_steps) == (tmp_path / "run", 6)
    assert (untimed(longer), weights(longer)) == (untimed(unbroken), weights(unbroken))
    train(tiny_model, tmp_path / "run", max_steps=20, save_every=1, resume=True)
    for now, then in ((short, values), (longer, longer)):
        assert [row["step"] for row in now.history] == list(range(1, now.total_steps + 1))
        assert Path(now.checkpoint_path).is_dir(), "the checkpoint of a result is not pruned"
        assert now.metrics == then.metrics
    assert train(tiny_model, tmp_path / "run", max_steps=20).output_dir == tmp_path / "run-2"
    with pytest.raises(ValueError, match="finished run of 20 steps"):
        train(tiny_model, tmp_path / "run", max_steps=20, resume=True, learning_rate=1e-2)


def test_an_interrupted_run_is_lengthened_too(tiny_model, tmp_path, unbroken):
    train(tiny_model, tmp_path / "run", max_steps=5, stop=3)
    result = train(tiny_model, tmp_path / "run")
    assert (untimed(result), weights(result)) == (untimed(unbroken), weights(unbroken))


def test_a_run_that_a_callback_ended_can_be_lengthened(tiny_model, tmp_path):
    class Enough(nemo_rl.Callback):
        def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
            trainer.should_stop = step == 3

    first = nemo_rl.train(
        tiny_model, ROWS, algorithm="sft", max_steps=5, max_epochs=9, batch_size=4, output_dir=tmp_path / "run",
        callbacks=[Enough()], backend="local", log_level="error", learning_rate=1e-2,
    )  # fmt: skip
    assert first.total_steps == 3
    assert train(tiny_model, tmp_path / "run", max_steps=6).total_steps == 6


def test_a_streamed_run_goes_on_and_says_why_it_cannot_be_lengthened(tiny_model, tmp_path, capsys):
    many = ROWS * 4  # more than any of the runs reads
    train(tiny_model, tmp_path / "run", rows=Stream(many), stop=3)
    assert train(tiny_model, tmp_path / "run", rows=Stream(many)).output_dir == tmp_path / "run"
    beside = train(tiny_model, tmp_path / "run", rows=Stream(many), max_steps=8)
    assert beside.output_dir == tmp_path / "run-2"
    said = " ".join(capsys.readouterr().out.split())
    assert "dataset has changed (24 rows of a stream were read, now 32: a longer run reads further" in said

    train(tiny_model, tmp_path / "short", rows=Stream(ROWS), max_steps=4)  # all that the stream has
    longer = train(tiny_model, tmp_path / "short", rows=Stream(ROWS), max_steps=6)
    assert (longer.output_dir, longer.total_steps) == (tmp_path / "short", 6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_lengthened_schedule_keeps_its_warm_up_and_decays_to_the_new_end(schedule):
    from nemo_rl.job.spec import TrainingSpec
    from nemo_rl.trainers.optimizer import learning_rate

    training = TrainingSpec(lr_schedule=schedule, learning_rate=1.0)
    first = [learning_rate(training, step, 100) for step in range(1, 101)]
    longer = [learning_rate(training, step, 400, first_total_steps=100) for step in range(1, 401)]
    assert longer[:5] == first[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert learning_rate(training, 5, 400) == 0.25  # a run that began with 400 steps
    assert longer[100] == (1.0 if schedule == "constant" else pytest.approx(longer[100]))
    assert longer[100] >= first[-1]
    assert min(longer[101:]) == longer[-1]


def test_the_next_stage_in_the_same_folder_begins_beside_the_first(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = train(tiny_model, Path("outputs/stages"))
    second = train(first.checkpoint_path, None, learning_rate=1e-3)
    third = train(first.checkpoint_path, Path("outputs/stages"), learning_rate=1e-4)
    assert [r.output_dir.name for r in (first, second, third)] == ["stages", "stages-2", "stages-3"]
    assert Path(first.checkpoint_path).is_dir()


def test_a_changed_reward_helper_begins_anew_and_says_so(tiny_model, tmp_path, capsys):
    def run(factor: float, **more: Any) -> Any:
        def helper(text: str) -> float:
            return factor * len(text)

        def reward(prompt: str, response: str) -> float:
            return helper(response)

        more |= dict(algorithm="grpo", reward_fn=reward, num_generations_per_prompt=2, max_new_tokens=3)
        return train(tiny_model, tmp_path / "run", rows=[{"prompt": r["prompt"]} for r in ROWS], **more)

    run(1.0, stop=2)
    assert run(1.0, stop=4) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    result = run(-1.0)
    assert (result.output_dir, result.history[0]["step"]) == (tmp_path / "run-2", 1)
    assert "reward.reward.factor was 1.0, now -1.0" in capsys.readouterr().out
