"""Group-relative advantages: the rewards of one prompt's completions compared with one another."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Statistics = Literal["leave_one_out", "leave_one_out_mean", "group"]

EPSILON = 1e-6
"""Added to the standard deviation before the division, as in NeMo RL."""
RELATIVE_ZERO = 1e-6
"""A standard deviation below this share of the largest reward is rounding noise and counts as zero."""


def baseline_and_std(
    rewards_PG: Tensor, valid_PG: Tensor | None = None, leave_one_out: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns the baseline and the standard deviation that each reward is compared with, both (P, G), in float64.

    With v the validity and n = sum_j v_j of a group, m = n - 1 for the leave-one-out baseline (RLOO, arXiv 2402.14740)
    and m = n otherwise:

        baseline_i = sum_{j != i} v_j r_j / m        (j = i included without leave-one-out)
        std_i^2    = sum_{j != i} v_j (r_j - baseline_i)^2 / (m - 1)

    Groups with n <= 1 have baseline r and std 0. The variance is taken from centred rewards (two passes): the one-pass
    formula leaves rounding noise where all other rewards are equal, which a division would blow up. An invalid row is
    compared with all valid ones but divides by the same m; its advantage is never used.
    """
    rewards = rewards_PG.double()
    valid = torch.ones_like(rewards) if valid_PG is None else valid_PG.double()
    rewards = torch.where(valid > 0, rewards, 0.0)  # a missing reward may be NaN, and NaN * 0 is NaN
    n = valid.sum(-1, keepdim=True)
    mean = (valid * rewards).sum(-1, keepdim=True) / n.clamp(min=1)
    centred = (rewards - mean) * valid
    total, squares = centred.sum(-1, keepdim=True), centred.square().sum(-1, keepdim=True)
    if leave_one_out:
        m = n - 1
        # an invalid row's own term is zero, so the sums over the others of such a row hold all n valid rewards
        raw_sum = (valid * rewards).sum(-1, keepdim=True) - valid * rewards
        baseline = raw_sum / m.clamp(min=1)
        shift = (total - centred) / m.clamp(min=1)
        spread = squares - centred.square() - m * shift.square()
    else:
        m = n
        baseline = mean.expand_as(rewards)
        spread = squares.expand_as(rewards)
    std = (spread.clamp(min=0) / (m - 1).clamp(min=1)).sqrt()
    largest = (rewards.abs() * valid).amax(-1, keepdim=True).clamp(min=1.0)
    std = torch.where((m <= 1) | (std <= RELATIVE_ZERO * largest), torch.zeros_like(std), std)
    alone = n <= 1
    return torch.where(alone, rewards_PG.double(), baseline), std


def group_advantages(
    rewards_PG: Tensor,
    valid_PG: Tensor | None = None,
    *,
    statistics: Statistics = "leave_one_out",
    normalize: bool = True,
) -> Tensor:
    """Returns the advantage of each completion, (P, G), float32: r - baseline, divided by std + 1e-6 where std > 0.

    P prompts with G completions each. `statistics` names whose mean and deviation a reward is compared with:

    - leave_one_out: both of the others of its group (NeMo RL);
    - leave_one_out_mean: the mean of the others (RLOO, arXiv 2402.14740), the deviation of the whole group;
    - group: both of the whole group (GRPO as published, arXiv 2402.03300, section 4.1.2).

    Where the standard deviation is zero the advantage stays as it is: with leave_one_out, the only winner of a group (its
    others are all equal) has advantage 1, not 1 / std. Invalid completions (`valid_PG` false: their reward is missing) have
    advantage 0 and do not count in their group.
    """
    rewards = rewards_PG.double()
    if valid_PG is not None:
        rewards = torch.where(valid_PG > 0, rewards, 0.0)
    baseline, std = baseline_and_std(rewards, valid_PG, statistics != "group")
    if statistics == "leave_one_out_mean" and normalize:
        _, std = baseline_and_std(rewards, valid_PG, leave_one_out=False)
    advantage = rewards - baseline
    if normalize:
        advantage = torch.where(std > 0, advantage / (std + EPSILON), advantage)
    # rounding of the baseline alone is no advantage: a group of equal rewards teaches nothing
    noise = 1e-12 * rewards.abs().amax(-1, keepdim=True).clamp(min=1.0)
    advantage = torch.where(advantage.abs() <= noise, torch.zeros_like(advantage), advantage)
    if valid_PG is not None:
        advantage = advantage * valid_PG
    return advantage.float()


def flat_groups(rewards_PG: Tensor, valid_PG: Tensor | None = None) -> Tensor:
    """Returns which groups teach nothing, (P,), bool: all of their valid rewards are equal, or at most one is valid."""
    return (group_advantages(rewards_PG, valid_PG, normalize=False) == 0).all(-1)
