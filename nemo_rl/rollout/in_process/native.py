"""Cached decoding of Llama-like models: fused weights, one cache tensor, prompts computed once for all their samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_rl.model.decoder import NativeDecoder
from nemo_rl.model.policy import Policy


class _Layer:
    """The weights of one layer in the compute dtype, transposed and fused for single-token matrix products."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv = torch.cat([m.weight for m in qkv]).to(dtype).t()
        self.qkv_bias = torch.cat([m.bias for m in qkv]).to(dtype) if qkv[0].bias is not None else None
        self.out = attention.o_proj.weight.to(dtype).t()
        self.out_bias = attention.o_proj.bias
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).to(dtype).t()
        self.gate_up_bias = (
            torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias]).to(dtype) if mlp.gate_proj.bias is not None else None
        )
        self.down = mlp.down_proj.weight.to(dtype).t()
        self.down_bias = mlp.down_proj.bias
        self.norm1 = layer.input_layernorm.weight
        self.norm2 = layer.post_attention_layernorm.weight
        self.q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None


class NativeState:
    """Implements `DecodeState` for the packed decoder. Prompts are padded on the left, so that all rows share a column."""

    one_length = False

    def __init__(self, policy: Policy) -> None:
        assert policy.native is not None
        self.decoder: NativeDecoder = policy.native
        self.device, self.dtype = policy.device, policy.dtype
        self.layers = [_Layer(layer, self.dtype) for layer in self.decoder.backbone.layers]
        self.embedding = self.decoder.backbone.embed_tokens.weight
        self.norm = self.decoder.backbone.norm.weight
        self.head = policy.head.weight.to(self.dtype)
        self.head_bias = getattr(policy.head, "bias", None)
        self.logit_scale = policy.logit_scale

    @contextmanager
    def running(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def bytes_per_row(self, length: int) -> int:
        shape = self.decoder.shape
        return 2 * len(self.layers) * shape.KV * shape.D * length * self.dtype.itemsize

    def prefill(self, prompts: list[list[int]], num_samples: int, max_new_tokens: int) -> Tensor:
        H, KV, D = self.decoder.shape.H, self.decoder.shape.KV, self.decoder.shape.D
        P, width = len(prompts), max(map(len, prompts))
        total = width + max_new_tokens
        rows = P * num_samples
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        padding = torch.tensor([width - len(p) for p in prompts], device=self.device)
        columns = torch.arange(width, device=self.device)
        positions = (columns[None] - padding[:, None]).clamp(min=0)
        visible = columns[None] >= padding[:, None]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        # a padding slot sees itself, or its softmax would be over nothing
        mask = (visible[:, None, :] & causal[None]) | torch.eye(width, dtype=torch.bool, device=self.device)[None]
        cos, sin = self.decoder.rotary(positions.flatten(), self.dtype)
        cos, sin = cos.view(P, width, 1, D), sin.view(P, width, 1, D)
        self.cache = torch.empty(len(self.layers), 2, rows, KV, total, D, dtype=self.dtype, device=self.device)
        x = self.embedding[ids]
        for cache, layer in zip(self.cache, self.layers, strict=True):
            qkv = self._qkv(layer, x.flatten(0, 1)).view(P, width, H + 2 * KV, D)
            qk = _rotate(self._head_norms(layer, qkv[:, :, : H + KV]), cos, sin).transpose(1, 2)
            v = qkv[:, :, H + KV :].transpose(1, 2)
            q, k = qk[:, :H], qk[:, H:]
            spread = cache.view(2, P, num_samples, KV, total, D)
            spread[0, :, :, :, :width], spread[1, :, :, :, :width] = k.unsqueeze(1), v.unsqueeze(1)
            keys, values = k.repeat_interleave(H // KV, 1), v.repeat_interleave(H // KV, 1)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None])
            x = self._finish_layer(layer, x.flatten(0, 1), out.transpose(1, 2).reshape(P * width, H * D)).view(
                P, width, -1
            )
        self.column = width
        self.padding = padding.repeat_interleave(num_samples)
        self.padded = bool((padding > 0).any())
        slots = torch.arange(total, device=self.device)
        hidden_slots = slots[None] < self.padding[:, None]
        self.mask = torch.zeros(rows, 1, 1, total, dtype=self.dtype, device=self.device)
        self.mask.masked_fill_(hidden_slots[:, None, None], float("-inf"))
        return self._logits(x[:, -1]).repeat_interleave(num_samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        H, KV, D = self.decoder.shape.H, self.decoder.shape.KV, self.decoder.shape.D
        rows, column = len(tokens), self.column
        cos, sin = self.decoder.rotary(column - self.padding, self.dtype)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        mask = self.mask[:, :, :, : column + 1] if self.padded else None
        x = self.embedding[tokens]
        for cache, layer in zip(self.cache, self.layers, strict=True):
            qkv = self._qkv(layer, x).view(rows, H + 2 * KV, D)
            qk = _rotate(self._head_norms(layer, qkv[:, : H + KV]), cos, sin)
            keys, values = cache[0, :rows], cache[1, :rows]
            keys[:, :, column], values[:, :, column] = qk[:, H:], qkv[:, H + KV :]
            # query heads of one key head are rows of one product: (rows, KV, H / KV, D)
            q = qk[:, :H].view(rows, KV, H // KV, D)
            scores = torch.matmul(q, keys[:, :, : column + 1].transpose(-1, -2)) * (1 / math.sqrt(D))
            if mask is not None:
                scores += mask
            out = torch.matmul(scores.softmax(-1), values[:, :, : column + 1]).reshape(rows, H * D)
            x = self._finish_layer(layer, x, out)
        self.column += 1
        return self._logits(x)

    def keep(self, rows: Tensor) -> None:
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        if len(moved):
            used = self.column
            self.cache[:, :, moved, :, :used] = self.cache[:, :, rows[moved], :, :used]
        self.padding, self.mask = self.padding[rows], self.mask[rows]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), self.decoder.eps).to(self.dtype)

    def _qkv(self, layer: _Layer, x: Tensor) -> Tensor:
        normed = self._norm(x, layer.norm1)
        return (
            torch.addmm(layer.qkv_bias, normed, layer.qkv)
            if layer.qkv_bias is not None
            else torch.mm(normed, layer.qkv)
        )

    def _head_norms(self, layer: _Layer, qk: Tensor) -> Tensor:
        if layer.q_norm is None or layer.k_norm is None:
            return qk
        H = self.decoder.shape.H
        return torch.cat([self._norm(qk[..., :H, :], layer.q_norm), self._norm(qk[..., H:, :], layer.k_norm)], -2)

    def _finish_layer(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = _add(x, attended, layer.out, layer.out_bias)
        normed = self._norm(x, layer.norm2)
        gate_up = torch.mm(normed, layer.gate_up)
        if layer.gate_up_bias is not None:
            gate_up += layer.gate_up_bias
        gate, up = gate_up.chunk(2, -1)
        return _add(x, F.silu(gate) * up, layer.down, layer.down_bias)

    def _logits(self, x: Tensor) -> Tensor:
        logits = F.linear(self._norm(x, self.norm), self.head).float()
        if self.head_bias is not None:
            logits += self.head_bias
        return logits * self.logit_scale if self.logit_scale != 1.0 else logits


def _add(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and residual.dtype == x.dtype:
        return torch.addmm(residual, x, weight)
    out = residual + torch.mm(x, weight)
    return out if bias is None else out + bias


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.roll(x, x.shape[-1] // 2, -1) * sin
