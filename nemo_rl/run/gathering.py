"""The weights of a model as its checkpoints have them, made whole one after the other: of shards, and of adapters merged."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_LORA_PREFIX = "base_model.model."


def is_lora(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_name(name: str) -> str:
    """The name that a weight has without adapters around it."""
    return ".".join(part for part in name.removeprefix(_LORA_PREFIX).split(".") if part != "base_layer")


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor; every rank calls it for a shard."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """Returns the weights of a LoRA model's adapters, whole and on the CPU, under the names that they have in it. Every rank calls
    it; nothing of the base is gathered."""
    found = model.state_dict(keep_vars=True)
    return {name: whole(tensor).cpu() for name, tensor in found.items() if ".lora_" in name}


class GatheredWeights:
    """The weights and persistent buffers of a checkpoint, by name, of which one at a time is whole.

    Of a LoRA model those of its base, with W + delta in place of W, delta as peft computes it (LoRA, arXiv 2106.09685), or,
    without `merged`, as they are. The training weights are not touched: merging and unmerging in place would change their last
    bits.
    """

    def __init__(self, model: Any, merged: bool = True) -> None:
        self.model: Any = model.get_base_model() if is_lora(model) else model
        """The model that a checkpoint is of."""
        self.tensors: dict[str, Tensor] = {}
        """As training has them, maybe shards, without adapters; tied weights under one name."""
        self.tied: dict[str, str] = {}
        """Further names of tied weights, by the name in `tensors`."""
        self._adapters = _adapters_of(self.model) if is_lora(model) and merged else {}
        found = {
            base_name(name): tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if ".lora_" not in name
        }
        for name in getattr(self.model, "_keys_to_ignore_on_save", None) or ():
            found.pop(name, None)
        for copy, original in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            if copy in found and self._is_one(found, copy, original):
                self.tied[copy] = original
        first: dict[tuple[int, str | None], str] = {}
        for name, tensor in found.items():
            if name in self.tied:
                continue
            # an adapter sets a weight apart from those that it is tied to
            kept = first.setdefault((id(tensor), name if name in self._adapters else None), name)
            if kept == name:
                self.tensors[name] = tensor
            else:
                self.tied[name] = kept

    def _is_one(self, found: dict[str, Tensor], copy: str, original: str) -> bool:
        return found[copy] is found.get(original) and not {copy, original} & self._adapters.keys()

    @property
    def adapted(self) -> list[str]:
        """The names of weights that adapters change."""
        return [name for name in self._adapters if name in self.tensors]

    def whole(self, name: str) -> Tensor:
        """Returns one of them, whole, on the device of the model. Every rank calls it, in the same order."""
        found = whole(self.tensors[name])
        if name not in self._adapters:
            return found
        with torch.no_grad():
            merged = found.float() if found.is_floating_point() else found
            for module in self._adapters[name]:
                for adapter in module.active_adapters:
                    if adapter in module.r:
                        merged = merged + module.get_delta_weight(adapter).to(merged)
        return merged

    def by_block(self) -> list[list[str]]:
        """The names by the block that they are in, in order; those of no block by themselves."""
        parts: dict[str, list[str]] = {}
        for name in self.tensors:
            block = re.match(r".*?\.\d+(?=\.)", name)
            parts.setdefault(block.group() if block else name, []).append(name)
        return list(parts.values())


def _adapters_of(base: Any) -> dict[str, list[Any]]:
    """The LoRA layers of a model by the name of the weight that they change."""
    found: dict[str, list[Any]] = {}
    for name, module in base.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            # a layer, or one parameter of a module, as the weights of all experts together
            target = base_name(f"{name}.{getattr(module, 'parameter_name', 'weight')}")
            found.setdefault(target, []).append(module)
    return found
