"""The losses of GRPO, DPO and SFT as pure functions of token log-probabilities.

No function here averages: each returns one value per token or pair, and the trainer multiplies it by a weight that comes
from the whole optimizer batch. So micro-batching, packing and the number of ranks never change a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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


def token_weights(
    lengths: list[int], loss_type: Literal["dapo", "grpo", "dr_grpo"], max_new_tokens: int
) -> list[float]:
    """Returns, for each completion, the weight of each of its tokens, so that the batch loss is the sum of weight * loss.

    dapo: 1 / tokens of the batch (arXiv 2503.14476, eq. 8); grpo: mean within each completion, then over completions
    (arXiv 2402.03300, eq. 3); dr_grpo: 1 / (completions * max_new_tokens) (arXiv 2503.20783). `lengths` are those of
    all completions of the optimizer batch; completions of length 0 do not count.
    """
    counted = sum(1 for n in lengths if n)
    if loss_type == "dapo":
        return [1.0 / max(sum(lengths), 1)] * len(lengths)
    if loss_type == "grpo":
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
