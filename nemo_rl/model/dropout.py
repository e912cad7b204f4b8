"""Dropout and router noise, off: post-training compares log-probabilities of one and the same function."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

RANDOM = re.compile(r"drop|jitter|pdrop", re.IGNORECASE)
"""Names of settings by which a layer draws random numbers in training: attention_dropout, resid_pdrop, layerdrop,
router_jitter_noise, ..."""


def switch_off_dropout(model: nn.Module) -> None:
    """Sets every dropout of the model to zero: modules, numbers that layers keep, and numbers that they read from the
    configuration. The model's own `config`, which checkpoints save, stays as it is."""
    quiet: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and value and RANDOM.search(name):
                setattr(module, name, 0.0)
        config = vars(module).get("config")
        if module is model or config is None or not hasattr(config, "to_dict"):
            continue
        if id(config) not in quiet:
            quiet[id(config)] = _without_dropout(config)
        module.config = quiet[id(config)]


def _without_dropout(config: Any) -> Any:
    """Returns the configuration itself where nothing in it is random, else a copy of it with zeros."""
    found = [name for name, value in vars(config).items() if isinstance(value, float) and value and RANDOM.search(name)]
    if not found:
        return config
    config = copy.deepcopy(config)
    for name in found:
        setattr(config, name, 0.0)
    return config
