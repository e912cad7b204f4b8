"""The tensors of a checkpoint: weights as Hugging Face files, the optimizer's state by torch.distributed.checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from nemo_rl.run import unpickle
from nemo_rl.run.dtypes import Dtypes, dtypes_of
from nemo_rl.run.gathering import GatheredWeights, adapter_weights, base_name, is_lora
from nemo_rl.run.processes import is_distributed, is_rank_zero

log = logging.getLogger(__name__)

ADAPTER = "adapter"
_MASTER = "master"
FILE_BYTES = 2 * 2**30
"""A sharded model is saved in files of about this size, which the first rank makes one after the other."""

# --- the model ------------------------------------------------------------------------------------------------------


def save_model(path: Path, model: Any) -> None:
    """The Hugging Face files, in the dtype that the model had when it was loaded; of a LoRA model the merged weights, and
    the adapter beside them as it is. Every rank calls it."""
    if is_lora(model):
        adapter = adapter_weights(model)
        if is_rank_zero():
            with _quiet_transformers():
                model.save_pretrained(path / ADAPTER, state_dict=adapter, save_embedding_layers=False)
    if is_lora(model) or any(isinstance(p, DTensor) for p in model.parameters()):
        _save_parts(path, GatheredWeights(model), dtypes_of(model))
        return
    weights, dtypes = _state_dict_on_cpu(model), dtypes_of(model)
    if not is_rank_zero():
        return
    with _quiet_transformers(), _valid_generation_config(model):
        main = _to_saved_dtypes(weights, dtypes)
        model.save_pretrained(path, state_dict=weights)
        if main is not None:
            _say_dtype(path / "config.json", main)


# --- a sharded or adapted model, part by part


def _save_parts(path: Path, weights: GatheredWeights, dtypes: Dtypes) -> None:
    """Writes a model block by block: the first rank never holds more of it than one file and one block."""
    from transformers.core_model_loading import revert_weight_conversion

    saved, main = _saved_dtypes(weights, dtypes)
    files = _Files(path) if is_rank_zero() else None
    failure: OSError | None = None
    for names in weights.by_block():
        part = {}
        for name in names:
            tensor = weights.whole(name)
            if files is not None and failure is None:
                part[name] = tensor.to("cpu", saved.get(name, weights.tensors[name].dtype), copy=True)
            del tensor
        if files is not None and failure is None:
            try:
                files.add(revert_weight_conversion(weights.model, part))
            except OSError as error:  # the other ranks go on gathering, and so must this one
                failure = error
    if failure is not None:
        raise failure
    if files is not None:
        model = weights.model
        with _quiet_transformers(), _valid_generation_config(model), _untied_where_needed(weights):
            model.save_pretrained(path, state_dict={})  # all but the weights
        files.close()
        if main is not None:
            _say_dtype(path / "config.json", main)


def _saved_dtypes(weights: GatheredWeights, dtypes: Dtypes) -> tuple[dict[str, torch.dtype], torch.dtype | None]:
    """In which dtypes the weights are saved, by name, and the first of them; none and None where all stay as they are."""
    if not dtypes.narrow:
        return {}, None
    floating = [name for name, tensor in weights.tensors.items() if tensor.is_floating_point()]
    found = {name: dtypes.saved(name) for name in floating}
    saved = {name: dtype for name, dtype in found.items() if dtype is not None}
    half = [name for name, dtype in saved.items() if dtype == torch.float16]
    if half and (most := _largest(weights, half)) > torch.finfo(torch.float16).max:
        log.warning("the checkpoint is saved in float32: a weight has grown to %.3g, more than float16 can hold", most)
        return {}, None
    return saved, next(iter(saved.values()), None)


def _largest(weights: GatheredWeights, names: list[str]) -> float:
    """The largest absolute value in these weights, of all ranks."""
    adapted = set(weights.adapted)
    most = torch.zeros(())
    for name in names:
        tensor: Any = weights.whole(name) if name in adapted else weights.tensors[name].detach()
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if part.numel():
            most = torch.maximum(most.to(part.device), part.abs().max().float())
    if is_distributed():
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return most.item()


class _Files:
    """Safetensors files that are written as they are full, and their index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: dict[str, Tensor] = {}
        self.written: list[list[str]] = []
        self.bytes = self.numbers = 0

    def add(self, weights: dict[str, Tensor]) -> None:
        self.open |= {name: tensor.contiguous() for name, tensor in weights.items()}
        if _bytes(self.open) >= FILE_BYTES:
            self._write()

    def close(self) -> None:
        """Gives the files the names by which they are loaded; one alone needs no index."""
        if self.open or not self.written:
            self._write()
        count = len(self.written)
        if count == 1:
            self._name(0).replace(self.path / "model.safetensors")
            return
        (self.path / "model.safetensors").unlink(missing_ok=True)
        where = {}
        for i, names in enumerate(self.written):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._name(i).replace(self.path / file)
            where |= dict.fromkeys(names, file)
        about = {"total_size": self.bytes, "total_parameters": self.numbers}
        index = json.dumps({"metadata": about, "weight_map": where}, indent=2, sort_keys=True)
        (self.path / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")

    def _write(self) -> None:
        save_file(self.open, self._name(len(self.written)), metadata={"format": "pt"})
        self.bytes += _bytes(self.open)
        self.numbers += sum(tensor.numel() for tensor in self.open.values())
        self.written.append(list(self.open))
        self.open = {}

    def _name(self, number: int) -> Path:
        return self.path / f"part-{number + 1}.safetensors"


def _bytes(weights: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def _to_saved_dtypes(weights: dict[str, Tensor], dtypes: Dtypes) -> torch.dtype | None:
    """Replaces the weights by themselves in the dtypes in which they are saved, one after the other; returns the dtype of
    the first, or None where all stay as they are. Tied weights stay one tensor."""
    if not dtypes.narrow:
        return None
    groups: dict[Any, list[str]] = {}
    for name, tensor in weights.items():
        dtype = dtypes.saved(name)
        if dtype is None or not tensor.is_floating_point():
            continue
        if dtype == torch.float16 and (largest := tensor.abs().max().item()) > torch.finfo(dtype).max:
            log.warning(
                "the checkpoint is saved in float32: %s has grown to %.3g, more than float16 can hold", name, largest
            )
            return None
        shared = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        groups.setdefault((dtype, shared), []).append(name)
    for (dtype, _), names in groups.items():
        weights.update(dict.fromkeys(names, weights[names[0]].to(dtype)))
    return next((dtype for dtype, _ in groups), None)


def _say_dtype(file: Path, dtype: torch.dtype) -> None:
    """Writes the dtype of the files into their configuration, where transformers writes that of the model in memory."""
    config = json.loads(file.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")

    def write(part: dict[str, Any]) -> None:
        for key, value in part.items():
            if key == "dtype" and value == "float32":
                part[key] = name
            elif isinstance(value, dict):
                write(value)

    write(config)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_model(path: Path, model: Any) -> None:
    """Copy the saved weights into `model`, in place, as the files have them; into a LoRA model its adapter alone.

    Where the files are narrower than the weights, the optimizer's state has the rest.
    """
    if is_lora(model):
        _load_adapter(path / ADAPTER / "adapter_model.safetensors", model)
        return
    weights: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights.update(load_file(file))
    expected = model.state_dict()
    present = {_storage(tensor) for name, tensor in expected.items() if name in weights}
    # A weight that is not in the file may be tied to one that is.
    missing = [name for name, tensor in expected.items() if name not in weights and _storage(tensor) not in present]
    if missing or not expected.keys() >= weights.keys():
        # The architecture is saved under other names than its modules have (fused experts, for example).
        with _quiet_transformers():
            weights = type(model).from_pretrained(path, dtype=model.dtype, use_safetensors=True).state_dict()
        missing = sorted(expected.keys() - weights.keys())
    if missing or any(name not in expected or expected[name].shape != weights[name].shape for name in weights):
        raise ValueError(
            f"{path} holds the weights of another model than this {type(model).__name__}; "
            "resume with the model that the run began with"
        )
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def _state_dict_on_cpu(model: Any) -> dict[str, Tensor]:
    """All weights of a model that no ranks share, on the CPU; nothing on the ranks beyond the first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Gathered shards of tied weights are separate tensors; as one they are saved once, as without shards.
    for first, *tied in names.values():
        weights |= {name: weights[first] for name in tied if name in weights and first in weights}
    return weights


def _storage(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.data_ptr()


@contextlib.contextmanager
def _untied_where_needed(weights: GatheredWeights) -> Iterator[None]:
    """Says in the saved configuration that the output layer has weights of its own, if an adapter set one of two tied apart."""
    model = weights.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    apart = all(base_name(f"{names.get(id(module), '')}.weight") in weights.tensors for module in (embedding, head))
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    tied = [c for c in configs if getattr(c, "tie_word_embeddings", False)]
    if not apart:
        tied = []
    try:
        for config in tied:
            config.tie_word_embeddings = False
        yield
    finally:
        for config in tied:
            config.tie_word_embeddings = True


def _load_adapter(file: Path, model: Any) -> None:
    from peft import set_peft_model_state_dict

    if not file.exists():
        raise ValueError(f"{file} does not exist, but lora_rank is set; resume with the settings the run began with")
    outcome = set_peft_model_state_dict(model, load_file(file))
    if outcome.unexpected_keys or any(".lora_" in name for name in outcome.missing_keys):
        raise ValueError(f"{file} has adapters of other layers; resume with the settings the run began with")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers in the middle of ours."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _valid_generation_config(model: Any) -> Iterator[None]:
    """transformers refuses to save what it loaded without complaint, such as a temperature without do_sample.

    Such a model of the hub must not end the run at its first checkpoint: it is saved with do_sample=True.
    """
    original = getattr(model, "generation_config", None)
    if original is not None:
        try:
            original.validate(strict=True)
        except ValueError:
            model.generation_config = type(original).from_dict({**original.to_dict(), "do_sample": True})
    try:
        yield
    finally:
        if original is not None:
            model.generation_config = original


# --- the optimizer --------------------------------------------------------------------------------------------------


def optimizer_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The hyperparameters of each parameter group and the number of its parameters, JSON-able; [] without optimizer."""
    if optimizer is None:
        return []
    return [
        {"count": len(g["params"]), **{k: v for k, v in g.items() if k not in ("params", "param_names")}}
        for g in optimizer.param_groups
    ]


def save_optimizer(path: Path, optimizer: Any, model: Any = None) -> None:
    """The state tensors as `<place of the parameter>.<name>`, sharded as they are. Every rank calls it.

    Where the model's files hold less of the weights than training has, the weights themselves are there too, as `master`.

    Not torch's get_optimizer_state_dict: it takes a step with zero gradients when there is no state yet, which
    would change a run that saves before its first step.
    """
    # One tensor that is always there keeps the directory readable when the optimizer has no state yet.
    tensors = {"format": torch.tensor(1)}
    masters = model is not None and not is_lora(model) and dtypes_of(model).narrow
    for place, (parameter, _) in enumerate(_parameters(optimizer)):
        if masters:
            tensors[f"{place}.{_MASTER}"] = parameter.detach()
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{place}.{name}"] = value
    with _one_process_is_no_surprise():
        dcp.save(tensors, checkpoint_id=path, no_dist=not is_distributed())


def load_optimizer(path: Path, groups: list[dict[str, Any]], optimizer: Any) -> None:
    """Bring back state tensors, hyperparameters and, where they are there, the weights themselves, in place.

    The number of ranks may differ from the saving one.
    """
    counts, saved_counts = [len(g["params"]) for g in optimizer.param_groups], [g["count"] for g in groups]
    if counts != saved_counts:
        raise ValueError(
            f"{path} holds an optimizer with {saved_counts} parameters by group, this one has {counts}; "
            "resume with the settings that the run began with"
        )
    parameters = _parameters(optimizer)
    tensors: dict[str, Any] = {}
    reader = SafeReader(path)
    for key, about in reader.read_metadata().state_dict_metadata.items():
        place, _, name = key.partition(".")
        if name:
            parameter, group = parameters[int(place)]
            if name == _MASTER and about.size == parameter.shape and about.properties.dtype == parameter.dtype:
                tensors[key] = parameter.detach()  # read in place
                continue
            tensors[key] = _empty_state(f"{path}: {name} of parameter {place}", about, parameter, group)
    with _one_process_is_no_surprise():
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=not is_distributed())
        except CheckpointException as error:  # no Exception: handlers of errors would let it pass
            raise next(iter(error.failures.values()))[0] from None
    optimizer.state.clear()
    for key, tensor in tensors.items():
        place, _, name = key.partition(".")
        if name != _MASTER:
            optimizer.state[parameters[int(place)][0]][name] = tensor
    for group, stored in zip(optimizer.param_groups, groups, strict=True):
        for name, value in stored.items():
            if name != "count":
                group[name] = tuple(value) if isinstance(value, list) else value


class SafeReader(dcp.FileSystemReader):
    """Reads a checkpoint of torch.distributed.checkpoint without running what its files say.

    ForbiddenPickle for an index that is more than one; ValueError for one that leads out of the folder, and for tensors that
    are none. They are read by torch.load(weights_only=True).
    """

    def read_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_data(*args, **kwargs)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            damaged = "PytorchStreamReader" in str(error) or "corrupt" in str(error)
            if isinstance(error, RuntimeError) and not damaged:  # memory that ran out, a signal
                raise
            raise ValueError(
                f"the files in {self.path} hold something else than the optimizer's tensors ({type(error).__name__}): they are "
                "damaged, or somebody else wrote them. Nothing of them was run; go on from an earlier checkpoint, or start the "
                "run again without this one, and see who may write there"
            ) from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with open(path, "rb") as stream:
            found = unpickle.load(stream, str(path))
        if not isinstance(found, Metadata):
            raise ValueError(f"{path} holds a {type(found).__name__}; expected the index of a checkpoint")
        for info in (found.storage_data or {}).values():
            name = PurePosixPath(info.relative_path)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{path} names {info.relative_path!r}, which is not in its folder")
            if info.transform_descriptors:
                raise ValueError(f"{path} asks for {info.transform_descriptors}; expected plain tensors")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


@contextlib.contextmanager
def _one_process_is_no_surprise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _parameters(optimizer: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The parameters in order, each with its group: their places in this list name them on disk."""
    if optimizer is None:
        return []
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]


def _empty_state(what: str, about: Any, parameter: Any, group: dict[str, Any]) -> Tensor:
    """A tensor to load into: sharded and placed as the parameter is, the step counter as torch places it."""
    dtype = about.properties.dtype
    if about.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if len(about.size) == 0:
        # Only the fused and capturable kernels keep the counter beside the parameter.
        beside = group.get("fused") or group.get("capturable")
        return torch.zeros((), dtype=dtype, device=parameter.device if beside else "cpu")
    raise ValueError(
        f"{what} has shape {list(about.size)}, the parameter has {list(parameter.shape)}; "
        "resume with the model that the run began with"
    )
