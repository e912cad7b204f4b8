"""The chunked output layer against log_softmax in float64, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nemo_rl.model import logprobs
from nemo_rl.model.logprobs import token_logprobs
from unit.engine.tiny import relative


@dataclass
class Problem:
    """Hidden states, weights and targets, and the weight of each log-probability in the sum that is differentiated."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    outer: Tensor

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]


def make(
    tokens: int, vocabulary: int, width: int = 12, bias: bool = False, dtype: torch.dtype = torch.float32
) -> Problem:
    generator = torch.Generator().manual_seed(tokens * 1009 + vocabulary)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return Problem(
        normal(tokens, width),
        normal(vocabulary, width),
        normal(vocabulary) if bias else None,
        targets,
        torch.randn(tokens, generator=generator),
    )


def ours(p: Problem, **options: float) -> tuple[Tensor, list[Tensor]]:
    found = token_logprobs(p.hidden, p.weight, p.targets, bias_V=p.bias, **options)
    assert found.dtype == torch.float32
    return found.detach(), list(torch.autograd.grad((found * p.outer).sum(), p.leaves()))


def by_log_softmax(
    p: Problem, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().double().requires_grad_() for t in p.leaves()]
    logits = leaves[0] @ leaves[1].T
    if p.bias is not None:
        logits = logits + leaves[2]
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = (logits / temperature).log_softmax(-1).gather(-1, p.targets[:, None])[:, 0]
    return found.detach(), list(torch.autograd.grad((found * p.outer.double()).sum(), leaves))


def assert_equal(p: Problem, tolerance: float = 2e-6, **options: float) -> None:
    found, gradients = ours(p, **options)
    expected, expected_gradients = by_log_softmax(p, **options)
    assert relative(found, expected) <= tolerance
    for leaf, gradient, truth in zip(p.leaves(), gradients, expected_gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert relative(gradient, truth) <= tolerance


VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"temperature": 1.7, "logit_scale": 0.5, "softcap": 2.0},
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 20, 21, 1000])
def test_log_probabilities_and_gradients_are_those_of_log_softmax(
    monkeypatch, variant: str, bias: bool, rows_per_chunk: int
):
    """20 tokens in chunks that divide them, do not divide them, just hold them, and hold far more."""
    vocabulary = 37
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS_CPU", rows_per_chunk * vocabulary)
    assert_equal(make(20, vocabulary, bias=bias), **VARIANTS[variant])


@pytest.mark.parametrize("vocabulary", [1, 2, 257, 5003, 32768])
@pytest.mark.parametrize("elements", [1, 40_000, 4 * 2**20])
def test_any_vocabulary_fits_any_chunk_size(monkeypatch, vocabulary: int, elements: int):
    """A vocabulary larger than a chunk is made one token at a time."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS_CPU", elements)
    problem = make(9, vocabulary)
    found, _ = ours(problem)
    if vocabulary == 1:
        assert found.tolist() == [0.0] * 9
    else:
        assert_equal(problem, tolerance=3e-5)  # a product of one row sums up the whole vocabulary in one go


@pytest.mark.parametrize("rows_per_chunk", [4, 100])
def test_logits_far_apart_stay_finite(monkeypatch, rows_per_chunk: int):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS_CPU", rows_per_chunk * 11)
    problem = make(10, 11)
    problem.hidden = (problem.hidden.detach() * 1e3).requires_grad_()
    found, gradients = ours(problem)
    expected, expected_gradients = by_log_softmax(problem)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-3)
    for gradient, truth in zip(gradients, expected_gradients, strict=True):
        assert torch.isfinite(gradient).all()
        assert relative(gradient, truth) <= 1e-4


@pytest.mark.parametrize("rows_per_chunk", [3, 100])
def test_bfloat16_hidden_states_and_float32_weights(monkeypatch, rows_per_chunk: int):
    """As in mixed-precision training: results in float32, gradients in the dtype of each argument."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS_CPU", rows_per_chunk * 301)
    problem = make(16, 301)
    problem.hidden = problem.hidden.detach().bfloat16().requires_grad_()
    assert_equal(problem, tolerance=1e-2)


def test_bfloat16_throughout():
    assert_equal(make(16, 301, dtype=torch.bfloat16), tolerance=1e-2)


def test_no_tokens_give_no_log_probabilities_and_zero_gradients():
    problem = make(0, 13, bias=True)
    found = token_logprobs(problem.hidden, problem.weight, problem.targets, bias_V=problem.bias)
    assert found.shape == (0,)
    assert found.dtype == torch.float32
    found.sum().backward()
    assert problem.weight.grad is not None
    assert not problem.weight.grad.any()


def test_frozen_output_weights_get_no_gradient_and_hidden_states_keep_theirs():
    problem = make(6, 29)
    problem.weight = problem.weight.detach()
    found = token_logprobs(problem.hidden, problem.weight, problem.targets)
    (gradient,) = torch.autograd.grad((found * problem.outer).sum(), [problem.hidden])
    assert relative(gradient, by_log_softmax(make(6, 29))[1][0]) <= 2e-6


def test_without_gradients_nothing_is_kept_for_a_backward_pass():
    problem = make(6, 29)
    with torch.no_grad():
        assert not token_logprobs(problem.hidden, problem.weight, problem.targets).requires_grad


def test_a_backward_pass_may_run_twice():
    problem = make(6, 29)
    total = (token_logprobs(problem.hidden, problem.weight, problem.targets) * problem.outer).sum()
    first = torch.autograd.grad(total, problem.leaves(), retain_graph=True)
    second = torch.autograd.grad(total, problem.leaves())
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows_per_chunk", [2, 100])
def test_gradients_are_finite_differences(monkeypatch, rows_per_chunk: int):
    """Along random directions; the result is float32, so steps are wide and the tolerance is theirs."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS_CPU", rows_per_chunk * 19)
    problem = make(7, 19, bias=True)
    options = {"temperature": 0.8, "logit_scale": 0.7, "softcap": 2.5}
    _, gradients = ours(problem, **options)
    generator = torch.Generator().manual_seed(0)
    step = 1e-2
    for leaf, gradient in zip(problem.leaves(), gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator)
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * direction
                found = token_logprobs(problem.hidden, problem.weight, problem.targets, bias_V=problem.bias, **options)
                values.append((found.double() * problem.outer.double()).sum().item())
                leaf -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=2e-3, abs=2e-3)
