"""A model whose trained weights and optimizer state are sharded over the ranks of a run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_rl.run.ranks import Ranks


class ShardedModel:
    """A model whose trained parameters are sharded over the ranks by FSDP2 whenever the optimizer works on them.

    The optimizer's state exists once over all ranks, and frozen parameters stay as they are. For the passes of a step the
    parameters are made whole once, not layer by layer for each micro-batch: rollouts and the packed forward read them
    without FSDP's hooks, ranks may run different numbers of micro-batches, and a step moves each weight and each gradient
    once. During a step each rank therefore holds the whole weights and gradients (8 bytes a trained parameter).
    """

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        """Shards the model in place. Weights must be equal on all ranks."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.mesh = init_device_mesh(device.type, (ranks.size,))
        frozen = {p for p in model.parameters() if not p.requires_grad}
        self.model: Any = fully_shard(model, mesh=self.mesh, reshard_after_forward=False, ignored_params=frozen)
        # Where a path does call the module, its hooks must neither reduce nor reshard: `reduce` does, once a step.
        self.model.set_requires_gradient_sync(False)
        self.model.set_reshard_after_backward(False)
        self.shards = [p for p in self.model.parameters() if p.requires_grad]

    def make_whole(self) -> None:
        """Makes the parameters plain, whole tensors on every rank. Collective unless they are whole already."""
        self.model.unshard()

    def reduce(self) -> None:
        """Leaves the parameters sharded, each with its part of the gradient summed over the ranks.

        A parameter without gradient on all ranks stays without one, as on a single rank.
        """
        from torch.distributed.tensor import DTensor, Partial

        self.model.unshard()
        whole = [p for p in self.model.parameters() if p.requires_grad]
        gradients: list[Tensor | None] = [p.grad for p in whole]
        used = torch.tensor([g is not None for g in gradients], dtype=torch.int32, device=self.mesh.device_type)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        shapes = [p.shape for p in whole]
        for p in whole:
            p.grad = None
        self.model.reshard()
        for i, (shard, is_used) in enumerate(zip(self.shards, used.tolist(), strict=True)):
            if is_used:
                gradient = gradients[i]
                if gradient is None:
                    gradient = torch.zeros(shapes[i], dtype=shard.dtype, device=shard.device)
                partial = DTensor.from_local(gradient, self.mesh, [Partial("sum")], run_check=False)
                shard.grad = partial.redistribute(placements=shard.placements)
            gradients[i] = None
