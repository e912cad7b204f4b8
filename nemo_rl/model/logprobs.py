"""Log-probabilities of given tokens from hidden states, without ever holding tokens x vocabulary numbers."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS_CPU = 4 * 2**20
CHUNK_ELEMENTS_CUDA = 128 * 2**20
"""Logits of one chunk of tokens; the peak extra memory is a few times this many floats."""


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Returns log softmax(logits / temperature)[target] of each token, (N,), float32, differentiable.

    logits = softcap * tanh(z / softcap) (z itself without softcap) with z = logit_scale * (hidden @ weight.T + bias).
    The logits are made in chunks of tokens in both passes, so memory does not grow with N x V. Gradients of hidden,
    weight and bias are analytic: onehot - softmax.
    """
    if hidden_ND.shape[0] == 0:
        return (hidden_ND.float().sum() + 0.0 * weight_VD.flatten()[:1].sum()).expand(0)
    return _ChunkedLogprobs.apply(hidden_ND, weight_VD, bias_V, targets_N, temperature, logit_scale, softcap)


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    elements = CHUNK_ELEMENTS_CUDA if device.type == "cuda" else CHUNK_ELEMENTS_CPU
    return max(1, elements // vocabulary)


class _ChunkedLogprobs(torch.autograd.Function):
    """Saves the log-normalisers only, or, where all logits fit into one chunk, the probabilities themselves."""

    @staticmethod
    def _logits(hidden, weight, bias, logit_scale, softcap):
        raw = torch.mm(hidden, weight.t()).float()
        if bias is not None:
            raw += bias.float()
        if logit_scale != 1.0:
            raw *= logit_scale
        return raw if softcap is None else torch.tanh_(raw.div_(softcap)).mul_(softcap)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, logit_scale, softcap):
        rows = _chunk_rows(weight.shape[0], hidden.device)
        compute_weight = weight.to(hidden.dtype)
        out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(out)
        single = hidden.shape[0] <= rows and softcap is None
        probabilities = None
        for i in range(0, hidden.shape[0], rows):
            logits = _ChunkedLogprobs._logits(hidden[i : i + rows], compute_weight, bias, logit_scale, softcap)
            if temperature != 1.0:
                logits /= temperature
            lse = logits.logsumexp(-1)
            normaliser[i : i + rows] = lse
            out[i : i + rows] = logits.gather(-1, targets[i : i + rows, None]).squeeze(-1) - lse
            if single:
                probabilities = logits.sub_(lse[:, None]).exp_()
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, probabilities)
        ctx.scales = (temperature, logit_scale, softcap)
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, targets, normaliser, probabilities = ctx.saved_tensors
        temperature, logit_scale, softcap = ctx.scales
        compute_weight = weight.to(hidden.dtype)
        rows = _chunk_rows(weight.shape[0], hidden.device)
        grad_hidden = torch.empty_like(hidden)
        needs_weight = ctx.needs_input_grad[1]
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        for i in range(0, hidden.shape[0], rows):
            chunk, target = hidden[i : i + rows], targets[i : i + rows, None]
            scale = grad[i : i + rows, None] * (logit_scale / temperature)
            if probabilities is not None:
                d_logits = probabilities * -scale
                capped = None
            else:
                logits = _ChunkedLogprobs._logits(chunk, compute_weight, bias, logit_scale, softcap)
                capped = logits / softcap if softcap is not None else None
                d_logits = logits.div_(temperature).sub_(normaliser[i : i + rows, None]).exp_().mul_(-scale)
            d_logits.scatter_add_(1, target, scale)
            if capped is not None:
                d_logits.mul_(1 - capped.square())
            if grad_bias is not None:
                grad_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            torch.mm(d_logits, compute_weight, out=grad_hidden[i : i + rows])
            if grad_weight is not None:
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(d_logits.t(), chunk)
                else:
                    grad_weight += torch.mm(d_logits.t(), chunk)
        grad_weight = grad_weight.to(weight.dtype) if grad_weight is not None else None
        grad_bias = grad_bias.to(bias.dtype) if grad_bias is not None else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None
