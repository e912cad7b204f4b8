"""AdamW's schedule, clipping, and what happens to gradients that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from nemo_rl.errors import NonFiniteTraining
from nemo_rl.job.spec import TrainingSpec
from nemo_rl.trainers.optimizer import MAX_NON_FINITE_STEPS, Optimizer, learning_rate, warmup_steps


def rates(total: int, **options: Any) -> list[float]:
    training = TrainingSpec(learning_rate=1.0, **options)
    return [learning_rate(training, step, total) for step in range(1, total + 1)]


# ------------------------------------------------------------------ learning rate


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr_schedule": "constant", "warmup_steps": 0}, [1.0] * 4),
        ({"lr_schedule": "constant", "warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0]),
        ({"lr_schedule": "linear", "warmup_steps": 0}, [1.0, 0.75, 0.5, 0.25]),
        ({"lr_schedule": "linear", "warmup_steps": 2}, [0.5, 1.0, 1.0, 0.5]),
        ({"lr_schedule": "cosine", "warmup_steps": 0}, [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ({"lr_schedule": "cosine", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0]),
        ({"lr_schedule": "linear", "warmup_steps": 9}, [1 / 9, 2 / 9, 3 / 9, 4 / 9]),
    ],
)
def test_learning_rate_of_each_of_four_steps(options: dict[str, Any], expected: list[float]):
    assert rates(4, **options) == pytest.approx(expected)


@pytest.mark.parametrize(("total", "expected"), [(1, 0), (19, 0), (20, 1), (100, 5), (1000, 50), (100_000, 50)])
def test_warm_up_is_five_percent_but_at_most_fifty_steps(total: int, expected: int):
    assert warmup_steps(TrainingSpec(), total) == expected
    assert warmup_steps(TrainingSpec(warmup_steps=7), total) == 7


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3, 50, 1000])
def test_rates_rise_then_never_rise_again_and_stay_positive(schedule: str, total: int):
    found = rates(total, lr_schedule=schedule)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert min(found) > 0
    assert max(found) == pytest.approx(1.0)


# ------------------------------------------------------------------ steps


def some_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((3, 4), (5,), (2, 2, 2))]


def set_gradients(parameters: list[nn.Parameter], scale: float = 1.0, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("bound", [None, 0.5, 1.0])
def test_a_step_is_torchs_clipping_and_adamw(scale: float, bound: float | None):
    options = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6, "max_grad_norm": bound}
    ours, theirs = some_parameters(), some_parameters()
    optimizer = Optimizer(ours, TrainingSpec(**{"learning_rate": 1e-6, **options}))
    groups = [{"params": [theirs[0], theirs[2]], "weight_decay": 0.1}, {"params": [theirs[1]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.99), eps=1e-6)
    for step in range(4):
        rate = 0.01 * (step + 1)
        set_gradients(ours, scale, step)
        set_gradients(theirs, scale, step)
        expected = nn.utils.clip_grad_norm_(theirs, math.inf if bound is None else bound).item()
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        assert optimizer.step(rate) == pytest.approx(expected, rel=1e-6)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
            assert a.grad is None


@pytest.mark.parametrize("times", [0.5, 1.1, 1.5, 40.0])
def test_the_clipped_gradient_is_what_adamw_gets(times: float):
    """Seen in its first moment: the update itself hardly depends on the scale of the gradient."""
    parameters = some_parameters()
    optimizer = Optimizer(parameters, TrainingSpec(learning_rate=1e-6, max_grad_norm=0.7, adam_beta1=0.5))
    set_gradients(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters]).item()
    for parameter in parameters:
        parameter.grad *= 0.7 * times / norm
    expected = [0.5 * p.grad / max(times, 1.0) for p in parameters]
    assert optimizer.step(0.1) == pytest.approx(0.7 * times, rel=1e-5)
    for parameter, moment in zip(parameters, expected, strict=True):
        assert torch.allclose(optimizer.adamw.state[parameter]["exp_avg"], moment, rtol=1e-5)


def test_biases_and_norms_do_not_decay():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = Optimizer([matrix, vector], TrainingSpec(learning_rate=1e-6, weight_decay=0.5))
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    assert matrix.tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert vector.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_left_out_and_counted(bad: float):
    parameters = some_parameters()
    optimizer = Optimizer(parameters, TrainingSpec(learning_rate=1e-6))
    before = [p.detach().clone() for p in parameters]
    set_gradients(parameters)
    parameters[1].grad[3] = bad
    norm = optimizer.step(0.1)
    assert not math.isfinite(norm)
    assert optimizer.non_finite_steps == 1
    assert not optimizer.adamw.state
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None


def test_training_gives_up_after_five_such_steps_in_a_row():
    parameters = some_parameters()
    optimizer = Optimizer(parameters, TrainingSpec(learning_rate=1e-6))

    def step(scale: float) -> float:
        set_gradients(parameters, scale)
        return optimizer.step(0.1)

    assert MAX_NON_FINITE_STEPS == 5
    for _ in range(4):
        step(math.nan)
    assert math.isfinite(step(1.0))
    assert optimizer.non_finite_steps == 0
    for _ in range(4):
        step(math.nan)
    with pytest.raises(NonFiniteTraining, match=r"5 steps in a row; expected finite numbers. Lower learning_rate"):
        step(math.nan)


def test_parameters_without_a_gradient_are_left_alone():
    parameters = some_parameters()
    optimizer = Optimizer(parameters, TrainingSpec(learning_rate=1e-6, weight_decay=0.0))
    before = parameters[2].detach().clone()
    set_gradients(parameters[:2])
    optimizer.step(0.1)
    assert torch.equal(parameters[2], before)
    assert optimizer.step(0.1) == 0.0
