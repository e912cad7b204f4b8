"""A model over the ranks of a run: sharded block by block (FSDP2), or whole on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_rl.run.ranks import Ranks

T = TypeVar("T")

CPU_NUMBERS_AT_ONCE = 2**18
"""Numbers of a gradient that each rank sends another one at once, between processes without GPUs."""


def is_sharded(sharding: Literal["auto", "full", "none"], ranks: Ranks) -> bool:
    """Whether the ranks of a run share its weights; alone, a rank has nobody to share them with."""
    return sharding != "none" and ranks.size > 1


class Distributed(Protocol):
    """What the optimizer needs of a model that several ranks train."""

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients over the ranks, as far as the passes have not. Collective."""
        ...


class Replicas:
    """A model that is whole on each rank: gradients are summed, and each rank makes the same optimizer step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients; a parameter without gradient on all ranks stays without one, as on a single rank."""
        sum_gradients(parameters)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sums over the ranks the gradients of parameters that are whole on each of them."""
    if not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


# --- FSDP2, block by block --------------------------------------------------------------------------------------------


class ShardedModel:
    """A model of which each rank holds a part of each weight, its gradient and its optimizer state.

    Each block is made whole when a pass comes to it, and its gradient is summed over the ranks as soon as it is there (FSDP2,
    `torch.distributed.fsdp.fully_shard`). All passes therefore go through `run`, and every rank makes the same number of them
    in the same order. Shards stay in the model's dtype; passes see them in `compute_dtype`, gradients are summed in float32.

    Adapters that are added to a sharded model stay whole on each rank: they are small.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device, compute_dtype: torch.dtype) -> None:
        """Shards the model in place. Its weights are equal on all ranks, or on the meta device and loaded later."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self.ranks, self.device, self.compute_dtype = ranks, device, compute_dtype
        mesh = init_device_mesh(device.type, (ranks.size,))
        self._policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": self._policy}
        self.blocks = blocks_of(model)
        for block in self.blocks:
            fully_shard(block, reshard_after_forward=True, **options)
        self.root: Any = fully_shard(_Root(model), **options)
        self._parts: list[Any] = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        gathers, sums = _communication(ranks)
        for part in self._parts:
            part.set_custom_all_gather(gathers)
            part.set_custom_reduce_scatter(sums)
            # losses are weighed by totals of the whole step, so that gradients are summed, not averaged
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
        if hasattr(self.root, "set_reduce_scatter_unused_params"):
            self.root.set_reduce_scatter_unused_params(True)

    def run(self, work: Callable[[], T]) -> T:
        """Returns what `work` returns: forward passes of the model in any form, with gradient where it returns a tensor.

        Weights outside of blocks (embedding, last norm, output layer) are whole within it. Collective.
        """
        found: list[T] = []

        def inside() -> Any:
            found.append(work())
            # hooks on a view would be lost where it is changed in place
            return found[0].clone() if isinstance(found[0], Tensor) else None

        out = self.root(inside)
        self.ranks.settle(self.device)
        if not torch.is_grad_enabled():
            self.reset(keep_gradients=True)
        return cast(T, out) if isinstance(out, Tensor) else found[0]

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients of adapters; those of shards were summed in the backward passes."""
        sum_gradients([p for p in parameters if not _is_shard(p)])

    def own_memory(self) -> None:
        """Copies shards on the CPU that were read: they lie in the mapped files, which may be removed while the run needs them."""
        for parameter in self.root.parameters():
            shard: Any = parameter
            if _is_shard(shard) and shard.device.type == "cpu":
                shard._local_tensor = shard._local_tensor.clone()

    def largest(self, values: Tensor) -> Tensor:
        """Returns the largest of each value over the ranks. Collective."""
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def norm(self, part: Tensor) -> Tensor:
        """Returns the norm of a vector of which each rank has a part. Collective."""
        square = part.square().sum()
        dist.all_reduce(square)
        return square.sqrt()

    def reset(self, keep_gradients: bool = False) -> None:
        """Frees what is whole, and forgets the passes so far, also one that was cut off, with their gradients."""
        self._begin()
        for part in self._parts:
            part.reshard()
        gradients = [(p, p.grad) for p in self.root.parameters() if p.grad is not None] if keep_gradients else []
        if hasattr(self.root, "reset_iter_state"):
            self.root.reset_iter_state()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    def _begin(self) -> None:
        """Has FSDP take in the weights that were loaded since; otherwise the first forward pass does."""
        self.root._get_fsdp_state()._lazy_init()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it all weights are whole on each rank, in the compute dtype, and forward passes without gradient are each
        rank's own. Collective at its begin.
        """
        self._begin()
        try:
            for part in self._parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
            yield
        finally:
            self.reset(keep_gradients=True)
            for part in self._parts:
                part.set_reshard_after_forward(part is not self.root, recurse=False)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within it passes see the weights in float32."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self.compute_dtype == torch.float32:
            yield
            return
        exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._see_weights_as(exact)
        try:
            yield
        finally:
            self._see_weights_as(self._policy)

    def _see_weights_as(self, policy: Any) -> None:
        self.reset()
        for part in self._parts:
            for group in part._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    parameter.mp_policy = policy
                group._init_mp_dtypes()


class _Root(nn.Module):
    """The outermost module: whatever reads weights runs in its forward, where its hooks have made them whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a sharded tensor, and any other one as it is."""
    return cast(Any, tensor).to_local() if _is_shard(tensor) else tensor


def _is_shard(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that are sharded by themselves: the decoder's layers, and the embedding where nothing else has its
    weight. Modules that share a weight with others are left to the root."""
    candidates = _layers_of(model)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if isinstance(embedding, nn.Embedding) and not any(embedding is m for c in candidates for m in c.modules()):
        candidates.append(embedding)
    owners: dict[int, set[int]] = {}
    for i, candidate in enumerate(candidates):
        for parameter in candidate.parameters():
            owners.setdefault(id(parameter), set()).add(i)
    inside = {id(module) for candidate in candidates for module in candidate.modules()}
    for module in model.modules():
        for own in module._parameters.values():
            if own is not None and id(module) not in inside:
                owners.setdefault(id(own), set()).add(-1)
    return [
        candidate
        for candidate in candidates
        if any(True for _ in candidate.parameters())
        and all(len(owners[id(parameter)]) == 1 for parameter in candidate.parameters())
    ]


def _layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers: what transformers says not to split, else what it checkpoints, else the members of its lists."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    names = set(getattr(model, "_no_split_modules", None) or ())
    kinds: list[Callable[[nn.Module], bool]] = [
        lambda module: type(module).__name__ in names,
        lambda module: isinstance(module, GradientCheckpointingLayer),
    ]
    for fits in kinds:
        if found := _outermost(model, fits):
            return found
    return [member for listed in _outermost(model, lambda m: isinstance(m, nn.ModuleList)) for member in listed]


def _outermost(module: nn.Module, fits: Callable[[nn.Module], bool]) -> list[Any]:
    found: dict[int, nn.Module] = {}
    for child in module.children():
        for each in [child] if fits(child) else _outermost(child, fits):
            found[id(each)] = each
    return list(found.values())


# --- what FSDP2 sends -------------------------------------------------------------------------------------------------


def _communication(ranks: Ranks) -> tuple[Any, Any]:
    """Returns how FSDP2 gathers weights and sums gradients: in the ranks' own group for passes, where a rank that waits sees
    that another one left its pass."""
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

    class Allocates:
        def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

    class Gathers(Allocates, AllGather):
        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
            ranks.send(
                input_tensor,
                lambda group: dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=True),
            )

    class Sums(Allocates, ReduceScatter):
        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
        ) -> None:
            if input_tensor.is_cuda:
                ranks.send(
                    input_tensor,
                    lambda group: dist.reduce_scatter_tensor(
                        output_tensor, input_tensor, op=op, group=group, async_op=True
                    ),
                )
                return
            # gloo's own operation cannot be asked whether it is done; sums are in the order of the ranks
            parts = input_tensor.view(ranks.size, -1)
            for start in range(0, parts.shape[1], CPU_NUMBERS_AT_ONCE):
                sent = parts[:, start : start + CPU_NUMBERS_AT_ONCE].contiguous()
                received = torch.empty_like(sent)
                ranks.send(
                    sent,
                    lambda group, received=received, sent=sent: dist.all_to_all_single(
                        received, sent, group=group, async_op=True
                    ),
                )
                torch.sum(received, 0, out=output_tensor[start : start + CPU_NUMBERS_AT_ONCE])

    return Gathers(), Sums()
