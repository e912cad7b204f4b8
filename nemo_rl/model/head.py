"""How a model's logits follow from its hidden states: measured, since families scale and cap them under many names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_rl.model.replaced import Replaced, class_of


class Fp32Head(Replaced):
    weight: Tensor
    bias: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), self.bias.float() if self.bias is not None else None)


def cast_to_fp32(model: nn.Module) -> None:
    """From now on the output layer of a model computes its logits in float32, whatever the rest computes in.

    Raises ValueError for an output layer that is none.
    """
    head: Any = model.get_output_embeddings()
    if not _is_linear(head):
        kind = type(head)
        raise ValueError(
            f"found {kind.__module__}.{kind.__name__} as the output layer of {type(model).__name__}; expected a plain linear "
            "layer without adapters, whose logits can be computed in float32: leave cast_lm_head_to_fp32 out"
        )
    if not isinstance(head, Fp32Head):
        head.__class__ = class_of(Fp32Head, type(head))


def undo_cast(model: nn.Module) -> None:
    """The output layer computes as it did before `cast_to_fp32`, which an earlier run with the same model may have called."""
    for module in model.modules():
        if isinstance(module, Fp32Head):
            module.__class__ = module.own


def _is_linear(head: Any) -> bool:
    # sharding makes a class of its own for a module, with the same forward
    return isinstance(head, nn.Linear) and type(head).forward in (nn.Linear.forward, Fp32Head.forward)


LARGE = 40.0
"""Largest logit of the measurement: large enough that the usual soft caps (30 to 50) bend it."""
EXACT = 3e-5
"""Largest error of a fit, relative to the largest logit."""


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(z / cap) (z without cap), z = scale * (output layer of what it is given)."""

    scale: float = 1.0
    cap: float | None = None


@torch.no_grad()
def measure_head(model: nn.Module, ids: list[int]) -> Head | None:
    """Returns how the logits follow from the input of the output layer; None where they are more than a scaled, capped layer.

    That input is made larger for the measurement, so that a soft cap shows however small the logits are.
    """
    head = model.get_output_embeddings()
    if not _is_linear(head):
        return None
    raws: list[Tensor] = []

    def enlarge(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(inputs) != 1:
            return inputs
        hidden = inputs[0]
        factor = LARGE / F.linear(hidden.float(), head.weight).abs().max().clamp(min=1e-6).item()
        raws.append(F.linear(hidden.float() * factor, head.weight, head.bias)[0])
        return (hidden * factor,)

    enlarging = head.register_forward_pre_hook(enlarge)
    try:
        tokens = torch.tensor([ids], device=next(model.parameters()).device)
        logits = model(input_ids=tokens, use_cache=False).logits[0].float()
    finally:
        enlarging.remove()
    if len(raws) != 1 or raws[0].shape != logits.shape:
        return None
    found = _fit(raws[0], logits, _floats(model.config.get_text_config().to_dict()))
    return Head(*found) if found is not None else None


def _fit(raw: Tensor, logits: Tensor, numbers: dict[str, float]) -> tuple[float, float | None] | None:
    """Returns the scale and the cap that turn `raw` into `logits`, of those that fit the best one."""
    caps = sorted({value for name, value in numbers.items() if "cap" in name and value > 0})
    best: tuple[float, float, float | None] | None = None
    for cap in (None, *caps):
        straight = logits
        if cap is not None:
            share = logits / cap
            straight = cap * torch.atanh(share.clamp(-0.999999, 0.999999))
            near = share.abs() < 0.9
            if not near.any():
                continue
            scale = (straight * raw)[near].sum() / (raw * raw)[near].sum()
        else:
            scale = (straight * raw).sum() / (raw * raw).sum()
        exact = _known(scale.item(), numbers)
        found = exact * raw if cap is None else cap * torch.tanh(exact * raw / cap)
        error = (found - logits).abs().max().item() / max(logits.abs().max().item(), 1e-6)
        if error == error and error <= EXACT and (best is None or error < best[0]):
            best = (error, exact, cap)
    return best[1:] if best is not None else None


def _known(scale: float, numbers: dict[str, float]) -> float:
    """Returns the number of the configuration, or one over it, that a measured scale stands for."""
    for value in (1.0, *numbers.values()):
        for candidate in (value, 1 / value if value else 0.0):
            if abs(candidate - scale) <= 1e-5 * abs(scale):
                return candidate
    return scale


def _floats(values: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
