"""The server's side of a weight update: checks shards before anything is loaded, and loads them shard by shard.

Runs inside vLLM's workers; imports vLLM and torch, and of this package only what needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from nemo_rl.rollout.vllm.fetch import on_disk


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing has to be agreed on before the first update."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """One version of the weights. `source`: a folder, or the address whose children are the shards."""

    source: str
    shards: list[dict[str, Any]]
    """Of each its name, sha256 and size in bytes."""
    tied: dict[str, str] = field(default_factory=dict)
    """Names of weights that are not in the shards by the names of those that they are equal to."""


class SafetensorsEngine(WeightTransferEngine[Init, Update]):
    """Takes weights in the form of a checkpoint from a folder, or from the trainer by HTTP."""

    init_info_cls = Init
    update_info_cls = Update
    loading = False

    def init_transfer_engine(self, init_info: Init) -> None:
        pass

    def start_weight_update(self) -> None:
        """Nothing yet: the model is left as it is until all shards are here and are what they should be."""

    def receive_weights(self, update_info: Update) -> None:
        with on_disk(update_info.source, update_info.shards) as files:
            self.loading = True
            _pack_experts_again(self.model)
            initialize_layerwise_reload(self.model)
            tied = {copy: own for copy, own in update_info.tied.items() if _has(self.model, copy)}
            self.model.load_weights(_tensors(files, tied))

    def finish_weight_update(self) -> None:
        if self.loading:
            finalize_layerwise_reload(self.model, self.model_config)
            self.loading = False

    def shutdown(self) -> None:
        pass


def _pack_experts_again(model: Any) -> None:
    """Has the kernels of experts on the CPU built anew at this load: vLLM 0.32 brings weights into the order that they read only
    when it builds them, and a reload would leave the plain order of a checkpoint in their place."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if getattr(getattr(method, "unquantized_backend", None), "name", "") == "CPU":
            method.moe_kernel = None


def _has(model: Any, name: str) -> bool:
    """Whether the model has a module of its own for a weight as checkpoints name it: some families use the embedding itself
    as their output layer, and refuse the name."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = name if mapper is None else mapper._map_name(name)
    try:
        model.get_submodule((mapped or "").rpartition(".")[0])
    except AttributeError:
        return False
    return mapped is not None


def _tensors(files: list[Path], tied: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    copies: dict[str, list[str]] = {}
    for copy, original in tied.items():
        copies.setdefault(original, []).append(copy)
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - it is no mapping
                tensor = shard.get_tensor(name)
                yield name, tensor
                for copy in copies.get(name, ()):
                    yield copy, tensor
