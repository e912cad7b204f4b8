"""How a model's logits follow from its hidden states: measured, since families scale and cap them under many names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 40.0
"""Largest logit of the measurement: large enough that the usual soft caps (30 to 50) bend it."""
EXACT = 3e-5
"""Largest error of a fit, relative to the largest logit."""


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(z / cap) (z without cap), z = scale * (output layer of `backbone`'s hidden states)."""

    backbone: nn.Module
    scale: float = 1.0
    cap: float | None = None


@torch.no_grad()
def measure_head(model: nn.Module, ids: list[int]) -> Head | None:
    """Returns how the logits follow from hidden states; None where they are more than a scaled, capped output layer.

    The input of the output layer is made larger for the measurement, so that a soft cap shows however small the logits are.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    tokens = torch.tensor([ids], device=head.weight.device)
    for backbone in _backbones(model):
        try:
            hidden = backbone(input_ids=tokens, use_cache=False).last_hidden_state[0].float()
        except Exception:  # the next candidate may be the one
            continue
        if hidden.shape[-1] != head.weight.shape[1]:
            continue
        raw = F.linear(hidden, head.weight)
        factor = LARGE / raw.abs().max().clamp(min=1e-6).item()
        enlarge = head.register_forward_pre_hook(lambda _, inputs, factor=factor: (inputs[0] * factor, *inputs[1:]))
        try:
            logits = model(input_ids=tokens, use_cache=False).logits[0].float()
        finally:
            enlarge.remove()
        raw = raw * factor if head.bias is None else raw * factor + head.bias
        config = model.config.get_text_config()
        found = _fit(raw, logits, _floats(config.to_dict())) if raw.shape == logits.shape else None
        if found is not None:
            return Head(backbone, *found)
    return None


def _backbones(model: Any) -> Iterator[nn.Module]:
    """Yields the modules that may give the hidden states, the likeliest first."""
    seen: list[nn.Module] = [model]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for module in (model.base_model, decoder, getattr(model, "model", None)):
        if isinstance(module, nn.Module) and not any(module is other for other in seen):
            seen.append(module)
            yield module


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
