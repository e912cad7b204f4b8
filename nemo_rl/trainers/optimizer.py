"""AdamW, its learning-rate schedule, and the step that clips, checks and applies gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from nemo_rl.errors import NonFiniteTraining
from nemo_rl.job.spec import TrainingSpec

if TYPE_CHECKING:
    from nemo_rl.model.sharding import Distributed

MAX_NON_FINITE_STEPS = 5
"""Steps in a row with a NaN or infinite gradient after which training gives up."""


def warmup_steps(training: TrainingSpec, total_steps: int) -> int:
    """Returns the length of the warm-up: as specified, or 5 % of the steps but at most 50."""
    return training.warmup_steps if training.warmup_steps is not None else min(50, total_steps // 20)


def learning_rate(training: TrainingSpec, step: int, total_steps: int, first_total_steps: int | None = None) -> float:
    """Returns the learning rate of a step; steps count from 1. Linear warm-up, then the schedule of the specification.

    Of a run that was lengthened, `first_total_steps` is the length that it began with: the warm-up stays as it was, and
    a decay has, from the first step after that on, the rate of a run of `total_steps`.
    """
    warmup = warmup_steps(training, first_total_steps or total_steps)
    if step <= warmup:
        return training.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(total_steps - warmup, 1)
    if training.lr_schedule == "linear":
        return training.learning_rate * (1 - progress)
    if training.lr_schedule == "cosine":
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return training.learning_rate


class Optimizer:
    """AdamW over the trainable parameters; matrices decay, biases and norms do not.

    On several ranks `distributed` sums gradients over them before a step.
    """

    def __init__(
        self, parameters: list[nn.Parameter], training: TrainingSpec, distributed: Distributed | None = None
    ) -> None:
        self.parameters, self.training, self.distributed = parameters, training, distributed
        self.non_finite_steps = 0
        matrices = [p for p in parameters if p.ndim >= 2]
        others = [p for p in parameters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            fused=True,
        )

    def step(self, rate: float) -> float:
        """Applies the gradients with this learning rate, clears them, and returns their norm before clipping.

        A step whose gradient is not finite is left out; NonFiniteTraining is raised after several in a row.
        """
        if self.distributed is not None:
            self.distributed.reduce(self.parameters)
        total = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
        if not math.isfinite(norm):
            self.adamw.zero_grad(set_to_none=True)
            self.non_finite_steps += 1
            if self.non_finite_steps >= MAX_NON_FINITE_STEPS:
                raise NonFiniteTraining(
                    f"the gradient was NaN or infinite in {self.non_finite_steps} steps in a row; expected finite numbers. "
                    "Lower learning_rate, set max_grad_norm, or check the data and the model's weights for NaN"
                )
            return norm
        self.non_finite_steps = 0
        if self.training.max_grad_norm is not None and norm > self.training.max_grad_norm:
            scale = self.training.max_grad_norm / (norm + 1e-6)
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], scale)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm
