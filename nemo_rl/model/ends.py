"""Which tokens end a completion: written into the model's generation config, where rollouts, checkpoints and every later
`generate()` find them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def known_ends(source: Any) -> list[int]:
    """The end tokens of a generation config, a model's config or a tokenizer."""
    value = getattr(source, "eos_token_id", None)
    return [int(token) for token in (value if isinstance(value, list | tuple) else [value]) if token is not None]


def teach_ends(model: Any, further: Sequence[int]) -> None:
    """Lets completions of the model end with these tokens too.

    A base model often knows its EOS alone, while its chat template ends turns with another token: trained on
    conversations it learns to write that one, and would never stop.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = known_ends(config) or known_ends(model.config)
    new = [token for token in dict.fromkeys(further) if token not in known]
    if new:
        ends = [*known, *new]
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
