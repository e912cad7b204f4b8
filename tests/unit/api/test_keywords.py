"""Flat keywords and the specification say the same, in both directions."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl import train
from nemo_rl.api.keywords import build_spec, flat_keywords, keywords
from nemo_rl.api.training import CALL_KEYWORDS
from nemo_rl.job.foreign import foreign_names, meaning_of, nearest
from nemo_rl.job.spec import ALGORITHMS, LEARNING_RATES, RLTrainingJobSpec, TrainingSpec

REWARD = "exact_match"


def _reward(algorithm: str) -> str | None:
    return REWARD if algorithm == "grpo" else None


# --- names


def test_every_name_is_unique_across_sections_but_beta():
    assert {name for name, homes in keywords().items() if len(homes) > 1} == {"beta"}
    assert [home.section for home in keywords()["beta"]] == ["grpo", "dpo"]


def test_every_leaf_of_the_flat_sections_has_a_keyword():
    homes = {(home.section, home.field) for all_homes in keywords().values() for home in all_homes}
    for section in ("training", "grpo", "dpo", "sft", "resources", "output"):
        annotation = RLTrainingJobSpec.model_fields[section].annotation
        model = next((part for part in get_args(annotation) if part is not type(None)), annotation)
        for field in model.model_fields:
            assert (section, field) in homes
    assert {("reward", "timeout_seconds"), ("reward", "on_error"), ("reward", "weights")} <= homes


def test_no_keyword_collides_with_an_argument_of_the_call():
    arguments = set(inspect.signature(train).parameters) | set(CALL_KEYWORDS)
    same_thing = {"max_steps", "max_epochs", "learning_rate", "batch_size", "num_generations_per_prompt"}
    assert arguments & keywords().keys() == same_thing


def test_the_names_that_the_documentation_promises_exist():
    promised = {
        *("weight_decay", "warmup_steps", "lr_schedule", "max_grad_norm", "tokens_per_microbatch"),
        *("max_sequence_length", "max_new_tokens", "temperature", "top_k", "top_p", "loss_type", "reward_timeout"),
        *("on_reward_error", "reward_weights", "save_every", "keep_checkpoints", "eval_every", "seed", "tensorboard"),
        *("log_level", "resume", "beta", "normalize_rewards", "use_leave_one_out_baseline", "gpus", "nodes", "image"),
    }
    assert promised <= keywords().keys()
    assert {"namespace", "name", "backend", "wait", "validation_dataset"} <= set(CALL_KEYWORDS)


def test_the_signature_has_the_defaults_of_the_specification():
    for name, parameter in inspect.signature(train).parameters.items():
        if name in keywords() and name != "learning_rate":
            assert parameter.default == keywords()[name][0].info.default, name
    assert inspect.signature(train).parameters["learning_rate"].default == LEARNING_RATES["grpo"][0] == 1e-6


# --- values, there and back


def _values(annotation: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values that a field allows, from its type and bounds."""
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    arguments = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _values(arguments[0], (*metadata, *annotation.__metadata__))
    if type(None) in arguments:
        inner = next(a for a in arguments if a is not type(None))
        return st.none() | _values(inner, metadata)
    bounds: dict[str, Any] = {}
    for constraint in metadata:
        for part in getattr(constraint, "metadata", [constraint]):
            bounds.update({k: getattr(part, k) for k in ("ge", "gt", "le", "lt") if hasattr(part, k)})
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(bounds.get("ge", 0), min(bounds.get("le", 10**6), bounds.get("lt", 10**6)))
    if annotation is float:
        low, high = bounds.get("ge", bounds.get("gt", 0)), bounds.get("le", bounds.get("lt", 100))
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_subnormal=False)
    if annotation == list[str]:
        return st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3)
    if annotation is str:
        return st.text("abc", min_size=1, max_size=5)
    if get_origin(annotation) is list:
        return st.lists(_values(arguments[0]), max_size=3)
    if get_origin(annotation) is dict:
        return st.dictionaries(st.text("abc", min_size=1, max_size=5), st.booleans() | st.text("abc"), max_size=2)
    raise NotImplementedError(annotation)


def _field_values(name: str, algorithm: str) -> st.SearchStrategy[Any]:
    home = next(h for h in keywords()[name] if h.algorithm in (None, algorithm))
    return _values(home.info.annotation, tuple(home.info.metadata))


NUMERIC = {
    algorithm: sorted(
        name
        for name, homes in keywords().items()
        if any(home.section in ("training", algorithm) for home in homes) or name in ("gpus", "nodes", "reward_timeout")
        if not (name == "reward_timeout" and algorithm != "grpo")
    )
    for algorithm in ALGORITHMS
}


_CONTRADICTIONS: list[tuple[Callable[[dict[str, Any]], bool], str]] = [
    (lambda flat: "advantage_statistics" in flat, "use_leave_one_out_baseline"),
    (lambda flat: flat.get("loss_type") == "cispo", "dual_clip"),
    (lambda flat: not flat.get("beta"), "use_kl_in_reward"),
    (lambda flat: True, "importance_min"),
]
"""Settings that are refused together with others, and which of them is left out."""


@st.composite
def _calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    algorithm = draw(st.sampled_from(ALGORITHMS))
    chosen = draw(st.lists(st.sampled_from(NUMERIC[algorithm]), unique=True, max_size=12))
    flat = {name: draw(_field_values(name, algorithm), label=name) for name in chosen}
    for kept, left_out in _CONTRADICTIONS:
        if kept(flat):
            flat.pop(left_out, None)
    if flat.get("learning_rate", 0) is None:
        del flat["learning_rate"]  # the same as not given
    if flat.get("lora_rank") is None:
        flat = {name: value for name, value in flat.items() if name not in ("lora_alpha", "lora_target_modules")}
    return algorithm, flat


@given(_calls())
@settings(max_examples=150, deadline=None)
def test_flat_keywords_survive_the_way_through_the_specification(call: tuple[str, dict[str, Any]]):
    algorithm, flat = call
    spec = build_spec("org/model", "org/data", _reward(algorithm), algorithm, **flat)
    assert flat_keywords(spec) == flat
    assert build_spec("org/model", "org/data", _reward(algorithm), algorithm, **flat_keywords(spec)) == spec


@given(_calls())
@settings(max_examples=50, deadline=None)
def test_the_yaml_form_of_any_call_reads_back_the_same(call: tuple[str, dict[str, Any]]):
    from nemo_rl.job.manifest import Manifest, parse_manifest

    algorithm, flat = call
    spec = build_spec("org/model", "org/data", _reward(algorithm), algorithm, **flat)
    assert parse_manifest(Manifest("a-job", spec).to_yaml()).spec == spec


def test_job_level_keywords_reach_the_specification():
    spec = build_spec(
        "org/model", "org/data", REWARD, gpus=4, nodes=2, image="registry/i:1", node_selector={"a": "b"},
        suspend=True, claim="mine", tolerations=[{"key": "gpu", "operator": "Exists"}], reward_timeout=5,
        split="train_1M", env={"A": "1"}, secrets=["HF_TOKEN", "other/WANDB_API_KEY"],
    )  # fmt: skip
    assert (spec.resources.gpus_per_node, spec.resources.nodes, spec.image) == (4, 2, "registry/i:1")
    assert spec.suspend
    assert spec.output.claim == "mine"
    assert spec.tolerations[0].operator == "Exists"
    assert spec.reward
    assert spec.reward.timeout_seconds == 5
    assert spec.dataset.split == "train_1M"
    plain, *secret = [entry.model_dump(exclude_none=True) for entry in spec.env]
    assert plain == {"name": "A", "value": "1"}
    assert [(s["name"], s["value_from"]["secret_key_ref"]["name"]) for s in secret] == [
        ("HF_TOKEN", "hf-token"),
        ("WANDB_API_KEY", "other"),
    ]


def test_gpus_per_node_is_another_name_of_gpus():
    assert build_spec("m", "d", REWARD, gpus_per_node=0).resources.gpus_per_node == 0


@pytest.mark.parametrize(("given_value", "meant"), [(True, "required"), (False, "never"), ("auto", "auto")])
def test_resume_takes_python_booleans(given_value: Any, meant: str):
    assert build_spec("m", "d", REWARD, resume=given_value).training.resume == meant


def test_numpy_scalars_are_the_numbers_they_are():
    import numpy

    spec = build_spec("m", "d", REWARD, max_steps=numpy.int64(7), learning_rate=numpy.float32(0.5))
    assert (spec.training.max_steps, spec.training.learning_rate) == (7, 0.5)


# --- data sets, rewards, models


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("nvidia/HelpSteer2", {"name": "nvidia/HelpSteer2"}),
        ("rows.jsonl", {"path": "rows.jsonl"}),
        ("./rows", {"path": "./rows"}),
        ("pvc://claim/rows.csv", {"path": "pvc://claim/rows.csv"}),
        ([{"prompt": "x"}], {"path": "python://dataset"}),
    ],
)
def test_a_data_set_is_a_hub_name_a_file_or_an_object(dataset: Any, expected: dict[str, str]):
    assert build_spec("m", dataset, REWARD).dataset.model_dump(exclude_unset=True) == expected


def test_a_file_that_exists_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").write_text("{}")
    assert build_spec("m", "rows", REWARD).dataset.path == "rows"


def test_a_reward_is_a_builtin_an_import_path_or_an_object():
    assert build_spec("m", "d", "math_answer").reward.builtin == "math_answer"
    assert build_spec("m", "d", "pkg.mod:score").reward.function == "pkg.mod:score"
    assert build_spec("m", "d", lambda prompt, response: 1.0).reward.function == "python:reward"


def test_weights_by_name_come_in_the_order_of_the_rewards():
    rewards = {"right": len, "short": len, "polite": len}
    spec = build_spec("m", "d", rewards, reward_weights={"polite": 0.5, "right": 2})
    assert spec.reward.weights == [2.0, 1.0, 0.5]


# --- errors: found, expected, cure


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"learning_rte": 1}, TypeError, ["learning_rte", "did you mean 'learning_rate'"]),
        ({"gpu": 1}, TypeError, ["'gpu'", "did you mean 'gpus'"]),
        ({"zzzzzz": 1}, TypeError, ["zzzzzz", "of grpo there are max_steps, ", "temperature"]),
        ({"training": {}}, TypeError, ["is a section", "max_steps"]),
        ({"learning_rate": -1}, ValueError, ["learning_rate=-1", "greater than 0", "Peak learning rate"]),
        ({"max_steps": 0, "top_p": 2}, ValueError, ["max_steps=0", "top_p=2", "less than or equal to 1"]),
        ({"loss_type": "ppo"}, ValueError, ["loss_type='ppo'", "'dapo'", "'dr_grpo'"]),
        ({"reward_timeout": 0}, ValueError, ["reward_timeout=0", "greater than 0"]),
        ({"on_reward_error": "skip"}, ValueError, ["on_reward_error='skip'", "'drop'"]),
        ({"gpus": -1}, ValueError, ["gpus=-1", "greater than or equal to 0"]),
        ({"gpus": 1, "gpus_per_node": 1}, TypeError, ["gpus_per_node and gpus"]),
        ({"preference_loss": "ipo"}, TypeError, ["preference_loss belongs to algorithm dpo", "algorithm is grpo"]),
        ({"train_on_prompt": True}, TypeError, ["train_on_prompt belongs to algorithm sft"]),
        ({"algorithm": "sft", "top_k": 1}, TypeError, ["top_k belongs to algorithm grpo", "algorithm is sft"]),
        ({"algorithm": "sft", "beta": 1}, TypeError, ["beta belongs to algorithm grpo and dpo"]),
        ({"algorithm": "dpo", "reward_timeout": 1}, TypeError, ["reward_timeout belongs to algorithm grpo"]),
        ({"algorithm": "ppo"}, ValueError, ["Unknown algorithm 'ppo'", "grpo, sft, dpo"]),
        ({"algorithm": None}, ValueError, ["Unknown algorithm None"]),
        ({"dataset": [{"prompt": "x"}], "split": "test"}, TypeError, ["split is for data sets of the hub", "rows"]),
        ({"dataset": "a.jsonl", "subset": "x"}, TypeError, ["subset is for data sets of the hub", "a file"]),
        ({"dataset": None, "max_rows": 1}, TypeError, ["max_rows", "DatasetSpec"]),
        ({"reward_fn": "exactmatch"}, ValueError, ["reward_fn='exactmatch'", "'exact_match'"]),
        ({"reward_fn": [len, len], "reward_weights": [1]}, ValueError, ["1 entries for 2 rewards"]),
        ({"reward_fn": {"a": len}, "reward_weights": {"b": 1}}, ValueError, ["'b'", "rewards are a"]),
        ({"reward_weights": {"b": 1}}, TypeError, ["reward_weights", "no names"]),
        ({"model": 3}, TypeError, ["model has type int", "hub name"]),
        ({"secrets": "HF_TOKEN"}, TypeError, ["expected a list"]),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_with_what_was_expected(arguments: dict[str, Any], error: type, parts: list[str]):
    call = {"model": "m", "dataset": "d", **arguments}
    if call.get("algorithm", "grpo") == "grpo":
        call = {"reward_fn": REWARD, **call}
    with pytest.raises(error) as caught:
        build_spec(**call)
    for part in parts:
        assert part in str(caught.value)


def test_the_caller_is_named_in_the_error():
    with pytest.raises(TypeError, match=r"^GRPOTrainer\.from_pretrained\(\): unknown keyword"):
        build_spec("m", caller="GRPOTrainer.from_pretrained", nonsense=1)


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "DB_PASSWORD"])
def test_a_literal_secret_is_refused_and_never_repeated(name: str):
    with pytest.raises(ValueError, match="looks like a secret") as caught:
        build_spec("m", "d", REWARD, env={name: "hunter2hunter2"})
    assert "hunter2" not in str(caught.value)
    assert f"secrets=['{name}']" in str(caught.value)


def test_the_value_of_a_secret_given_as_its_name_is_not_repeated():
    with pytest.raises(ValueError, match="not a secret's value") as caught:
        build_spec("m", "d", REWARD, secrets=["hf-abcdefgh.12345"])
    assert "abcdefgh" not in str(caught.value)


def test_an_environment_variable_about_tokenizers_is_no_secret():
    assert build_spec("m", "d", REWARD, env={"TOKENIZERS_PARALLELISM": "false"}).env[0].value == "false"


def test_a_wrong_environment_variable_does_not_repeat_its_value():
    with pytest.raises(ValueError, match="env") as caught:
        build_spec("m", "d", REWARD, env=[{"name": "not a name!", "value": "hunter2"}])
    assert "hunter2" not in str(caught.value)


def test_the_defaults_are_those_of_the_specification():
    training = build_spec("m", "d", REWARD).training
    assert training.model_dump(exclude={"learning_rate"}) == TrainingSpec().model_dump(exclude={"learning_rate"})


# --- names of other libraries


def test_what_a_name_of_another_library_is_here_is_said_in_names_that_exist():
    ours = {*keywords(), *CALL_KEYWORDS, *inspect.signature(train).parameters}
    assert {name for targets in foreign_names().values() for name in targets} <= ours
    assert not foreign_names().keys() & ours


THEIR_SETTINGS = {
    "trl": [f"trl/trainer/{name}_config.py" for name in ("grpo", "sft", "dpo")],
    "transformers": ["transformers/training_args.py"],
}


def test_every_setting_of_trl_and_of_transformers_that_is_renamed_here_is_recognised():
    """The names come from TRL itself; those that mean the same here, or nothing here, are counted out one by one."""
    theirs = {
        node.target.id
        for library, files in THEIR_SETTINGS.items()
        for file in files
        for node in ast.walk(ast.parse(Path(importlib.metadata.distribution(library).locate_file(file)).read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    asked_most = {
        *("num_generations", "max_completion_length", "max_length", "per_device_train_batch_size", "epsilon"),
        *("gradient_accumulation_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "save_steps"),
        *("eval_steps", "eval_strategy", "save_strategy", "save_total_limit", "bf16", "fp16", "gradient_checkpointing"),
        *("logging_steps", "resume_from_checkpoint", "scale_rewards", "delta", "epsilon_high", "packing"),
        *("assistant_only_loss", "completion_only_loss", "steps_per_generation", "per_device_eval_batch_size"),
        *("dataset_text_field", "load_best_model_at_end", "run_name", "optim", "log_completions"),
    }
    assert asked_most - theirs <= {"warmup_ratio"}, "TRL has renamed these"
    assert {name for name in asked_most if meaning_of(name) is None} == set()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("num_generations", "in nemo-rl this is num_generations_per_prompt"),
        ("max_completion_length", "in nemo-rl this is max_new_tokens"),
        ("lr", "in nemo-rl this is learning_rate"),
        ("num_train_epochs", "in nemo-rl this is max_epochs"),
        ("per_device_train_batch_size", "in nemo-rl this is batch_size, which counts the rows of one optimizer step"),
        ("gradient_accumulation_steps", "not needed: batch_size counts the rows"),
    ],
)
def test_a_name_of_another_library_leads_to_what_it_means_here(name: str, ours: str):
    with pytest.raises(TypeError) as caught:
        build_spec("m", "d", REWARD, **{name: 2})
    assert ours in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_meaning_of_another_algorithm_is_not_offered():
    with pytest.raises(TypeError, match="unknown keyword 'num_generations'; of sft there are"):
        build_spec("m", "d", None, "sft", num_generations=4)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("learnin_rate", "learning_rate"), ("max_stpes", "max_steps"), ("maxsteps", "max_steps"), ("gpu", "gpus"),
        ("batchsize", "batch_size"), ("temprature", "temperature"), ("max_new_token", "max_new_tokens"),
        ("validation_datset", None), ("num_iteration", "num_iterations"),
        # these look alike and mean something else
        ("num_generations", None), ("max_completion_length", None), ("clip", None), ("data", None),
        ("eval_batch_size", None), ("reward_model", None), ("save_path", None),
    ],
)  # fmt: skip
def test_a_suggestion_is_made_for_a_misspelling_and_for_nothing_else(misspelt: str, meant: str | None):
    assert nearest(misspelt, keywords()) == meant


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("ppo", "the nearest is 'grpo'"),
        ("rloo", "it is 'grpo' with normalize_rewards=False"),
        ("kto", "learning from preferences is 'dpo'"),
        ("gpro", "did you mean 'grpo'"),
        ("sfft", "did you mean 'sft'"),
    ],
)
def test_an_unknown_algorithm_leads_to_the_one_that_is_meant(algorithm: str, words: str):
    with pytest.raises(ValueError, match="Unknown algorithm") as caught:
        build_spec("m", "d", REWARD, algorithm)
    assert words in str(caught.value)


# --- the learning rate where none is given


@pytest.mark.parametrize(
    ("algorithm", "rank", "rate"),
    [("grpo", None, 1e-6), ("sft", None, 2e-5), ("dpo", None, 5e-7), ("grpo", 8, 1e-5), ("sft", 8, 1e-4), ("dpo", 8, 1e-5)],
)  # fmt: skip
def test_each_algorithm_has_its_own_learning_rate(algorithm: str, rank: int | None, rate: float):
    spec = build_spec("m", "d", _reward(algorithm), algorithm, **({"lora_rank": rank} if rank else {}))
    assert spec.training.learning_rate == rate
    assert "learning_rate" not in flat_keywords(spec)
    given = build_spec("m", "d", _reward(algorithm), algorithm, learning_rate=1e-6)
    assert given.training.learning_rate == 1e-6


def test_the_learning_rate_of_a_yaml_job_is_chosen_in_the_same_way_and_follows_the_algorithm():
    from nemo_rl.job.manifest import parse_manifest

    text = """
        apiVersion: nemo-rl.io/v1alpha1
        kind: RLTrainingJob
        metadata: {name: x}
        spec: {model: m, algorithm: sft, dataset: {name: d}, training: {maxSteps: 3}}
    """
    manifest = parse_manifest(text)
    assert manifest.spec.training.learning_rate == 2e-5
    assert manifest.to_dict()["spec"]["training"] == {"maxSteps": 3}
    assert parse_manifest(text, overrides=["training.loraRank=4"]).spec.training.learning_rate == 1e-4
    assert parse_manifest(text, overrides=["training.learningRate=1e-6"]).spec.training.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("wandb", ["wandb"]), (["mlflow", "tensorboard"], ["mlflow", "tensorboard"]), ("none", []), (None, [])],
)
def test_report_to_takes_one_name_several_or_none(wanted: Any, found: list[str]) -> None:
    assert build_spec("m", "rows", algorithm="sft", report_to=wanted).training.report_to == found


def test_report_to_names_the_trackers_that_there_are() -> None:
    with pytest.raises(ValueError, match="'tensorboard', 'wandb', 'mlflow' or 'trackio'"):
        build_spec("m", "rows", algorithm="sft", report_to="comet")
