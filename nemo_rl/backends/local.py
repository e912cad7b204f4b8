"""The backend that trains in the calling process."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.alias_generators import to_camel

from nemo_rl.backends import Run
from nemo_rl.errors import DatasetError
from nemo_rl.extras import require
from nemo_rl.job import names, uris
from nemo_rl.job.spec import CallbackSpec, OutputSpec, ResourcesSpec, RLTrainingJobSpec

if TYPE_CHECKING:
    from nemo_rl.api.result import TrainResult

_USED_HERE = {"model", "algorithm", "dataset", "validation_dataset", "reward", "callbacks", "training", "env"}
_USED_HERE |= {"grpo", "rollout", "sft", "dpo"}


def run(run: Run) -> TrainResult:
    """Trains here and returns when it is done. Raises as `Trainer.fit` does; ValueError for what only a cluster has."""
    check(run)
    if dropped := ignored(run):
        say(run.spec, f"only a cluster uses these, ignored here: {', '.join(dropped)}")
    from nemo_rl.api.algorithms import get_algorithm

    if "torch" not in sys.modules:
        say(run.spec, "loading PyTorch and transformers, which takes a while")
    output_dir = run.output_dir
    if run.spec.output.uri is not None and isinstance(output_dir, Path):
        output_dir = uris.joined(run.spec.output.uri, run.name or output_dir.name)
        say(run.spec, f"the run is kept in {output_dir}")
    with _environment(run.spec):
        reward_fn = run.reward_fn if run.reward_fn is not None else _load_reward(run.spec)
        callbacks = [*run.callbacks, *(load_callback(spec) for spec in run.spec.callbacks)]
        trainer = get_algorithm(run.spec.algorithm)(
            run.spec, output_dir=output_dir, model=run.model, tokenizer=run.tokenizer
        )
        if run.spec.output.hub is not None and os.environ.get("RANK", "0") == "0":
            from nemo_rl.api.hub import make_ready

            make_ready(run.spec.output)
        result = trainer.fit(
            run.dataset if run.dataset is not None else run.spec.dataset,
            reward_fn=reward_fn,
            validation_dataset=run.validation_dataset
            if run.validation_dataset is not None
            else run.spec.validation_dataset,
            callbacks=callbacks or None,
            reward_weights=run.spec.reward.weights if run.spec.reward else None,
        )
        if run.spec.output.hub is not None and trainer.ranks.is_first:
            _upload(run.spec, result)
        return result


def _upload(spec: RLTrainingJobSpec, result: TrainResult) -> None:
    """Uploads the result. Where that fails the model is trained all the same, so it is a warning and no error."""
    from nemo_rl.api.hub import upload

    try:
        result.hub_url = upload(spec.output, folder_of(result.checkpoint_path, result.checkpoint_uri))
        say(spec, f"uploaded to {result.hub_url}")
    except Exception as error:
        result.hub_url = ""
        why = next(iter(str(error).splitlines()), "")
        warnings.warn(
            f"the checkpoint was not uploaded to {spec.output.hub} ({type(error).__name__}: {why}); it is in "
            f"{result.shown_checkpoint}, and result.push_to_hub({spec.output.hub!r}) tries again",
            stacklevel=4,
        )


def folder_of(path: str | os.PathLike[str] | None, uri: str | None) -> Path:
    """The folder on this machine with a checkpoint, which is fetched where it is in a store alone."""
    if path is not None and (uri is None or Path(path).is_dir()):
        return Path(path)
    if uri is None:
        raise ValueError("the run has no checkpoint, so there is nothing to upload")
    from nemo_rl.run.sources import local_model

    return local_model(uri)


def say(spec: RLTrainingJobSpec, sentence: str) -> None:
    """Prints one line for the user, unless the log level silences it."""
    if spec.training.log_level in ("debug", "info"):
        print(f"nemo-rl: {sentence}", flush=True)


def check(run: Run) -> None:
    """Refuses what this machine cannot do, before anything is loaded: as `check_places`, MissingPackage for an extra."""
    check_places(run)
    require("training on this machine", "torch")
    if run.spec.training.lora_rank is not None:
        require("lora_rank", "peft")
    if run.spec.training.tensorboard:
        require("tensorboard=True", "tensorboard")
    for name in run.spec.training.report_to:
        require(f"report_to={name!r}", name)
    if run.spec.output.hub is not None:
        require("hub=", "huggingface_hub")


def check_places(run: Run) -> None:
    """Refuses what only a cluster has, and what is not where the job says: ValueError, DatasetError for a missing file."""
    if not run.wait:
        raise ValueError("wait=False needs the kubernetes backend, but this run is local; leave wait at True")
    if (
        run.spec.rollout is not None
        and run.spec.rollout.replicas
        and names.ROLLOUT_ADDRESSES_VARIABLE not in os.environ
    ):
        raise ValueError(
            "rollout replicas are pods on a cluster, but this run is local; give rollout_python, an interpreter that has vLLM, "
            "or urls of servers"
        )
    for field, reference in _references(run.spec):
        if reference.startswith(("pvc://", "bundle://")):
            raise ValueError(
                f"{field} {reference!r} names storage of a cluster, but this run is local; give a local path"
            )
    model = run.spec.model
    if run.model is None and model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().is_dir():
        raise ValueError(
            f"model {model!r} is not a folder on this machine; expected a hub name or a folder with a model"
        )
    for field, path in _references(run.spec)[1:]:
        if "://" not in path and not Path(path).expanduser().is_file():
            raise DatasetError(
                f"{field} {path!r} is not a file here ({Path.cwd()}); paths are relative to the current directory"
            )


def ignored(run: Run) -> list[str]:
    """Settings that were given and mean something only on a cluster, in order of the specification.

    Each by its keyword, and by its place in YAML where that has another name.
    """
    spec = run.spec
    found = [name for name in RLTrainingJobSpec.model_fields if name in spec.model_fields_set - _USED_HERE]
    for name, section in (("resources", ResourcesSpec), ("output", OutputSpec)):
        if name in found:
            given = getattr(spec, name).model_fields_set
            if name == "resources" and spec.resources.gpus_per_node <= 1:
                given = given - {"gpus_per_node"}  # 0 trains on the CPU here too, and 1 is what is used here
            given = given - {"uri", "hub", "hub_private"}
            at = found.index(name)
            found[at : at + 1] = [f"{name}.{field}" for field in section.model_fields if field in given]
    found = [_known_as(path) for path in found]
    found += [
        f"env {entry.name}" for entry in spec.env if entry.value_from is not None and entry.name not in os.environ
    ]
    return found


def _known_as(path: str) -> str:
    """A setting by its keyword, and in brackets by its place in YAML where that has another name."""
    from nemo_rl.api.keywords import keywords

    section, _, field = path.rpartition(".")
    known = (keyword for places in keywords().values() for keyword in places)
    name = next((keyword.name for keyword in known if (keyword.section, keyword.field) == (section, field)), field)
    place = ".".join(to_camel(part) for part in path.split("."))
    return name if name == place else f"{name} ({place})"


def load_callback(spec: CallbackSpec) -> Any:
    """The callback that `package.module:name` names: an object as it is; a class or factory is called."""
    if spec.function is None:
        raise ValueError(
            "a callback in a bundle needs the kubernetes backend; locally give function: package.module:name"
        )
    module_name, _, path = spec.function.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"callback {spec.function!r} cannot be imported: {error}; expected package.module:name"
        ) from None
    return found() if isinstance(found, type) or not hasattr(found, "on_train_begin") else found


def _references(spec: RLTrainingJobSpec) -> list[tuple[str, str]]:
    """The model, then the paths of the data sets that are files."""
    found = [("model", spec.model)]
    for field in ("dataset", "validation_dataset"):
        data = getattr(spec, field)
        if data is not None and data.path is not None:
            found.append((field, data.path))
    return found


def _load_reward(spec: RLTrainingJobSpec) -> Any:
    if spec.reward is None:
        return None
    from nemo_rl.environments.load import load_reward

    return load_reward(spec.reward, {})


@contextmanager
def _environment(spec: RLTrainingJobSpec) -> Iterator[None]:
    """The literal environment variables of the job, set for the time of the run."""
    wanted = {entry.name: entry.value for entry in spec.env if entry.value is not None}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
