"""The forward pass of Llama-like models (Llama, Qwen2, Qwen3, Mistral) on packed tokens, over transformers' own weights.

transformers' modules pad, rebuild masks and run each small operation by itself; this path computes the same function on
the flat layout of `nemo_rl.model.packing`, with hand-written gradients for the memory-bound operations. `Policy` compares it
with transformers' result before it is used, and models of other families never take it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemo_rl.model.packing import PackedBatch

FAMILIES = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"}
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose frequencies do not depend on the sequence."""


class _Rotate(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin, with the sign of the rotation folded into sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.roll(grad * sin, grad.shape[-1] // 2, -1).addcmul_(grad, cos), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up from one tensor [gate, up]; keeps only that tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return out


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        scale = scale.pow_(2).div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x32 * scale
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        grad32 = grad.float()
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad32 * normed).flatten(0, -2).sum(0).to(weight.dtype)
        d_normed = grad32 * weight
        mean = (d_normed * normed).mean(-1, keepdim=True)
        return d_normed.addcmul_(normed, mean, value=-1).mul_(scale).to(grad.dtype), d_weight, None


@dataclass(frozen=True)
class Shape:
    """Sizes of the attention heads: H query heads, KV key and value heads, D numbers each."""

    H: int
    KV: int
    D: int


class NativeDecoder:
    """Computes hidden states of a transformers model from that model's own parameters."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError for a model that is not one of FAMILIES in its plain form; see `supports`."""
        reason = unsupported(model)
        if reason:
            raise ValueError(f"no packed forward for this model: {reason}")
        config = model.config
        self.backbone = model.model
        self.shape = Shape(
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )
        self.eps: float = config.rms_norm_eps
        self._tables: tuple[Tensor, Tensor] | None = None

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cos and signed sin, (len(positions), D); the table grows as longer positions appear."""
        rotary = self.backbone.rotary_emb
        needed = int(positions.max()) + 1 if positions.numel() else 1
        if self._tables is None or self._tables[0].shape[0] < needed or self._tables[0].device != positions.device:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # rollouts make it, training saves parts of it for backward
                steps = torch.arange(max(needed, 512) * 2, device=positions.device, dtype=torch.float32)
                angles = torch.outer(steps, rotary.inv_freq.to(positions.device, torch.float32))
                cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
                self._tables = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        cos, sin = self._tables
        return cos[positions].to(dtype), sin[positions].to(dtype)

    def hidden(self, batch: PackedBatch, dtype: torch.dtype, recompute: bool = False) -> Tensor:
        """Returns the final hidden state of each flat token, (N, hidden size), in `dtype`.

        Matrix products run in `dtype`, the residual stream in the weights' own. With `recompute`, activations of each
        layer are made again in the backward pass.
        """
        cos, sin = self.rotary(batch.positions_N, dtype)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        embedding = self.backbone.embed_tokens
        x = F.embedding(batch.ids_N, embedding.weight, embedding.padding_idx)  # the padding token's row is not trained
        for layer in self.backbone.layers:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, x, cos, sin, batch, dtype, use_reentrant=False)
            else:
                x = self._layer(layer, x, cos, sin, batch, dtype)
        return _RMSNorm.apply(x, self.backbone.norm.weight, self.eps).to(dtype)

    def _layer(self, layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch, dtype: torch.dtype):
        attention, mlp = layer.self_attn, layer.mlp
        H, KV, D = self.shape.H, self.shape.KV, self.shape.D
        normed = _RMSNorm.apply(x, layer.input_layernorm.weight, self.eps).to(dtype)
        qkv = _linear(normed, [attention.q_proj, attention.k_proj, attention.v_proj], dtype).view(-1, H + 2 * KV, D)
        if hasattr(attention, "q_norm"):
            q = _RMSNorm.apply(qkv[:, :H], attention.q_norm.weight, self.eps)
            k = _RMSNorm.apply(qkv[:, H : H + KV], attention.k_norm.weight, self.eps)
            qk = torch.cat([q, k], 1).to(dtype)
        else:
            qk = qkv[:, : H + KV]
        qk, v = _Rotate.apply(qk, cos, sin), qkv[:, H + KV :]
        x = _add_linear(x, self._attention(qk, v, batch), attention.o_proj, dtype)
        normed = _RMSNorm.apply(x, layer.post_attention_layernorm.weight, self.eps).to(dtype)
        gate_up = _linear(normed, [mlp.gate_proj, mlp.up_proj], dtype)
        return _add_linear(x, _SwiGLU.apply(gate_up), mlp.down_proj, dtype)

    def _attention(self, qk: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        H, KV, D = self.shape.H, self.shape.KV, self.shape.D
        outputs = []
        for view in batch.views:
            rows, length = view.rows, view.length
            gathered = qk.index_select(0, view.gather).view(rows, length, H + KV, D).transpose(1, 2)
            values = v.index_select(0, view.gather).view(rows, length, KV, D).transpose(1, 2)
            keys, values = _repeat_heads(gathered[:, H:], H // KV), _repeat_heads(values, H // KV)
            # right padding needs no mask: under the causal mask no real token sees a later slot
            out = F.scaled_dot_product_attention(gathered[:, :H], keys, values, is_causal=True)
            outputs.append(out.transpose(1, 2).reshape(rows * length, H * D))
        slots = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return slots.index_select(0, batch.back_N)


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    if times == 1:
        return x
    B, KV, T, D = x.shape
    return x.unsqueeze(2).expand(B, KV, times, T, D).reshape(B, KV * times, T, D)


def _linear(x: Tensor, modules: list[nn.Module], dtype: torch.dtype) -> Tensor:
    """Applies several linear modules to one input as a single matrix product, outputs side by side."""
    weights = [m.weight for m in modules]
    biases = [m.bias for m in modules if m.bias is not None]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = None
    if biases:
        bias = (biases[0] if len(biases) == 1 else torch.cat(biases)).to(dtype)
    return F.linear(x, weight.to(dtype), bias)


def _add_linear(residual: Tensor, x: Tensor, module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Returns residual + module(x); one fused operation where both have the same dtype."""
    if module.bias is None and residual.dtype == dtype:
        return torch.addmm(residual, x, module.weight.to(dtype).t())
    return residual + _linear(x, [module], dtype)


def unsupported(model: nn.Module) -> str | None:
    """Returns why a model cannot take the packed forward, or None if it can."""
    if type(model).__name__ not in FAMILIES:
        return f"{type(model).__name__} is not one of {', '.join(sorted(FAMILIES))}"
    config = model.config
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}, not silu"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        return f"rotary embedding {rope}"
    layer_types = getattr(config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in layer_types) or (
        not layer_types and getattr(config, "sliding_window", None)
    ):
        return "sliding-window attention"
    if type(model.model.embed_tokens) is not nn.Embedding or type(model.lm_head) is not nn.Linear:
        return "its embedding or output layer is wrapped (adapters or quantisation)"
    for layer in model.model.layers:
        linears = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj]
        linears += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
        if any(type(linear) is not nn.Linear for linear in linears):
            return "its linear layers are wrapped (adapters or quantisation)"
        for group in (linears[:3], linears[4:6]):
            if len({linear.bias is None for linear in group}) > 1:
                return "biases on only some of the fused projections"
    return None
