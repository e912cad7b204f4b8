"""The bytes that a training pass holds, measured without numbers: the pass runs on PyTorch's meta device, whose tensors have
shapes alone, while the bytes of its live tensors are counted."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_rl.job.spec import TrainingSpec
from nemo_rl.model import logprobs
from nemo_rl.model.adapters import add_adapters
from nemo_rl.model.attention import CAUSAL, PackedAttention, Seen, grouped_attention
from nemo_rl.model.attention import Facts as Scores
from nemo_rl.model.norms import make_norms_lean
from nemo_rl.model.packing import PackedBatch, TokenSequence, pack
from nemo_rl.model.sharding import blocks_of

# --- the model on the meta device -------------------------------------------------------------------------------------


def meta_model(config: Any, training: TrainingSpec) -> Any:
    """Returns the model of a configuration without numbers, with adapters if the specification asks for them."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)  # the attention below is noted in it
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=training.trust_remote_code)
        model = model.to(dtype=torch.float32).eval()
        _take_fused_attention(model)
        make_norms_lean(model)
        return add_adapters(model, training) if training.lora_rank is not None else model


def causal_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: Any) -> list[nn.Module]:
    """The parts that are sharded by themselves: the decoder's layers."""
    names = set(getattr(causal_of(model), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


# --- the training pass, counted -------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that come to life within it, each storage once: `now`, and their `peak`."""

    def __init__(self, known: list[Tensor] | None = None) -> None:
        """`known`: tensors that were there before and do not count."""
        super().__init__()
        self.now = self.peak = 0
        self._live = {tensor.untyped_storage()._cdata for tensor in known or ()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does inside comes here
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors and wrappers have none
            return
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        self._live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def measure_pass(
    model: Any,
    sequences: list[TokenSequence],
    dtype: torch.dtype,
    recompute: bool,
    device: str,
    sharded: bool = False,
    head_dtype: torch.dtype | None = None,
) -> int:
    """Returns the bytes that a forward and backward pass over one micro-batch holds at its peak, beside weights and gradients.

    `model` is on the meta device. `device`: which one's chunks of logits. Weights are of `dtype`, and gradients with them.
    `sharded`: gradients of what is outside of blocks count too, from when they are computed to the end of the pass.
    `head_dtype`: of the logits, where it is another one.
    """
    if dtype != torch.float32:
        model = model.to(dtype=dtype)
    inside = {id(p) for block in blocks_of(causal_of(model)) for p in block.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad and (not sharded or id(parameter) in inside):
            parameter.grad = torch.empty_like(parameter)  # a later micro-batch adds to what is there
    known = [t for p in model.parameters() for t in (p.data, p.grad) if t is not None] + list(model.buffers())
    batch = pack(sequences, "meta")
    try:
        with LiveBytes(known) as live, _fused_attention(), _chunks_of(device):
            _logprobs(model, batch, head_dtype or dtype, recompute).sum().backward()
        return live.peak
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        if dtype != torch.float32:
            model.to(dtype=torch.float32)


def _logprobs(model: Any, batch: PackedBatch, dtype: torch.dtype, recompute: bool) -> Tensor:
    """The training pass of `nemo_rl.model.policy`, without what reads numbers."""
    causal = causal_of(model)
    head = causal.get_output_embeddings()
    hidden = (_packed if _runs_packed(causal) else _padded)(causal, batch, recompute)
    return logprobs.token_logprobs(
        hidden.index_select(0, batch.select_S).to(dtype), head.weight, batch.targets_S, bias_V=head.bias
    )


def _runs_packed(causal: Any) -> bool:
    """Whether every layer mixes tokens by attention alone; the proof before step 1 then nearly always finds the packed path right."""
    called: set[nn.Module] = set()

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores) -> Tensor:
        called.add(module)
        return q.new_empty(*q.shape[:3], v.shape[-1]).transpose(1, 2)

    batch = pack([TokenSequence([0] * 4, 1)], "meta")
    try:
        with torch.no_grad():
            _flat_call(causal, batch, attend)
    except Exception:  # a family with attention of its own
        return False
    return len(called) >= max(1, len(layers_of(causal)))


def _flat_call(causal: Any, batch: PackedBatch, attend: Any, recompute: bool = False) -> Tensor:
    """The last hidden states of flat tokens, (N, D), as `nemo_rl.model.policy` runs them."""
    attention = PackedAttention(causal)
    _set_recomputing(causal, recompute, {"context_fn": attention.again})
    inputs = {"input_ids": batch.ids_N[None], "position_ids": batch.positions_N[None]}
    with attention.running(attend):
        ones = torch.ones_like(batch.ids_N)[None]
        return _decoder(causal)(**inputs, attention_mask=ones, use_cache=False).last_hidden_state[0]


def _packed(causal: Any, batch: PackedBatch, recompute: bool) -> Tensor:
    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return grouped_attention(q, k, v, batch, lambda length: CAUSAL, Scores(1.0)).unsqueeze(0)

    return _flat_call(causal, batch, attend, recompute)


def _decoder(causal: Any) -> Any:
    return causal.get_decoder() if hasattr(causal, "get_decoder") else causal.base_model


def _set_recomputing(causal: Any, recompute: bool, options: dict[str, Any]) -> None:
    layers = [m for m in causal.modules() if hasattr(m, "gradient_checkpointing")]
    if recompute:
        enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
        enable({"use_reentrant": False, **options})
    for layer in layers:
        layer.training = recompute


def _padded(causal: Any, batch: PackedBatch, recompute: bool) -> Tensor:
    decoder = _decoder(causal)
    _set_recomputing(causal, recompute, {})
    outputs = []
    for view in batch.views:
        ids = batch.ids_N[view.gather].view(view.rows, view.length)
        positions = torch.arange(view.length, device="meta")[None].expand(view.rows, -1)
        out = decoder(input_ids=ids, position_ids=positions, use_cache=False)
        outputs.append(out.last_hidden_state.flatten(0, 1))
    return torch.cat(outputs).index_select(0, batch.back_N)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Within it attention holds what fused kernels hold: queries, keys, values, outputs and one normaliser a row.

    On the meta device PyTorch would take the kernel that holds all scores. The function itself is replaced, since function modes
    do not reach what checkpointing computes again in the backward pass.
    """
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Fused.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


FUSED = "nemo_rl_fused"
"""Name by which transformers calls `_fused_forward`; attention of another name than its own gets no masks."""


def _take_fused_attention(model: Any) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(FUSED, _fused_forward)
    if model.config._attn_implementation != "sdpa":
        return  # it has no fused attention, and holds its scores
    with contextlib.suppress(ValueError, AttributeError):  # a family with attention of its own keeps it
        model.set_attn_implementation(FUSED)


def _fused_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    return _Fused.apply(query, key, value).transpose(1, 2).contiguous(), None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _chunks_of(device: str) -> Iterator[None]:
    """Within it the output layer takes chunks of the size that it takes on this kind of device."""
    before = logprobs.CHUNK_ELEMENTS_CPU
    if device == "cuda":
        logprobs.CHUNK_ELEMENTS_CPU = logprobs.CHUNK_ELEMENTS_CUDA
    try:
        yield
    finally:
        logprobs.CHUNK_ELEMENTS_CPU = before
