"""Loading of models and tokenizers: device, dtype, threads, adapters."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nemo_rl.job.spec import TrainingSpec
from nemo_rl.model.adapters import add_adapters
from nemo_rl.model.dropout import switch_off_dropout
from nemo_rl.model.kinds import check_kind, describe
from nemo_rl.model.ranges import weights_from_store
from nemo_rl.run.dtypes import remember_dtypes

if TYPE_CHECKING:
    from nemo_rl.model.sharding import ShardedModel

log = logging.getLogger(__name__)

SMALL_HIDDEN_SIZE = 96
"""Below this width a second CPU thread costs more than it brings."""


def choose_device(gpus_per_node: int = 1) -> torch.device:
    """Returns the accelerator of this process, or the CPU where there is none or none is wanted."""
    if gpus_per_node > 0 and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of matrix products: bf16 on CUDA and fp32 on the CPU, unless the specification says otherwise."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def available_cpus() -> float:
    """Returns the CPUs that this process may use: its affinity, and less where a cgroup grants less."""
    cpus = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, int(quota) / int(period))
    except (OSError, ValueError):
        pass
    return max(cpus, 1.0)


def limit_threads(hidden_size: int) -> None:
    """Sets torch's CPU threads to what the machine grants, and to one for tiny models; OMP_NUM_THREADS has precedence."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if hidden_size <= SMALL_HIDDEN_SIZE else max(1, int(available_cpus())))


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a hub name or directory. Raises ValueError if there is none, or one that knows no text."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(_not_loadable("tokenizer", name, error)) from error
    if not tokenizer("Two and two are 4.", add_special_tokens=False)["input_ids"]:
        # transformers makes an empty tokenizer for a model's folder that has none
        raise ValueError(
            f"found no tokenizer in {name!r} (its text becomes no tokens); expected tokenizer.json or the like beside the "
            f"model; save it there with AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained({name!r}), or give it as "
            "tokenizer=..."
        )
    return tokenizer


def load_model(name: str, training: TrainingSpec, device: torch.device) -> nn.Module:
    """Returns the causal language model of a hub name or directory, in fp32 on `device`, without dropout.

    Weights are fp32 whatever the checkpoint's dtype: with bf16 weights, updates at usual learning rates round to nothing.
    Checkpoints of the run are saved in the dtype that plain transformers loads the model in. Raises ValueError if it cannot be loaded.
    """
    model, found = _read(name, training, dtype=torch.float32)
    _check_complete(name, model, found)
    return prepare_model(model, training, device, as_loaded=_plain_dtypes(name, training.trust_remote_code))


def load_sharded(
    name: str,
    training: TrainingSpec,
    device: torch.device,
    shard: Callable[[nn.Module], ShardedModel],
    *,
    dtype: torch.dtype = torch.float32,
    files: str | None = None,
) -> tuple[nn.Module, ShardedModel]:
    """Returns the causal language model of a hub name or directory and its shards, without dropout. Collective.

    `shard` gets the model before its weights are read: then each rank reads its own part of each weight, in `dtype`, from the
    slices of safetensors files, also of those that are left in a store. Files of other kinds are read whole by each rank, which a warning says of a directory. `files`:
    a directory that has the weights, a checkpoint of this model for example.
    """
    folder = Path(files or name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        log.warning(
            "%s has no *.safetensors, so each rank reads all weights whole; save the model anew to load it in parts",
            folder,
        )
    made: list[ShardedModel] = []
    with weights_from_store(files or name), _distributed_by(lambda model: made.append(shard(model)), device):
        from transformers.distributed import DistributedConfig

        model, found = _read(files or name, training, dtype=dtype, distributed_config=DistributedConfig())
    made[0].own_memory()
    del model.config.distributed_config
    model.config._name_or_path = model.name_or_path = name
    _check_complete(name, model, found)
    check_kind(model)
    with weights_from_store(name, values=False):
        dtypes = _plain_dtypes(name, training.trust_remote_code)
    remember_dtypes(model, training.checkpoint_dtype == "fp32", dtypes)
    switch_off_dropout(model)
    model.eval()
    return model, made[0]


@contextmanager
def _distributed_by(shard: Callable[[Any], None], device: torch.device) -> Iterator[None]:
    """Within it transformers, which reads its own part of each weight on each rank, leaves to `shard` which parts there are."""
    from transformers import PreTrainedModel

    def on_device(cls: Any, config: Any, device_map: Any = None) -> tuple[Any, Any, None]:
        return config, device if device.type == "cuda" else None, None

    def distribute(cls: Any, model: Any, config: Any, mesh: Any) -> Any:
        model.tie_weights()
        shard(model)
        return model

    kept = {name: vars(PreTrainedModel).get(name) for name in ("prepare_distribute_model", "maybe_distribute_model")}
    changed: Any = PreTrainedModel
    changed.prepare_distribute_model = classmethod(on_device)
    changed.maybe_distribute_model = classmethod(distribute)
    try:
        yield
    finally:
        for name, method in kept.items():
            delattr(changed, name) if method is None else setattr(changed, name, method)


def _read(name: str, training: TrainingSpec, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a model and what transformers says of its weights. Raises ValueError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    try:
        with _without_progress_bar():
            return AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=training.trust_remote_code, output_loading_info=True, **options
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a file or a family's code raises, the cause is named
        raise ValueError(_not_loadable("model", name, error)) from error


def _plain_dtypes(name: str, trust_remote_code: bool) -> dict[str, torch.dtype] | None:
    """Returns the dtypes in which transformers loads the weights of a model by itself. No weight is read for it."""
    from transformers import AutoModelForCausalLM

    try:
        with _without_progress_bar():
            plain = AutoModelForCausalLM.from_pretrained(
                name, dtype="auto", device_map="meta", trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a family's own code may not know tensors without content
        log.warning("checkpoints will be in float32: %s cannot be loaded without its weights (%s)", name, error)
        return None
    return {weight: tensor.dtype for weight, tensor in plain.state_dict().items() if tensor.is_floating_point()}


def _check_complete(name: str, model: nn.Module, found: Any) -> None:
    """Raises ValueError where weights of the model are not in its files, so that they would be trained from random numbers."""
    check_kind(model)  # of an encoder the output layer is missing, but that is not what is wrong with it
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in sorted(found["missing_keys"]) if name in parameters]
    if missing:
        raise ValueError(
            f"{len(missing)} weights of {describe(model)} are not in the files of {name!r}, so they would start from random "
            f"numbers: {_some(missing)}; config.json and the *.safetensors do not belong together (config.json says "
            f"{_layers(model)} layers); expected a complete model: copy or download its folder again"
        )
    unexpected = [key for key in sorted(found["unexpected_keys"]) if re.search(r"(layers|blocks|h)\.\d+\.", key)]
    if unexpected:
        log.warning(
            "%d weights in the files of %r have no place in %s (%s) and are left out: %s",
            *(len(unexpected), name, describe(model), f"config.json says {_layers(model)} layers", _some(unexpected)),
        )


def _layers(model: nn.Module) -> Any:
    return getattr(model.config.get_text_config(), "num_hidden_layers", "other")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Reading weights from disk takes a moment; a bar for it would tear the run's own display."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def prepare_model(
    model: nn.Module,
    training: TrainingSpec,
    device: torch.device,
    as_loaded: dict[str, torch.dtype] | None = None,
    *,
    adapters: bool = True,
) -> nn.Module:
    """Makes a loaded model ready for training: fp32, on the device, no dropout, adapters if asked. Returns it.

    `as_loaded` has the dtypes of its checkpoints by name; default are those that the weights have now.
    """
    check_kind(model)
    remember_dtypes(model, training.checkpoint_dtype == "fp32", as_loaded)
    model = model.to(device=device, dtype=torch.float32)
    switch_off_dropout(model)
    model.eval()  # no layer of a causal model but dropout depends on the mode; gradients flow in either
    if adapters and training.lora_rank is not None:
        model = add_adapters(model, training)
    return model


def cast_weights(model: nn.Module, dtype: torch.dtype, *, trained: bool = True) -> nn.Module:
    """Casts the weights of a model in place, and returns it. Buffers, such as frequencies of rotary embeddings, stay as precise
    as they are. With `trained=False`, weights that are trained stay too."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (trained or not parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)
    return model


def _not_loadable(what: str, name: str, error: Exception) -> str:
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    folder = Path(name)
    if os.path.sep in name and name.count("/") != 1 and not folder.exists():
        on_hub = re.fullmatch(r"(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)/?.*", name)
        cure = f"of a model on the hub write the name alone: {on_hub[1]}" if on_hub else f"there is no directory {name}"
    elif folder.is_dir():
        cause, cure = _wrong_with(folder, cause)
    else:
        cure = "expected a directory, or the name of a model on the hub that this machine can reach (see HF_TOKEN, HF_HUB_OFFLINE)"
    return f"Cannot load the {what} {name!r}: {cause}; {cure}"


def _wrong_with(folder: Path, cause: str) -> tuple[str, str]:
    """What is wrong with a folder that cannot be loaded, and the cure."""
    again = "expected a complete model: copy or download its folder again"
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        if path.suffix not in (".safetensors", ".bin", ".json", ".model", ".jinja"):
            continue
        with path.open("rb") as stream:
            head = stream.read(64)
        if head.startswith(b"version https://git-lfs"):
            return f"{path.name} is a pointer of Git LFS instead of the file", "fetch the files with: git lfs pull"
        if not head:
            return f"{path.name} is empty", again
        if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return f"{path.name} is a web page", again
    if not (folder / "config.json").exists() and any(path.suffix == ".gguf" for path in files):
        return (
            "it holds a model in GGUF",
            "expected config.json and *.safetensors; take the model that it was made from",
        )
    if "deserializing header" in cause:
        return f"a *.safetensors file in it is damaged or cut off ({cause})", again
    if "ignore_mismatched_sizes" in cause:
        return "its weights have other shapes than its config.json says", again
    if "Weights only load failed" in cause:
        wanted = (
            "expected *.safetensors: take a copy that has them, or save the model anew from a source that you trust"
        )
        return "its weights are pickles that hold more than tensors, and reading those would run their code", wanted
    if "does not recognize this architecture" in cause:
        newer = "a newer transformers may (pip install --upgrade transformers), or trust_remote_code=True if its code lies beside it"
        return cause, newer
    wanted = "expected a Hugging Face directory with config.json, tokenizer files and *.safetensors"
    if not any((folder / name).exists() for name in ("config.json", "tokenizer_config.json", "tokenizer.json")):
        cause = "there is no model in this folder"
        below = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json"))
        if below:
            return cause, f"one is in {below[-1]}: give that folder"
    held = [*(path.name for path in files), *sorted(f"{path.name}/" for path in folder.iterdir() if path.is_dir())]
    more = f" and {len(held) - 8} more" if len(held) > 8 else ""
    return cause, f"{wanted}; it holds {', '.join(held[:8]) or 'nothing'}{more}"
