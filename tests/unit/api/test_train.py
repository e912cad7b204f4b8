"""train(): what it refuses before anything starts, and what it hands to the backend."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from nemo_rl import backends
from nemo_rl.backends import Run, local
from nemo_rl.job.spec import DatasetSpec
from nemo_rl.run.directory import default_output_dir

ROWS = [{"prompt": "1+1=", "answer": "2"}]


def score(prompt: str, response: str) -> float:
    return float(len(response))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs that reached the local backend, which trains nothing here."""
    seen: list[Run] = []
    monkeypatch.setattr(local, "run", lambda run: seen.append(run) or "result")
    monkeypatch.delenv("NEMO_RL_BACKEND", raising=False)
    monkeypatch.setattr(backends, "cluster_context", lambda: None)
    return seen


# --- errors before anything starts


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, ValueError, "Model is required"),
        ({"model": " "}, ValueError, "Model is required"),
        ({"dataset": None}, ValueError, "Dataset is required"),
        ({"dataset": ""}, ValueError, "Dataset is required"),
        ({"dataset": []}, ValueError, "Dataset is required"),
        ({"reward_fn": None}, ValueError, "reward_fn is required for GRPO"),
        ({"algorithm": "ppo"}, ValueError, "Unknown algorithm 'ppo'"),
        ({"algorithm": "dop"}, ValueError, "did you mean 'dpo'"),
        ({"validation_datset": ROWS}, TypeError, "did you mean 'validation_dataset'"),
        ({"backnd": "local"}, TypeError, "did you mean 'backend'"),
        ({"beta": -1}, ValueError, "beta=-1: must be greater than or equal to 0"),
        ({"backend": "slurm"}, ValueError, "backend='slurm': expected one of auto, local, kubernetes"),
        ({"name": "Not_A_Name"}, ValueError, "name='Not_A_Name'"),
        ({"name": "a" * 51}, ValueError, "51 characters"),
        ({"namespace": "-x"}, ValueError, "namespace='-x'"),
        ({"wait": "no"}, ValueError, "wait='no'"),
        ({"reward_fn": 3}, TypeError, "reward_fn"),
        ({"reward_fn": lambda: 1.0}, TypeError, "reward_fn"),
        ({"reward_fn": {"ok": score, "bad": 5}}, TypeError, "reward_fn"),
        ({"reward_fn": lambda prompt, response, solution: 1.0}, TypeError, "solution"),
        ({"callbacks": [object()]}, TypeError, "allback"),
    ],
)
def test_a_call_that_cannot_work_is_refused_before_the_backend(
    runs: list[Run], arguments: dict[str, Any], error: type, message: str
):
    with pytest.raises(error) as caught:
        nemo_rl.train(**{"model": "org/m", "dataset": ROWS, "reward_fn": score, **arguments})
    assert message in str(caught.value)
    assert runs == []


def test_a_column_that_the_reward_names_is_found_in_the_rows(runs: list[Run]):
    nemo_rl.train("org/m", ROWS, lambda prompt, response, answer: 1.0)
    assert len(runs) == 1


def test_a_column_that_the_shape_of_the_rows_makes_counts_as_one_of_theirs(runs: list[Run]):
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    nemo_rl.train("org/m", [{"messages": turns}], lambda prompt, response, completion: 1.0)
    assert len(runs) == 1


def test_rows_of_no_accepted_shape_are_refused_with_their_columns(runs: list[Run]):
    with pytest.raises(nemo_rl.DatasetError, match="'colour'"):
        nemo_rl.train("org/m", [{"colour": "red"}], score)
    assert runs == []


def test_a_generation_count_is_refused_where_nothing_is_generated(runs: list[Run]):
    with pytest.raises(TypeError, match="num_generations_per_prompt belongs to algorithm grpo"):
        nemo_rl.train("org/m", "org/d", algorithm="sft", num_generations_per_prompt=4)


# --- what reaches the backend


def test_a_call_becomes_a_specification_and_the_objects_beside_it(runs: list[Run]):
    assert (
        nemo_rl.train("org/m", ROWS, score, max_steps=3, temperature=0.5, seed=1, validation_dataset=ROWS) == "result"
    )
    (run,) = runs
    assert (run.spec.training.max_steps, run.spec.settings.temperature, run.spec.training.seed) == (3, 0.5, 1)
    assert run.dataset is ROWS
    assert run.validation_dataset is ROWS
    assert run.reward_fn is score
    assert run.spec.validation_dataset is not None
    assert run.output_dir == Path("outputs/m")


def test_what_the_specification_can_say_does_not_travel_beside_it(runs: list[Run], tmp_path: Path):
    nemo_rl.train("org/m", "org/d", "exact_match", validation_dataset=tmp_path / "v.jsonl", output_dir=tmp_path)
    (run,) = runs
    assert (run.dataset, run.validation_dataset, run.reward_fn, run.model) == (None, None, None, None)
    assert run.spec.dataset == DatasetSpec(name="org/d")
    assert run.spec.validation_dataset.path.endswith("v.jsonl")
    assert run.output_dir == tmp_path


@pytest.mark.parametrize("algorithm", ["GRPO", "Grpo", "grpo"])
def test_the_algorithm_is_given_in_any_case(runs: list[Run], algorithm: str):
    nemo_rl.train("org/m", ROWS, score, algorithm)
    assert runs[0].spec.algorithm == "grpo"


@pytest.mark.parametrize("algorithm", ["sft", "DPO"])
def test_a_reward_given_with_another_algorithm_is_ignored_with_a_warning(runs: list[Run], algorithm: str):
    with pytest.warns(UserWarning, match="uses no reward; reward_fn is ignored"):
        nemo_rl.train("org/m", ROWS, score, algorithm)
    assert runs[0].reward_fn is None
    assert runs[0].spec.reward is None


def test_beta_belongs_to_the_chosen_algorithm(runs: list[Run]):
    nemo_rl.train("org/m", ROWS, score, beta=0.2)
    nemo_rl.train("org/m", ROWS, algorithm="dpo", beta=0.3)
    assert [run.spec.settings.beta for run in runs] == [0.2, 0.3]


def test_a_live_model_travels_beside_the_specification(runs: list[Run]):
    class Model:
        name_or_path = "org/tiny"
        config = type("Config", (), {"name_or_path": "org/tiny"})()

        def forward(self) -> None: ...

    model = Model()
    nemo_rl.train(model, ROWS, score, tokenizer="tokenizer")
    assert runs[0].model is model
    assert runs[0].tokenizer == "tokenizer"
    assert runs[0].output_dir == Path("outputs/tiny")


@pytest.mark.parametrize(
    ("model", "expected"),
    [("Qwen/Qwen2.5-1.5B", "Qwen2.5-1.5B"), ("/models/tiny/", "tiny"), (Path("a/b c"), "b-c"), ("..", "model")],
)
def test_output_goes_to_a_folder_named_by_the_model(model: Any, expected: str):
    assert default_output_dir(model) == Path("outputs") / expected


def test_a_valid_call_warns_about_nothing(runs: list[Run]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nemo_rl.train("org/m", ROWS, score)


# --- the learning rate where none is given


@pytest.mark.parametrize(
    ("call", "rate", "words"),
    [
        ({"algorithm": "sft"}, 2e-5, "learning_rate is not given: 2e-05, the default of sft\n"),
        ({"algorithm": "dpo"}, 5e-7, "learning_rate is not given: 5e-07, the default of dpo\n"),
        ({"algorithm": "sft", "lora_rank": 4}, 1e-4, "0.0001, the default of sft with low-rank adapters\n"),
        ({"reward_fn": score, "lora_rank": 4}, 1e-5, "1e-05, the default of grpo with low-rank adapters\n"),
        ({"reward_fn": score}, 1e-6, None),
        ({"algorithm": "sft", "learning_rate": 1e-6}, 1e-6, None),
        ({"algorithm": "dpo", "learning_rate": 1e-6, "lora_rank": 4}, 1e-6, None),
    ],
)
def test_a_learning_rate_that_was_chosen_for_the_caller_is_said_and_part_of_the_job(
    runs: list[Run], capsys: pytest.CaptureFixture[str], call: dict[str, Any], rate: float, words: str | None
):
    nemo_rl.train("org/m", ROWS, **call)
    assert runs[0].spec.model_dump(exclude_unset=True)["training"]["learning_rate"] == rate
    said = capsys.readouterr().out
    assert (words in said) if words else ("learning_rate" not in said)


# --- which backend


def test_one_line_says_where_and_why(runs: list[Run], capsys: pytest.CaptureFixture[str]):
    nemo_rl.train("org/m", ROWS, score)
    assert (
        capsys.readouterr().out == "nemo-rl: grpo on this machine (no Kubernetes context here), output in outputs/m\n"
    )


def test_a_high_log_level_silences_that_line(runs: list[Run], capsys: pytest.CaptureFixture[str]):
    nemo_rl.train("org/m", ROWS, score, log_level="WARNING")
    assert capsys.readouterr().out == ""
