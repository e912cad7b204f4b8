"""Every predictable mistake in a call is answered by the product itself: what was found, what was expected, the cure."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from nemo_rl import backends
from unit.api import mistakes

OF_A_LIBRARY = (
    "object has no attribute",
    "Errno",
    "Traceback",
    "NoneType' object",
    "index out of range",
    "instance of",
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("NEMO_RL_BACKEND", raising=False)
    monkeypatch.setattr(backends, "cluster_context", lambda: None)
    mistakes.make_surroundings(tmp_path)
    return tmp_path


def answer(tiny_model: Path, **arguments: Any) -> str:
    """The words of the error that a call with this mistake ends in, after checking that they are the product's own."""
    call: dict[str, Any] = {
        "model": str(tiny_model),
        "dataset": mistakes.ROWS,
        "reward_fn": mistakes.score,
        "max_steps": 1,
        "batch_size": 2,
        "save_every": None,
        "output_dir": "out",
        "log_level": "error",
        **arguments,
    }
    if call.get("algorithm", "grpo") == "grpo":
        call = {"max_new_tokens": 2, "num_generations_per_prompt": 2, **call}
    with pytest.raises((ValueError, TypeError, OSError, RuntimeError)) as caught:
        nemo_rl.train(**call)
    error = caught.value
    said = "\n".join([str(error), *getattr(error, "__notes__", ())])
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    own = type(error).__module__.startswith("nemo_rl.") or "nemo_rl" in Path(frames[-1]).parts
    assert own, f"{type(error).__name__} of {frames[-1]}: {said}"
    of_the_user = isinstance(error, nemo_rl.RewardError)  # its traceback is that of the reward
    assert of_the_user or not any(words in said for words in OF_A_LIBRARY), said
    assert len(str(error)) > 20, said
    return said


@pytest.mark.parametrize(("arguments", "words"), [m[1:] for m in mistakes.ALL], ids=[m[0] for m in mistakes.ALL])
def test_a_mistake_in_a_call_is_answered_in_words(
    tiny_model: Path, arguments: dict[str, Any], words: tuple[str, ...]
) -> None:
    said = answer(tiny_model, **arguments)
    assert not [word for word in words if word.lower() not in said.lower()], said


@pytest.mark.parametrize(
    ("file", "content", "words"), [f[1:] for f in mistakes.FILES], ids=[f[0] for f in mistakes.FILES]
)
def test_a_mistake_in_a_file_is_answered_in_words(
    tiny_model: Path, here: Path, file: str, content: bytes, words: tuple[str, ...]
) -> None:
    if file not in ("folder", "missing.jsonl"):
        (here / file).write_bytes(content)
    said = answer(tiny_model, dataset=f"./{file}")
    assert not [word for word in words if word.lower() not in said.lower()], said


def test_there_are_150_of_them() -> None:
    assert len(mistakes.ALL) + len(mistakes.FILES) + len(YAML) >= 150


JOB = """\
apiVersion: nemo-rl.io/v1alpha1
kind: RLTrainingJob
metadata: {name: sums}
spec:
  model: org/model
  algorithm: sft
  dataset: {name: org/data}
"""

YAML: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("a data set as a text", "{name: org/data}", "org/data", ("job.yaml:7", "spec.dataset", "dataset: {name: org/data}")),
    ("a file as a text", "{name: org/data}", "./rows.jsonl", ("spec.dataset", "dataset: {path: ./rows.jsonl}")),
    ("rows as a list", "{name: org/data}", "[{prompt: a}]", ("spec.dataset", "inline")),
    ("a reward as a text", "sft", "grpo\n  reward: exact_match", ("spec.reward", "reward: {builtin: exact_match}")),
    ("a function as a text", "sft", "grpo\n  reward: my.module:fn", ("spec.reward", "reward: {function: my.module:fn}")),
    ("an output as a text", "sft", "sft\n  output: my-claim", ("spec.output", "output: {claim: my-claim}")),
    ("a store as a text", "sft", "sft\n  output: s3://bucket/x", ("spec.output", "output: {uri: s3://bucket/x}")),
    ("a function without a name", "sft", "grpo\n  reward: {function: a.b}", ("spec.reward.function", "my_package.rewards:score")),
    ("an environment as a mapping", "sft", "sft\n  env: {A: b}", ("spec.env", "must be a list, one entry for each")),
    ("a number that is yes", "sft", "sft\n  training: {maxSteps: yes}", ("spec.training.maxSteps", "not true or false")),
    ("settings as a text", "sft", "sft\n  training: fast", ("spec.training", "maxSteps")),
    ("a misspelt field", "sft", "sft\n  training: {maxStep: 3}", ("spec.training.maxStep", "did you mean maxSteps")),
    ("a field of Python", "sft", "sft\n  training: {max_steps: 3}", ("spec.training.max_steps", "did you mean maxSteps")),
    ("a name of TRL", "sft", "sft\n  training: {numTrainEpochs: 3}", ("spec.training.numTrainEpochs", "training.maxEpochs")),
    ("a field in another section", "sft", "sft\n  maxSteps: 3", ("spec.maxSteps", "belongs to spec.training.maxSteps")),
    ("adapters without a rank", "sft", "sft\n  training: {loraAlpha: 3}", ("spec.training", "lora_rank")),
    ("no model", "  model: org/model\n", "", ("spec.model", "missing")),
    ("a number of words", "sft", "sft\n  training: {maxSteps: many}", ("spec.training.maxSteps", "many", "integer")),
    ("another kind", "RLTrainingJob", "Job", ("kind", "RLTrainingJob")),
    ("another version", "v1alpha1", "v1", ("apiVersion", "nemo-rl.io/v1alpha1")),
    ("a key twice", "sft", "sft\n  model: other", ("model", "given twice")),
    ("a broken indent", "  algorithm: sft", " algorithm: sft", ("job.yaml:", "YAML")),
    ("a name that is none", "{name: sums}", "{name: Sums_1}", ("metadata.name", "lower-case")),
    ("no name", "{name: sums}", "{}", ("metadata.name", "missing")),
    ("an empty file", JOB, "", ("empty",)),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), [y[1:] for y in YAML], ids=[y[0] for y in YAML])
def test_a_mistake_in_a_job_is_answered_with_its_place(old: str, new: str, words: tuple[str, ...]) -> None:
    from nemo_rl.job.manifest import ManifestError, parse_manifest

    assert old in JOB
    with pytest.raises(ManifestError) as caught:
        parse_manifest(JOB.replace(old, new, 1))
    said = str(caught.value)
    assert not [word for word in words if word not in said], said
    assert "instance of" not in said


@pytest.mark.parametrize("name", ["GRPOTrainer", "SFTTrainer", "DPOTrainer"])
@pytest.mark.parametrize("given", ["org/model", 3])
def test_a_trainer_made_of_a_model_leads_to_from_pretrained(name: str, given: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}\.from_pretrained\(") as caught:
        getattr(nemo_rl, name)(given)
    assert "RLTrainingJobSpec" in str(caught.value)
