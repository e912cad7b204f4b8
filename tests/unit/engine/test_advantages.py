"""Group-relative advantages against golden values, an exact slow computation, and what must not change them."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nemo_rl.objectives.advantages import EPSILON, RELATIVE_ZERO, baseline_and_std, flat_groups, group_advantages

exact = settings(deadline=None, derandomize=True, max_examples=80)

HALF = math.sqrt(0.5)


def one_group(
    rewards: list[float], valid: list[bool] | None = None, leave_one_out: bool = True, **options: Any
) -> list[float]:
    mask = None if valid is None else torch.tensor([valid])
    options = {"statistics": "leave_one_out" if leave_one_out else "group", **options}
    return group_advantages(torch.tensor([rewards], dtype=torch.float64), mask, **options)[0].tolist()


def slow(rewards: list[float], valid: list[bool], leave_one_out: bool, normalize: bool) -> list[float] | None:
    """The definition in exact arithmetic. None where a standard deviation is too near the threshold to tell."""
    exact_rewards = [Fraction(r) for r in rewards]
    n = sum(valid)
    largest = max([abs(r) for r, v in zip(rewards, valid, strict=True) if v] + [1.0])
    found = []
    for i, reward in enumerate(exact_rewards):
        if not valid[i] or n <= 1:
            found.append(0.0)
            continue
        others = [r for j, r in enumerate(exact_rewards) if valid[j] and (j != i or not leave_one_out)]
        m = len(others)
        baseline = sum(others) / m
        advantage = reward - baseline
        std = 0.0
        if m > 1:
            std = math.sqrt(sum((r - baseline) ** 2 for r in others) / (m - 1))
        if std > 0 and abs(std / (RELATIVE_ZERO * largest) - 1) < 0.1:
            return None
        if normalize and std > RELATIVE_ZERO * largest:
            found.append(float(advantage) / (std + EPSILON))
        else:
            found.append(float(advantage))
    return found


rewards_and_validity = st.integers(1, 9).flatmap(
    lambda size: st.tuples(
        st.lists(
            st.one_of(
                st.sampled_from([0.0, 1.0, 0.1, 0.3, -0.7]),
                st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3)),
            ),
            min_size=size,
            max_size=size,
        ),
        st.lists(st.booleans(), min_size=size, max_size=size),
    )
)


# ------------------------------------------------------------------ golden values


def test_leave_one_out_compares_with_mean_and_deviation_of_the_others():
    baseline, std = baseline_and_std(torch.tensor([[1.0, 2.0, 3.0]]))
    assert baseline[0].tolist() == [2.5, 2.0, 1.5]
    assert std[0].tolist() == pytest.approx([HALF, math.sqrt(2), HALF], abs=1e-12)


def test_without_leave_one_out_all_of_the_group_share_one_baseline():
    baseline, std = baseline_and_std(torch.tensor([[1.0, 2.0, 3.0]]), leave_one_out=False)
    assert baseline[0].tolist() == [2.0, 2.0, 2.0]
    assert std[0].tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-12)


def test_a_pair_has_no_deviation_when_each_leaves_itself_out():
    baseline, std = baseline_and_std(torch.tensor([[1.0, 3.0]]))
    assert baseline[0].tolist() == [3.0, 1.0]
    assert std[0].tolist() == [0.0, 0.0]
    assert one_group([1.0, 3.0]) == [-2.0, 2.0]


def test_a_pair_normalised_by_its_own_deviation_is_plus_and_minus_root_half():
    assert one_group([1.0, 3.0], leave_one_out=False) == pytest.approx([-HALF, HALF], abs=1e-6)


def test_an_invalid_row_is_compared_with_all_valid_ones_over_the_same_divisor():
    baseline, _ = baseline_and_std(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, True]]))
    assert baseline[0].tolist() == [3.0, 4.0, 1.0]


@pytest.mark.parametrize("valid", [[True, False, False], [False, False, False]])
def test_a_group_with_at_most_one_valid_row_has_no_advantage(valid: list[bool]):
    baseline, std = baseline_and_std(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([valid]))
    assert baseline[0].tolist() == [1.0, 2.0, 3.0]
    assert std[0].tolist() == [0.0, 0.0, 0.0]
    assert one_group([1.0, 2.0, 3.0], valid) == [0.0, 0.0, 0.0]


def test_a_lone_winner_stays_unnormalised_under_leave_one_out():
    # the winner's others are all 0: deviation 0, advantage 1 - 0. A loser's others are one 1 and six 0s: mean 1/7,
    # variance (36/49 + 6/49) / 6 = 1/7, so its advantage is -(1/7) / sqrt(1/7) = -0.37796
    advantages = one_group([1.0] + [0.0] * 7)
    assert advantages == pytest.approx([1.0] + [-1 / math.sqrt(7)] * 7, abs=1e-5)
    assert sum(advantages) == pytest.approx(-1.646, abs=1e-3)


def test_a_lone_winner_without_leave_one_out():
    # mean 1/8, variance (49/64 + 7/64) / 7 = 1/8
    advantages = one_group([1.0] + [0.0] * 7, leave_one_out=False)
    assert advantages == pytest.approx([7 / 8 * math.sqrt(8)] + [-math.sqrt(8) / 8] * 7, abs=1e-4)
    assert advantages[0] == pytest.approx(2.475, abs=1e-3)
    assert advantages[1] == pytest.approx(-0.354, abs=1e-3)


@pytest.mark.parametrize("constant", [0.1, 0.3, 1 / 3, 0.7, 1e3 / 7, -0.9])
@pytest.mark.parametrize("size", [4, 7, 8, 16])
def test_rounding_of_equal_rewards_is_never_taken_for_deviation(constant: float, size: int):
    """One-pass variances of such groups gave advantages of up to 2.6e5."""
    outlier = constant + 1.3
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((1, size), constant, dtype=dtype)
        rewards[0, 2] = outlier
        advantages = group_advantages(rewards)
        assert advantages[0, 2].item() == pytest.approx(1.3, rel=1e-4)
        assert advantages.abs().max().item() <= 1.3 * 1.001


# ------------------------------------------------------------------ the definition


@exact
@given(rewards_and_validity, st.booleans(), st.booleans())
@example(([0.1] * 5 + [1.0], [True] * 6), True, True)
@example(([100.0, 0.001, 0.002, 0.004], [True] * 4), True, True)
def test_advantages_are_the_definition(case: tuple[list[float], list[bool]], leave_one_out: bool, normalize: bool):
    rewards, valid = case
    expected = slow(rewards, valid, leave_one_out, normalize)
    assume(expected is not None)
    found = one_group(rewards, valid, leave_one_out=leave_one_out, normalize=normalize)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@exact
@given(rewards_and_validity, st.booleans(), st.booleans(), st.integers(-64, 64))
def test_adding_a_constant_to_all_rewards_changes_nothing(case, leave_one_out, normalize, shift):
    rewards, valid = case
    assume(slow(rewards, valid, leave_one_out, normalize) is not None)
    shifted = [r + shift for r in rewards]
    assume(slow(shifted, valid, leave_one_out, normalize) is not None)
    options = {"leave_one_out": leave_one_out, "normalize": normalize}
    assert one_group(shifted, valid, **options) == pytest.approx(
        one_group(rewards, valid, **options), rel=1e-4, abs=1e-4
    )


@exact
@given(rewards_and_validity, st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_order_within_a_group_does_not_matter(case, leave_one_out, normalize, random):
    rewards, valid = case
    order = list(range(len(rewards)))
    random.shuffle(order)
    options = {"leave_one_out": leave_one_out, "normalize": normalize}
    found = one_group(rewards, valid, **options)
    permuted = one_group([rewards[i] for i in order], [valid[i] for i in order], **options)
    assert permuted == pytest.approx([found[i] for i in order], rel=1e-6, abs=1e-6)


@exact
@given(rewards_and_validity, st.sampled_from([0.25, 2.0, 8.0, 1000.0]))
def test_the_scale_of_rewards_cancels_in_normalised_advantages(case, scale):
    rewards, _ = case
    rewards = [round(r * 4) / 4 for r in rewards]  # deviations far above EPSILON
    found = one_group(rewards, leave_one_out=False)
    assert one_group([r * scale for r in rewards], leave_one_out=False) == pytest.approx(found, rel=1e-4, abs=1e-4)


@exact
@given(st.floats(-1e6, 1e6), st.integers(1, 20), st.booleans(), st.booleans())
def test_equal_rewards_teach_nothing(reward, size, leave_one_out, normalize):
    assert one_group([reward] * size, leave_one_out=leave_one_out, normalize=normalize) == [0.0] * size


@exact
@given(rewards_and_validity, st.booleans(), st.booleans(), st.sampled_from([0.0, 5.0, -1e9, math.nan, math.inf]))
def test_what_an_invalid_row_holds_never_reaches_the_others(case, leave_one_out, normalize, missing):
    rewards, valid = case
    options = {"leave_one_out": leave_one_out, "normalize": normalize}
    replaced = [r if v else missing for r, v in zip(rewards, valid, strict=True)]
    assert one_group(replaced, valid, **options) == one_group(rewards, valid, **options)


@exact
@given(rewards_and_validity, st.booleans())
def test_leaving_an_invalid_row_out_of_the_group_changes_nothing(case, normalize):
    rewards, valid = case
    found = one_group(rewards, valid, normalize=normalize)
    kept = [i for i, v in enumerate(valid) if v]
    assume(kept)
    alone = one_group([rewards[i] for i in kept], normalize=normalize)
    assert [found[i] for i in kept] == pytest.approx(alone, rel=1e-5, abs=1e-6)


@exact
@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=4, max_size=4), min_size=2, max_size=5))
def test_groups_do_not_see_one_another(groups):
    together = group_advantages(torch.tensor(groups))
    for i, group in enumerate(groups):
        assert together[i].tolist() == one_group(group)


@exact
@given(rewards_and_validity)
def test_leave_one_out_without_normalisation_is_the_scaled_distance_from_the_mean(case):
    """RLOO, arXiv 2402.14740: n / (n - 1) * (r - mean)."""
    rewards, _ = case
    n = len(rewards)
    assume(n > 1)
    mean = math.fsum(rewards) / n
    expected = [n / (n - 1) * (r - mean) for r in rewards]
    assert one_group(rewards, normalize=False) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("winners", [1, 2, 15])
def test_the_mean_of_the_others_over_the_deviation_of_all_has_no_jump(winners: int):
    """Of 16, one right has more advantage than two right have each, and the sum is zero."""
    rewards = [1.0] * winners + [0.0] * (16 - winners)
    found = one_group(rewards, statistics="leave_one_out_mean")
    mean = winners / 16
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 15)
    others = [(sum(rewards) - r) / 15 for r in rewards]
    assert found == pytest.approx([(r - o) / (std + EPSILON) for r, o in zip(rewards, others, strict=True)], abs=1e-6)
    assert sum(found) == pytest.approx(0.0, abs=1e-4)


def test_a_group_is_flat_if_no_two_of_its_valid_rewards_differ():
    rewards = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.1, 0.1, 7.0], [1.0, 2.0, 3.0]])
    valid = torch.tensor([[True] * 3, [True] * 3, [True, True, False], [False, True, False]])
    assert flat_groups(rewards, valid).tolist() == [True, False, True, True]
    assert flat_groups(rewards).tolist() == [True, False, False, False]
