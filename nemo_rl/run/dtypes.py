"""In which dtype the weights of a model go to its checkpoints: that which the model had when it was loaded."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Dtypes:
    """The dtypes that the weights of a model had before they became fp32 for training, by name; and whether its
    checkpoints are to be fp32 all the same."""

    as_loaded: dict[str, torch.dtype] = field(default_factory=dict)
    fp32: bool = False

    def saved(self, name: str) -> torch.dtype | None:
        """In which dtype this weight is saved; None: in that which it has."""
        return None if self.fp32 else self.as_loaded.get(name)

    @property
    def narrow(self) -> bool:
        """Whether checkpoints hold less of the weights than training has."""
        return not self.fp32 and any(_is_narrow(dtype) for dtype in self.as_loaded.values())


_known: weakref.WeakKeyDictionary[Any, Dtypes] = weakref.WeakKeyDictionary()


def remember_dtypes(model: Any, fp32: bool, as_loaded: dict[str, torch.dtype] | None = None) -> None:
    """Notes how the checkpoints of a model are saved, before its weights become fp32.

    A model that an earlier call has made fp32 keeps the dtypes that it had before that call.
    """
    if as_loaded is None:
        now = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        changed = model not in _known or any(dtype != torch.float32 for dtype in now.values())
        as_loaded = now if changed else _known[model].as_loaded
    _known[model] = Dtypes(as_loaded, fp32)


def dtypes_of(model: Any) -> Dtypes:
    """What was noted of this model, or of the model that its adapters are around."""
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    return _known.get(base, Dtypes())


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize
