"""`train()`: from one call to a trained model, on this machine or on a cluster."""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from nemo_rl.api.algorithms import algorithm_name
from nemo_rl.api.keywords import LIVE_MODEL, build_spec
from nemo_rl.backends import Run, choose
from nemo_rl.display.notebook import without_warning_of_widgets
from nemo_rl.errors import DatasetError
from nemo_rl.job import uris
from nemo_rl.job.manifest import name_problem, namespace_problem
from nemo_rl.job.spec import LEARNING_RATES, DatasetSpec, GRPOSpec, RewardSpec, RLTrainingJobSpec
from nemo_rl.run.directory import check_output_dir, default_output_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nemo_rl.api.arguments import AlgorithmName, Reward, Rows
    from nemo_rl.api.result import TrainResult
    from nemo_rl.api.typed import TrainKeywords
    from nemo_rl.backends.kubernetes.job import Job
    from nemo_rl.trainers.callbacks import Callback

CALL_KEYWORDS = ("backend", "name", "namespace", "secrets", "tokenizer", "validation_dataset", "wait")
"""Keywords of `train()` that are no setting of the specification."""


class _NotGiven(float):
    """A default that is told from the same number given: by what it is, not by what it is worth."""


DEFAULT_LEARNING_RATE = _NotGiven(LEARNING_RATES["grpo"][0])


@overload
def train(
    model: str | os.PathLike[str] | PreTrainedModel,
    dataset: Rows | None = None,
    reward_fn: Reward | None = None,
    algorithm: AlgorithmName = "grpo",
    max_steps: int = 1000,
    max_epochs: int = 1,
    learning_rate: float = ...,
    batch_size: int = 32,
    num_generations_per_prompt: int = 16,
    output_dir: str | os.PathLike[str] | None = None,
    callbacks: Iterable[Callback] | None = None,
    *,
    wait: Literal[True] = True,
    **kwargs: Unpack[TrainKeywords],
) -> TrainResult: ...
@overload
def train(
    model: str | os.PathLike[str] | PreTrainedModel,
    dataset: Rows | None = None,
    reward_fn: Reward | None = None,
    algorithm: AlgorithmName = "grpo",
    max_steps: int = 1000,
    max_epochs: int = 1,
    learning_rate: float = ...,
    batch_size: int = 32,
    num_generations_per_prompt: int = 16,
    output_dir: str | os.PathLike[str] | None = None,
    callbacks: Iterable[Callback] | None = None,
    *,
    wait: Literal[False],
    **kwargs: Unpack[TrainKeywords],
) -> Job: ...
def train(
    model: str | os.PathLike[str] | PreTrainedModel,
    dataset: Rows | None = None,
    reward_fn: Reward | None = None,
    algorithm: str = "grpo",
    max_steps: int = 1000,
    max_epochs: int = 1,
    learning_rate: float = DEFAULT_LEARNING_RATE,
    batch_size: int = 32,
    num_generations_per_prompt: int = 16,
    output_dir: str | os.PathLike[str] | None = None,
    callbacks: Iterable[Callback] | None = None,
    **kwargs: Any,
) -> TrainResult | Job:
    """Post-trains a language model and returns the result.

    Args:
        model: hub name, local folder, or a transformers model (then give `tokenizer=` too).
        dataset: hub name, file (.jsonl, .json, .parquet, .csv), list of dicts, `datasets.Dataset` or `DataModule`.
        reward_fn: for GRPO. `(prompt, response) -> float`, plus any columns of the data set that it names; also an
            `Environment`, a list of rewards, a dict of name to reward, "package.module:name", or a built-in's name.
        algorithm: "grpo", "sft" or "dpo", in any case of letters.
        max_steps, max_epochs: training ends at whichever comes first.
        learning_rate: peak learning rate of AdamW. Where it is not given: 1e-6 for GRPO, 2e-5 for SFT, 5e-7 for DPO; with
            `lora_rank` 1e-5, 1e-4 and 1e-5.
        batch_size: prompts (GRPO), examples (SFT) or pairs (DPO) per optimizer step.
        num_generations_per_prompt: GRPO completions per prompt.
        output_dir: where checkpoints and metrics go, a folder or s3://, gs:// or az://bucket/folder; default
            ./outputs/{last part of the model's name}.
        callbacks: `Callback` objects.
        **kwargs: every other setting by its name (see the README's table), and `backend`, `name`, `namespace`,
            `secrets`, `tokenizer`, `validation_dataset`, `wait`: with wait=False the call returns the `Job` on the cluster
            at once.

    Raises, before anything starts: ValueError for a missing argument, an unknown algorithm or a value out of range;
    TypeError for an unknown keyword, one of another algorithm, or a reward whose signature cannot work; DatasetError
    for data of the wrong shape. Later: RewardError, NonFiniteTraining, TrainingInterrupted, TrainingFailed.
    """
    chosen = algorithm_name(algorithm)
    _require(model, dataset, reward_fn, chosen)
    if reward_fn is not None and chosen != "grpo":
        warnings.warn(f"train(): {chosen} uses no reward; reward_fn is ignored", UserWarning, stacklevel=2)
        reward_fn = None
    call = {name: kwargs.pop(name) for name in CALL_KEYWORDS if name in kwargs}
    _check_call(call)
    # The signature's default cannot be told from the same value given, so only another one is refused for SFT and DPO.
    if chosen == "grpo" or num_generations_per_prompt != GRPOSpec.model_fields["num_generations_per_prompt"].default:
        kwargs["num_generations_per_prompt"] = num_generations_per_prompt
    spec = build_spec(
        model,
        dataset,
        reward_fn,
        chosen,
        validation_dataset=call.get("validation_dataset"),
        secrets=call.get("secrets", ()),
        also_known=(*CALL_KEYWORDS, *inspect.signature(train).parameters),
        max_steps=max_steps,
        max_epochs=max_epochs,
        batch_size=batch_size,
        **({} if isinstance(learning_rate, _NotGiven) else {"learning_rate": learning_rate}),
        **kwargs,
    )
    chosen_rate = None if spec.training.model_fields_set & {"learning_rate"} else _choose_learning_rate(spec)
    checked_callbacks = _check_callbacks(callbacks)
    if chosen == "grpo":
        _check_rewards(reward_fn, spec.reward.weights if spec.reward else None, dataset)
    run = Run(
        spec,
        _output(output_dir if output_dir is not None else default_output_dir(model)),
        dataset=None if _in_spec(dataset) else dataset,
        validation_dataset=None if _in_spec(call.get("validation_dataset")) else call["validation_dataset"],
        reward_fn=None if isinstance(reward_fn, str | RewardSpec) else reward_fn,
        callbacks=checked_callbacks,
        model=model if spec.model == LIVE_MODEL else None,
        tokenizer=call.get("tokenizer"),
        name=call.get("name"),
        namespace=call.get("namespace"),
        wait=call.get("wait", True),
    )
    if chosen_rate and spec.training.log_level in ("debug", "info"):
        print(f"nemo-rl: {chosen_rate}", flush=True)
    return start(run, call.get("backend"))


def start(run: Run, backend: str | None = None) -> TrainResult:
    """Gives the run to the backend that `choose` picks, and prints one line that says which and why."""
    without_warning_of_widgets()
    name, reason = choose(backend)
    chosen = importlib.import_module(f"nemo_rl.backends.{name}")
    where = "on this machine" if name == "local" else "on the cluster"
    if run.spec.training.log_level in ("debug", "info"):
        print(f"nemo-rl: {run.spec.algorithm} {where} ({reason}), output in {run.output_dir}", flush=True)
    return chosen.run(run)


def _choose_learning_rate(spec: RLTrainingJobSpec) -> str | None:
    """Writes the learning rate of the algorithm into the specification as given, so that every version of nemo-rl takes
    the same. Returns what there is to say about it: nothing where it is the signature's.
    """
    words = spec.default_learning_rate_in_words()
    spec.training.learning_rate = spec.training.learning_rate
    return words


def _require(model: Any, dataset: Any, reward_fn: Any, algorithm: str) -> None:
    if model is None or (isinstance(model, str) and not model.strip()):
        raise ValueError(f"Model is required: found {model!r}; give a hub name, a local folder or a transformers model")
    if dataset is None or (isinstance(dataset, str) and not dataset.strip()):
        raise ValueError(
            f"Dataset is required: found {dataset!r}; give a hub name, a file, a list of dicts or a DataModule"
        )
    if isinstance(dataset, list | tuple) and len(dataset) == 0:
        raise DatasetError("Dataset is required: found a list without rows; give at least one row")
    if reward_fn is None and algorithm == "grpo":
        raise ValueError(
            "reward_fn is required for GRPO: found None; give a function (prompt, response) -> float, "
            "or choose algorithm='sft' or 'dpo'"
        )


def _output(given: Any) -> Any:
    """The folder that output_dir names, or the address of a store as it is."""
    if not isinstance(given, str) or "://" not in given:
        return check_output_dir(given)
    if (wrong := uris.problem(given)) is not None:
        raise ValueError(f"train(): output_dir: {wrong}")
    return given


def _check_call(call: Mapping[str, Any]) -> None:
    for keyword, problem_of in (("name", name_problem), ("namespace", namespace_problem)):
        if call.get(keyword) is not None and (problem := problem_of(call[keyword])):
            raise ValueError(f"train(): {keyword}={call[keyword]!r}: {problem}")
    tokenizer = call.get("tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, str | os.PathLike) and not hasattr(tokenizer, "encode"):
        raise TypeError(
            f"train(): tokenizer has type {type(tokenizer).__name__}; expected a hub name, a folder, or what "
            "AutoTokenizer.from_pretrained(...) returns"
        )
    if not isinstance(call.get("wait", True), bool):
        raise ValueError(f"train(): wait={call['wait']!r}: must be True or False")


def _in_spec(dataset: Any) -> bool:
    return dataset is None or isinstance(dataset, str | os.PathLike | DatasetSpec)


def _check_callbacks(callbacks: Iterable[Any] | None) -> tuple[Any, ...]:
    if callbacks is None:
        return ()
    from nemo_rl.trainers.callbacks import validate_callbacks

    return tuple(validate_callbacks(callbacks))


def _check_rewards(reward_fn: Any, weights: list[float] | None, dataset: Any) -> None:
    """TypeError for a reward that cannot be called with these rows; columns that are not known yet, fit() checks."""
    if isinstance(reward_fn, str | RewardSpec):
        return
    from nemo_rl.environments import bind_rewards

    columns = None
    if isinstance(dataset, list | tuple):
        from nemo_rl.data import to_prompt_rows

        rows, _ = to_prompt_rows(dataset)
        columns = sorted({column for row in rows for column in row.columns})
    try:
        bind_rewards(reward_fn, weights, columns)
    except (TypeError, ValueError) as error:
        raise type(error)(f"train(): reward_fn: {error}") from None
