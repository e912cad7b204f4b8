"""Root mean square norms (arXiv 1910.07467) that keep what they are given and one number a row for the backward pass.

transformers writes these norms out, and autograd then keeps every step: the input in float32, and the input over its root mean
square. Here the backward pass makes both again from the input. A class of norms is replaced where it computes what `rms_norm`
does, values and gradients, which is measured; others stay as they are.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemo_rl.model.replaced import Replaced, class_of

log = logging.getLogger(__name__)

EXACT, HALF = 1e-5, 2e-2
"""Largest difference from the norm that is replaced, of numbers around one: in float32, and where bfloat16 takes part."""


class Facts(NamedTuple):
    """y = x / sqrt(mean(x²) + eps) * (offset + weight), computed in float32. `casts_first`: what is multiplied by the weight has the
    dtype of x again, as Llama has it; else the product has, as Gemma does."""

    eps: float
    offset: float
    casts_first: bool


def rms_norm(x: Tensor, weight: Tensor, facts: Facts) -> Tensor:
    """Returns the norm of each row of x, (..., D), by the weight, (D,), differentiable once."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, facts)
    return _forward(x, weight, facts)[0]


def _forward(x: Tensor, weight: Tensor, facts: Facts) -> tuple[Tensor, Tensor]:
    """Returns the norm and one over the root mean square of each row, (..., 1)."""
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    inverse = inverse.add_(facts.eps).rsqrt_()
    normed = wide * inverse
    if not facts.casts_first:
        return normed.mul_(_scale(weight, facts)).to(x.dtype), inverse
    normed, scale = normed.to(x.dtype), weight + facts.offset if facts.offset else weight
    return (normed.mul_(scale) if scale.dtype == normed.dtype else normed * scale), inverse


def _scale(weight: Tensor, facts: Facts) -> Tensor:
    return weight.float() + facts.offset if facts.offset else weight.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, facts):
        out, inverse = _forward(x, weight, facts)
        ctx.save_for_backward(x, weight, inverse)
        ctx.facts = facts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, grad.float()
        shares = grad * normed
        d_x = d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = shares.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scale = _scale(weight, ctx.facts)
            mean = shares.matmul(scale).div_(x.shape[-1]).unsqueeze(-1)
            d_x = (grad * scale).addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype)
        return d_x, d_weight, None


# --- in the modules of transformers -----------------------------------------------------------------------------------


class LeanNorm(Replaced):
    facts: ClassVar[Facts]
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.facts)


def make_norms_lean(model: nn.Module) -> int:
    """Replaces the norms of a model in place by ones that keep less; returns how many there are."""
    found = 0
    for module in model.modules():
        if not isinstance(module, LeanNorm) and (facts := _facts(module)) is not None:
            module.__class__ = _lean(type(module), facts)
        found += isinstance(module, LeanNorm)
    return found


@contextmanager
def own_norms(model: nn.Module) -> Iterator[None]:
    """Within it the norms are those of transformers."""
    lean = [(module, type(module)) for module in model.modules() if isinstance(module, LeanNorm)]
    try:
        for module, kind in lean:
            module.__class__ = kind.own
        yield
    finally:
        for module, kind in lean:
            module.__class__ = kind


_known: dict[tuple[type[nn.Module], tuple[tuple[str, Any], ...]], Facts | None] = {}
"""What norms of a class, with the numbers that they are made with, were found to compute."""


@cache
def _lean(own: type[nn.Module], facts: Facts) -> type[LeanNorm]:
    return class_of(LeanNorm, own, facts=facts)


def _facts(module: nn.Module) -> Facts | None:
    """Returns what a module computes, None where it is no such norm."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or len(module._parameters) > 1 or module._buffers or module._modules:
        return None
    own = vars(module)
    eps = [own[name] for name in ("variance_epsilon", "eps", "epsilon") if isinstance(own.get(name), float)]
    if len(eps) != 1 or "forward" in own or isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return None
    settings = [(name, value) for name, value in own.items() if isinstance(value, bool | int | float | str)]
    key = type(module), tuple(sorted(settings))
    if key not in _known:
        _known[key] = _measured(module, eps[0])
    return _known[key]


def _measured(module: nn.Module, eps: float) -> Facts | None:
    taken = inspect.signature(type(module).forward).parameters.values()
    if len(taken) != 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in taken):
        return None  # a gate for example, which may be left out
    for offset in (0.0, 1.0):
        for casts_first in (True, False):
            facts = Facts(eps, offset, casts_first)
            try:
                if _agrees(module, facts):
                    return facts
            except Exception as error:  # it wants something else than a norm does
                log.debug("%s stays as it is: %s: %s", type(module).__name__, type(error).__name__, error)
                return None
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def _agrees(module: nn.Module, facts: Facts) -> bool:
    """Whether a norm computes these facts, values and gradients, in float32 and where bfloat16 takes part."""
    generator = torch.Generator().manual_seed(0)
    width = module._parameters["weight"].numel()  # type: ignore[union-attr]
    draw = [torch.randn(size, generator=generator, device="cpu") for size in ((1, 3, width), (width,), (1, 3, width))]
    twin = copy.copy(module)
    for x_dtype in (torch.float32, torch.bfloat16):
        for weight_dtype in (torch.float32, torch.bfloat16):
            x, weight = draw[0].to(x_dtype).requires_grad_(), nn.Parameter(draw[1].to(weight_dtype))
            twin.__dict__["_parameters"] = {"weight": weight}
            pairs = []
            for out in (twin(x), rms_norm(x, weight, facts)):
                grads = torch.autograd.grad((out.float() * draw[2]).sum(), (x, weight))
                pairs.append((out, *grads))
            limit = EXACT if (x_dtype, weight_dtype) == (torch.float32, torch.float32) else HALF
            for own, ours in zip(*pairs, strict=True):
                if own.dtype != ours.dtype or own.shape != ours.shape:
                    return False
                size = max(1.0, own.detach().abs().max().item())
                if not (own.float() - ours.float()).abs().max().item() <= limit * size:
                    return False
    return True
