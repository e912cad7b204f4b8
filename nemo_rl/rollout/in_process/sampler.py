"""Sampling of next tokens from logits by keyed uniform numbers: a completion depends on its key, never on its neighbours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64-bit numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed_uniforms(seed: int, step: int, prompts_B: list[int], samples_B: list[int], length: int) -> Tensor:
    """Returns uniform numbers in [0, 1), (B, length), float32: entry (b, t) depends on seed, step, the prompt's and the
    sample's number and the position t alone."""
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) + _GOLDEN)
        key = _mix(key + np.uint64(step) * _GOLDEN + np.uint64(1))
        rows = _mix(key + np.asarray(prompts_B, dtype=np.uint64) * _GOLDEN + np.uint64(2))
        rows = _mix(rows + np.asarray(samples_B, dtype=np.uint64) * _GOLDEN + np.uint64(3))
        bits = _mix(rows[:, None] + (np.arange(length, dtype=np.uint64) + np.uint64(1))[None] * _GOLDEN)
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def filter_logits(logits_BV: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Returns the logits with all but the k likeliest tokens, then all outside the top-p nucleus, at minus infinity.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p (arXiv 1904.09751); the likeliest
    token always stays.
    """
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kept, where = logits_BV.topk(top_k, dim=-1)
        logits_BV = torch.full_like(logits_BV, float("-inf")).scatter_(-1, where, kept)
    if top_p < 1.0:
        ordered, where = logits_BV.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
        logits_BV = torch.empty_like(logits_BV).scatter_(-1, where, ordered)
    return logits_BV


def sample(
    logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns a token for each row and its log-probability, both (B,), by inversion of the cumulative distribution.

    The log-probability is that of the whole temperature-scaled distribution, as the trainer computes it; top_k and top_p
    only restrict which tokens can be drawn.
    """
    logits = logits_BV.float()
    if temperature != 1.0:
        logits = logits / temperature
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    if top_k is None and top_p >= 1.0:
        cumulative = weights.cumsum(-1)
        total = cumulative[:, -1:]
    else:
        kept = (filter_logits(logits, top_k, top_p) - top).exp_()
        cumulative, total = kept.cumsum(-1), weights.sum(-1, keepdim=True)
    threshold = uniforms_B[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    logprobs = logits.gather(-1, tokens) - top - total.log()
    return tokens.squeeze(-1), logprobs.squeeze(-1)


def argmax(logits_BV: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the likeliest token of each row and its log-probability, both (B,)."""
    logits = logits_BV.float() / temperature
    tokens = logits.argmax(-1)
    return tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
