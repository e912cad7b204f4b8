"""Importance correction: tokens that another engine or an older version of the weights drew, weighed for the policy that is trained.

Rollouts and training pass never agree exactly (other kernels, other precision, weights some steps old). How far they are
apart is always measured; what is done about it is chosen by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

QUANTILES = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


def importance_weights(
    logprobs_N: Tensor,
    sampled_logprobs_N: Tensor,
    rows_N: Tensor,
    num_sequences: int,
    kind: Correction,
    *,
    low: float | None = None,
    high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the factor of each token's loss, and which tokens the bounds have changed; both (N,), without gradient.

    With log-probabilities of the training pass before the update and those under which the token was really drawn,

        w_t = exp(logp_t - logp_sampled_t)          for token_*,
        w_i = exp(sum_t (logp_t - logp_sampled_t))  for sequence_* (all tokens of a sequence have the same factor),

    truncate clamps w to [low, high] (truncated importance sampling: Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training"; Ionides 2008), mask gives tokens outside of [low, high] the factor 0 (IcePop, arXiv
    2510.18855; masked importance sampling of sequences, Liu et al. 2025, "When Speed Kills Stability").
    `rows_N` is the number of the sequence of each token. A sampled log-probability of NaN is one that was not measured: such
    a token has the ratio 1.
    """
    difference = _difference(logprobs_N, sampled_logprobs_N).nan_to_num(nan=0.0)
    if kind == "none":
        return torch.ones_like(difference), torch.zeros_like(difference, dtype=torch.bool)
    if kind.startswith("sequence"):
        sums = difference.new_zeros(num_sequences).index_add(0, rows_N, difference)
        difference = sums[rows_N]
    ratio = difference.exp()
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside |= ratio < low
    if high is not None:
        outside |= ratio > high
    if kind.endswith("mask"):
        return ratio.masked_fill(outside, 0.0), outside
    return ratio.clamp(low, high) if low is not None or high is not None else ratio, outside


class Mismatch(NamedTuple):
    """Sums over the tokens whose sampled log-probability is known, each a tensor of one number."""

    tokens: Tensor
    kl: Tensor
    error: Tensor


def mismatch(logprobs_N: Tensor, sampled_logprobs_N: Tensor) -> Mismatch:
    """Returns how far the training pass is from what sampled: the number of tokens, and sums of two measures over them.

    kl: Schulman's k3 estimate of KL(sampler || trainer), exp(d) - 1 - d with d = logp - logp_sampled, in nats; error: |d|.
    Divide by the tokens for means.
    """
    difference = _difference(logprobs_N, sampled_logprobs_N)
    known = ~difference.isnan()
    difference = difference.nan_to_num(nan=0.0)
    return Mismatch(known.sum(), (torch.expm1(difference) - difference).sum(), difference.abs().sum())


def importance_quantiles(log_weights: Sequence[Tensor]) -> dict[str, float]:
    """Returns quantiles of the importance weights of tokens, as metrics, before anything bounds them.

    `log_weights`: logp - logp_sampled of each token, in any parts, NaN where the second was not measured; {} where all are.
    """
    values = torch.cat([part.flatten() for part in log_weights]) if log_weights else torch.empty(0)
    known = np.exp(values[~values.isnan()].double().clamp(-20.0, 20.0).numpy())
    if not known.size:
        return {}
    found = np.quantile(known, list(QUANTILES.values()))
    return {f"importance_weight_{name}": float(value) for name, value in zip(QUANTILES, found, strict=True)}


def _difference(logprobs_N: Tensor, sampled_logprobs_N: Tensor) -> Tensor:
    return (logprobs_N.detach() - sampled_logprobs_N).clamp(-20.0, 20.0)
