"""Loss functions against values worked out by hand from their papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.objectives.correction import importance_weights, mismatch
from nemo_rl.objectives.losses import (
    clipped_policy_loss,
    kl_estimate,
    kl_loss,
    preference_loss,
    token_weights,
)
from nemo_rl.objectives.losses import (
    policy_loss as named_policy_loss,
)

exact = settings(deadline=None, derandomize=True, max_examples=60)


def policy_loss(ratios: list[float], advantages: list[float], **bounds: float) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.tensor(ratios, dtype=torch.float64).log()
    bounds = {"clip_low": 0.2, "clip_high": 0.2, **bounds}
    return clipped_policy_loss(
        logprobs, torch.zeros_like(logprobs), torch.tensor(advantages, dtype=torch.float64), **bounds
    )


# ------------------------------------------------------------------ policy loss


def test_ppo_clips_only_where_that_makes_the_loss_larger():
    # ratio * A = (.5, -1, 3); clip(ratio, .8, 1.2) * A = (.8, -1, 2.4); -min = (-.5, 1, -2.4); mean -1.9 / 3 = -.6333
    loss, ratio, clipped = policy_loss([0.5, 1.0, 1.5], [1.0, -1.0, 2.0])
    assert loss.tolist() == pytest.approx([-0.5, 1.0, -2.4])
    assert loss.mean().item() == pytest.approx(-0.63333, abs=1e-5)
    assert ratio.tolist() == pytest.approx([0.5, 1.0, 1.5])
    assert clipped.tolist() == [False, False, True]


def test_a_falling_probability_is_clipped_for_negative_advantages():
    # ratio * A = (-.5, -1.5); clipped (-.8, -1.2); -min = (.8, 1.5)
    loss, _, clipped = policy_loss([0.5, 1.5], [-1.0, -1.0])
    assert loss.tolist() == pytest.approx([0.8, 1.5])
    assert clipped.tolist() == [True, False]


def test_clip_higher_leaves_more_room_above_than_below():
    # DAPO: 1 - .2 and 1 + .28; A = 1: min(1.5, 1.28), min(1.25, 1.25), min(.7, .8)
    loss, _, clipped = policy_loss([1.5, 1.25, 0.7], [1.0, 1.0, 1.0], clip_low=0.2, clip_high=0.28)
    assert loss.tolist() == pytest.approx([-1.28, -1.25, -0.7])
    assert clipped.tolist() == [True, False, False]
    # A = -1: -min(-1.5, -1.28), -min(-.7, -.8)
    loss, _, clipped = policy_loss([1.5, 0.7], [-1.0, -1.0], clip_low=0.2, clip_high=0.28)
    assert loss.tolist() == pytest.approx([1.5, 0.8])
    assert clipped.tolist() == [False, True]


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    # A < 0, ratio 4: -min(-16, -4.8) = 16, bounded by 3 * 4 = 12; ratio 1.5: 1.5 < 3 stays; A > 0 never touched:
    # ratio .01, A = 1 has loss -.01, not -3
    loss, _, _ = policy_loss([4.0, 1.5, 0.01, 9.0], [-4.0, -1.0, 1.0, 0.0], dual_clip=3.0)
    assert loss.tolist() == pytest.approx([12.0, 1.5, -0.01, 0.0])


def test_the_gradient_of_the_first_update_is_minus_the_advantage():
    """ratio = 1: d loss / d logp = -A for every token, clipped or not."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -1.5, 0.0], dtype=torch.float64)
    for clip in (0.0, 0.2):
        loss, _, _ = clipped_policy_loss(logprobs, logprobs.detach(), advantages, clip_low=clip, clip_high=clip)
        (found,) = torch.autograd.grad(loss.sum(), logprobs)
        assert found.tolist() == (-advantages).tolist()


def test_clipped_tokens_have_no_gradient():
    ratios = torch.tensor([1.5, 0.5, 0.5, 1.5, 5.0], dtype=torch.float64)
    logprobs = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss, _, _ = clipped_policy_loss(
        logprobs, torch.zeros(5, dtype=torch.float64), advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    (found,) = torch.autograd.grad(loss.sum(), logprobs)
    assert found.tolist() == pytest.approx([0.0, 0.0, -0.5, 1.5, 0.0])


@exact
@given(
    st.floats(-3, 3), st.floats(-5, 5), st.floats(0, 0.99), st.floats(0, 2), st.one_of(st.none(), st.floats(1.01, 5))
)
def test_policy_loss_is_the_formula(log_ratio, advantage, low, high, dual):
    ratio = math.exp(log_ratio)
    expected = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        expected = min(expected, -dual * advantage)
    loss, _, _ = policy_loss([ratio], [advantage], clip_low=low, clip_high=high, dual_clip=dual)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


# ------------------------------------------------------------------ GSPO and CISPO

sequences = st.lists(
    st.tuples(st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0)), min_size=1, max_size=5), st.floats(-2, 2)),
    min_size=1,
    max_size=4,
)


def flat(case: list[tuple[list[tuple[float, float]], float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones, advantages and sequence numbers of all tokens, the sequences in reverse order."""
    rows = [(i, token, advantage) for i, (tokens, advantage) in reversed(list(enumerate(case))) for token in tokens]
    new, old = (torch.tensor([token[k] for _, token, _ in rows], dtype=torch.float64) for k in (0, 1))
    return new, old, torch.tensor([a for _, _, a in rows], dtype=torch.float64), torch.tensor([i for i, _, _ in rows])


@exact
@given(sequences, st.floats(0, 0.5), st.floats(0, 0.5))
def test_gspo_clips_one_ratio_for_each_sequence(case, low, high):
    new, old, advantages, rows = flat(case)
    new.requires_grad_()
    loss, ratio, _ = named_policy_loss("gspo", new, old, advantages, rows, len(case), clip_low=low, clip_high=high)
    total = 0.0
    for i, (tokens, advantage) in enumerate(case):
        s = math.exp(sum(a - b for a, b in tokens) / len(tokens))
        expected = -min(s * advantage, min(max(s, 1 - low), 1 + high) * advantage)
        total += expected
        assert loss[rows == i].tolist() == pytest.approx([expected] * len(tokens), rel=1e-9, abs=1e-12)
        assert ratio[rows == i].tolist() == pytest.approx([s] * len(tokens))
    weights = torch.tensor(token_weights([len(tokens) for tokens, _ in case], "gspo", 5), dtype=torch.float64)
    assert (loss * weights[rows]).sum().item() == pytest.approx(total / len(case), rel=1e-9, abs=1e-12)


def test_gspo_has_the_gradient_of_its_paper():
    """arXiv 2507.18071, eq. 10, for one sequence whose ratio is not clipped: -s A / n for each token."""
    new = torch.tensor([-1.0, -0.5, -2.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.1, -0.4, -2.2], dtype=torch.float64)
    rows, advantages = torch.zeros(3, dtype=torch.long), torch.full((3,), 1.5, dtype=torch.float64)
    loss, _, _ = named_policy_loss("gspo", new, old, advantages, rows, 1, clip_low=0.2, clip_high=0.2)
    (found,) = torch.autograd.grad(loss.mean(), new)
    s = math.exp((0.1 - 0.1 + 0.2) / 3)
    assert found.tolist() == pytest.approx([-s * 1.5 / 3] * 3)


@exact
@given(sequences, st.floats(0, 1), st.floats(0, 1))
def test_cispo_clips_the_weight_and_keeps_the_gradient(case, low, high):
    new, old, advantages, rows = flat(case)
    new.requires_grad_()
    loss, _, clipped = named_policy_loss("cispo", new, old, advantages, rows, len(case), clip_low=low, clip_high=high)
    (found,) = torch.autograd.grad(loss.sum(), new)
    for t in range(len(new)):
        ratio = math.exp(new[t].item() - old[t].item())
        weight = min(max(ratio, 1 - low), 1 + high) * advantages[t].item()
        assert loss[t].item() == pytest.approx(-weight * new[t].item(), rel=1e-9, abs=1e-12)
        assert found[t].item() == pytest.approx(-weight, rel=1e-9, abs=1e-12)
        if abs(ratio - (1 - low)) > 1e-9 and abs(ratio - (1 + high)) > 1e-9:
            assert bool(clipped[t]) == (not 1 - low <= ratio <= 1 + high)


# ------------------------------------------------------------------ importance correction


@exact
@given(
    sequences,
    st.sampled_from(["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
    st.one_of(st.none(), st.floats(0, 0.9)),
    st.one_of(st.none(), st.floats(1.0, 4)),
)
def test_importance_weights_are_their_definition(case, kind, low, high):
    new, sampled, _, rows = flat(case)
    found, bounded = importance_weights(new, sampled, rows, len(case), kind, low=low, high=high)
    for t in range(len(new)):
        of_sequence = kind.startswith("sequence")
        tokens = case[int(rows[t])][0] if of_sequence else [(new[t].item(), sampled[t].item())]
        ratio = math.exp(sum(a - b for a, b in tokens)) if kind != "none" else 1.0
        outside = kind != "none" and ((low is not None and ratio < low) or (high is not None and ratio > high))
        if any(bound is not None and abs(ratio - bound) < 1e-9 for bound in (low, high)):
            continue
        expected = ratio
        if outside:
            expected = 0.0 if kind.endswith("mask") else (low if low is not None and ratio < low else high)
        assert found[t].item() == pytest.approx(expected, rel=1e-9)
        assert bool(bounded[t]) == outside


def test_what_was_not_measured_is_neither_weighed_nor_counted():
    new = torch.tensor([-1.0, -2.0, -1.5], requires_grad=True)
    sampled = torch.tensor([-1.2, math.nan, -1.1])
    weights, _ = importance_weights(new, sampled, torch.zeros(3, dtype=torch.long), 1, "token_truncate", high=2.0)
    assert weights.tolist() == pytest.approx([math.exp(0.2), 1.0, math.exp(-0.4)])
    assert not weights.requires_grad
    found = mismatch(new, sampled)
    assert found.tokens.item() == 2
    assert found.error.item() == pytest.approx(0.6)
    expected = sum(math.exp(d) - 1 - d for d in (0.2, -0.4))
    assert found.kl.item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ KL


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [-1.0, 14.0, 29.0]),
        ("k2", [0.5, 98.0, 420.5]),
        ("k3", [math.e - 2, 13 + math.exp(-14), 28 + math.exp(-29)]),
    ],
)
def test_kl_estimators_have_their_known_values(kind: str, expected: list[float]):
    # cur = -1, ref = 0, -15, -30: d = 1, -14, -29
    reference = torch.tensor([0.0, -15.0, -30.0])
    found = kl_estimate(torch.full((3,), -1.0), reference, kind, input_clamp=None, output_clamp=None)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    if kind == "k3":
        assert found.tolist() == pytest.approx([0.7183, 13.0, 28.0], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "expected"), [("k1", [-1.0, 10.0, 10.0]), ("k2", [0.5, 10.0, 10.0]), ("k3", [math.e - 2, 10.0, 10.0])]
)
def test_kl_estimates_are_bounded(kind: str, expected: list[float]):
    found = kl_estimate(torch.full((3,), -1.0), torch.tensor([0.0, -15.0, -30.0]), kind)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(kl_estimate(torch.tensor([-500.0]), torch.tensor([0.0]), kind)).all()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_expected_gradient_of_the_kl_term_is_that_of_the_divergence(kind: str):
    """arXiv 2506.09477: summed over all tokens under the policy, d kl_loss must be d KL(policy || reference)."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    logprobs = logits.log_softmax(-1)
    ratio = (logprobs - logprobs.detach()).exp()
    term = (logprobs.detach().exp() * kl_loss(logprobs, reference, ratio, kind)).sum()
    (found,) = torch.autograd.grad(term, logits)
    assert torch.allclose(found, expected, atol=1e-12)


def test_the_kl_term_corrects_for_tokens_that_an_older_policy_drew():
    """With the ratio to the drawing policy, k3 summed under that policy is the divergence of the current one
    (while no estimate reaches its bound)."""
    generator = torch.Generator().manual_seed(4)
    current, old, reference = (0.5 * torch.randn(3, 9, generator=generator, dtype=torch.float64)).log_softmax(-1)
    expected = (current.exp() * (current - reference)).sum()
    found = (old.exp() * kl_loss(current, reference, (current - old).exp(), "k3")).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


# ------------------------------------------------------------------ averages

lengths = st.lists(st.integers(0, 20), min_size=1, max_size=12)


@exact
@given(lengths, st.sampled_from(["dapo", "cispo"]))
def test_dapo_averages_over_all_tokens(found: list[int], kind: str):
    weights = token_weights(found, kind, 20)
    total = sum(found)
    assert sum(n * w for n, w in zip(found, weights, strict=True)) == pytest.approx(1.0 if total else 0.0)
    assert len(set(weights)) == 1


@exact
@given(lengths, st.sampled_from(["grpo", "gspo"]))
def test_grpo_gives_each_completion_the_same_weight(found: list[int], kind: str):
    weights = token_weights(found, kind, 20)
    counted = sum(1 for n in found if n)
    for n, w in zip(found, weights, strict=True):
        assert n * w == pytest.approx(1 / counted if n else 0.0)


@exact
@given(lengths)
def test_dr_grpo_divides_by_a_constant_length(found: list[int]):
    weights = token_weights(found, "dr_grpo", 20)
    counted = sum(1 for n in found if n)
    assert set(weights) == {1 / (max(counted, 1) * 20)}


# ------------------------------------------------------------------ preferences


def pair(chosen: float, rejected: float, **options: object) -> float:
    """The loss of one pair whose log-ratios to the reference are these; the reference is nowhere zero."""
    values = [torch.tensor([v], dtype=torch.float64) for v in (chosen - 7.0, rejected - 3.0, -7.0, -3.0)]
    loss, _, _ = preference_loss(*values, **{"beta": 0.1, **options})
    return loss.item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_before_the_first_step_the_loss_is_ln_2(smoothing: float):
    assert pair(0.0, 0.0, label_smoothing=smoothing) == pytest.approx(math.log(2), abs=1e-12)


def test_sigmoid_loss_is_minus_log_sigma_of_the_scaled_margin():
    # z = .1 * (4 - -6) = 1
    assert pair(4.0, -6.0) == pytest.approx(math.log1p(math.exp(-1.0)))
    assert pair(-6.0, 4.0) == pytest.approx(math.log1p(math.exp(1.0)))


def test_label_smoothing_mixes_in_the_swapped_label():
    expected = 0.9 * math.log1p(math.exp(-1.0)) + 0.1 * math.log1p(math.exp(1.0))
    assert pair(4.0, -6.0, label_smoothing=0.1) == pytest.approx(expected)


def test_hinge_loss_is_zero_beyond_the_margin():
    assert pair(4.0, -1.0, kind="hinge") == pytest.approx(0.5)
    assert pair(14.0, -6.0, kind="hinge") == 0.0


def test_ipo_regresses_the_margin_per_token_to_half_over_beta():
    # 4 / 8 - -6 / 3 = 2.5; (2.5 - 1 / .2)^2
    lengths = {"chosen_lengths_P": torch.tensor([8.0]), "rejected_lengths_P": torch.tensor([3.0])}
    assert pair(4.0, -6.0, kind="ipo", **lengths) == pytest.approx(6.25)


def test_implicit_rewards_are_scaled_log_ratios_without_gradient():
    chosen = torch.tensor([-3.0], requires_grad=True)
    others = [torch.tensor([v]) for v in (-9.0, -7.0, -3.0)]
    _, chosen_reward, rejected_reward = preference_loss(chosen, *others, beta=0.5)
    assert (chosen_reward.item(), rejected_reward.item()) == (2.0, -3.0)
    assert not chosen_reward.requires_grad


def test_extreme_margins_stay_finite():
    for kind in ("sigmoid", "hinge"):
        assert math.isfinite(pair(-1e5, 1e5, kind=kind))
        assert pair(1e5, -1e5, kind=kind) == 0.0
