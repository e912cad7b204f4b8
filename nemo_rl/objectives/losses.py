"""The losses of GRPO, DPO and SFT as pure functions of token log-probabilities.

No function here averages: each returns one value per token or pair, and the trainer multiplies it by a weight that comes
from the whole optimizer batch. So micro-batching, packing and the number of ranks never change a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossType = Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"]

KL_INPUT_CLAMP = 20.0
KL_OUTPUT_CLAMP = 10.0


def clipped_policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the clipped surrogate loss of each token, the probability ratio, and which tokens were clipped; all (N,).

    PPO (arXiv 1707.06347, eq. 7) with separate bounds (clip-higher, DAPO, arXiv 2503.14476):

        ratio = exp(logp - old_logp);  loss = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)

    and for negative advantages at most -dual_clip * A (dual clip, arXiv 1912.09729).
    """
    ratio = (logprobs_N - old_logprobs_N).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    unclipped, clipped = -ratio * advantages_N, -clipped_ratio * advantages_N
    is_clipped = clipped > unclipped
    # not maximum(): where both are equal it would halve the gradient at the edge of the interval
    loss = torch.where(is_clipped, clipped, unclipped)
    if dual_clip is not None:
        loss = torch.where(advantages_N < 0, torch.minimum(loss, -dual_clip * advantages_N), loss)
    return loss, ratio, is_clipped


def sequence_policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    rows_N: Tensor,
    num_sequences: int,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the clipped loss of GSPO at each token, the ratio of its sequence, and which were clipped; all (N,).

    GSPO (arXiv 2507.18071, eq. 5 and 7): the ratio is one number for a whole sequence, its geometric mean per token,

        s_i = exp(mean_t (logp_t - old_logp_t));  loss_i = -min(s_i * A_i, clip(s_i, 1 - clip_low, 1 + clip_high) * A_i)

    and every token of sequence i has loss_i, so that the mean over its tokens is the sequence's. `rows_N` is the number of
    the sequence of each token. Ratios of sequences are near 1: the paper clips at 3e-4 and 4e-4.
    """
    difference = logprobs_N - old_logprobs_N
    sums = difference.new_zeros(num_sequences).index_add(0, rows_N, difference)
    counts = difference.new_zeros(num_sequences).index_add(0, rows_N, torch.ones_like(difference))
    log_ratio = (sums / counts.clamp(min=1))[rows_N]
    zeros = torch.zeros_like(log_ratio)
    return clipped_policy_loss(
        log_ratio, zeros, advantages_N, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def weighted_policy_loss(
    logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss of CISPO at each token, the probability ratio, and which ratios were clipped; all (N,).

    CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5) clips the weight of a token and keeps its gradient:

        loss = -sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logp

    with sg the stop of the gradient. The paper has no lower bound, which is clip_low = 1.
    """
    ratio = (logprobs_N - old_logprobs_N).exp()
    clipped_ratio = ratio.detach().clamp(1 - clip_low, 1 + clip_high)
    return -clipped_ratio * advantages_N * logprobs_N, ratio, clipped_ratio != ratio.detach()


def policy_loss(
    loss_type: LossType,
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    rows_N: Tensor,
    num_sequences: int,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss, ratio and what was clipped of each token by the function that `loss_type` names; all (N,).

    gspo: `sequence_policy_loss`; cispo: `weighted_policy_loss`; dapo, grpo and dr_grpo: `clipped_policy_loss`, and differ
    by their `token_weights`.
    """
    values = (logprobs_N, old_logprobs_N, advantages_N)
    if loss_type == "cispo":
        return weighted_policy_loss(*values, clip_low=clip_low, clip_high=clip_high)
    bounds = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    if loss_type == "gspo":
        return sequence_policy_loss(*values, rows_N, num_sequences, **bounds)  # type: ignore[arg-type]
    return clipped_policy_loss(*values, **bounds)  # type: ignore[arg-type]


def kl_estimate(
    logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    kind: Literal["k1", "k2", "k3"],
    *,
    input_clamp: float | None = KL_INPUT_CLAMP,
    output_clamp: float | None = KL_OUTPUT_CLAMP,
) -> Tensor:
    """Returns an estimate of KL(policy || reference) per token, (N,), from tokens drawn from the policy.

    Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html), with d = logp_ref - logp:
    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. d and the result are clamped against overflow.
    """
    difference = reference_logprobs_N - logprobs_N
    if input_clamp is not None:
        difference = difference.clamp(-input_clamp, input_clamp)
    if kind == "k1":
        estimate = -difference
    elif kind == "k2":
        estimate = 0.5 * difference.square()
    else:
        estimate = torch.expm1(difference) - difference
    return estimate if output_clamp is None else estimate.clamp(-output_clamp, output_clamp)


def kl_loss(
    logprobs_N: Tensor, reference_logprobs_N: Tensor, ratio_N: Tensor, kind: Literal["k1", "k2", "k3"]
) -> Tensor:
    """Returns the KL term of each token, (N,), whose gradient is that of the expected divergence.

    Differentiating the estimate alone leaves out that the tokens were drawn from the policy itself (arXiv 2506.09477).
    Multiplying by the probability ratio, whose value is 1 for the sampling policy, adds that term.
    """
    return ratio_N * kl_estimate(logprobs_N, reference_logprobs_N, kind)


def token_weights(lengths: list[int], loss_type: LossType, max_new_tokens: int) -> list[float]:
    """Returns, for each completion, the weight of each of its tokens, so that the batch loss is the sum of weight * loss.

    dapo and cispo: 1 / tokens of the batch (arXiv 2503.14476, eq. 8; 2506.13585, eq. 4); grpo and gspo: mean within each
    completion, then over completions (arXiv 2402.03300, eq. 3; 2507.18071, eq. 5); dr_grpo: 1 / (completions *
    max_new_tokens) (arXiv 2503.20783). `lengths` are those of all completions of the optimizer batch; completions of
    length 0 do not count.
    """
    counted = sum(1 for n in lengths if n)
    if loss_type in ("dapo", "cispo"):
        return [1.0 / max(sum(lengths), 1)] * len(lengths)
    if loss_type in ("grpo", "gspo"):
        return [1.0 / (n * counted) if n else 0.0 for n in lengths]
    return [1.0 / (max(counted, 1) * max_new_tokens)] * len(lengths)


def preference_loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    *,
    beta: float,
    kind: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths_P: Tensor | None = None,
    rejected_lengths_P: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss of each pair and the implicit rewards of its chosen and rejected completion; all (P,).

    Arguments are log-probabilities summed over completion tokens. With s = logp - logp_ref and z = beta (s_c - s_r):
    sigmoid -(1 - e) log sigma(z) - e log sigma(-z) (DPO, arXiv 2305.18290, eq. 7, with label smoothing e: cDPO);
    hinge relu(1 - z) (SLiC, arXiv 2305.10425); ipo ((s_c / n_c - s_r / n_r) - 1 / (2 beta))^2 (arXiv 2310.12036,
    eq. 17, with log-ratios per token, which needs the lengths).
    """
    margin_chosen, margin_rejected = chosen_P - reference_chosen_P, rejected_P - reference_rejected_P
    logits = beta * (margin_chosen - margin_rejected)
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    elif kind == "hinge":
        loss = torch.relu(1 - logits)
    else:
        assert chosen_lengths_P is not None and rejected_lengths_P is not None
        per_token = margin_chosen / chosen_lengths_P - margin_rejected / rejected_lengths_P
        loss = (per_token - 1 / (2 * beta)).square()
    return loss, (beta * margin_chosen).detach(), (beta * margin_rejected).detach()
