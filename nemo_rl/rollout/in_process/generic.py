"""Decoding of any causal language model through transformers' own forward: with its cache, or, where that is wrong, without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_rl.model.policy import Policy
from nemo_rl.model.probe import reset_positions
from nemo_rl.rollout.in_process.decode import DecodeState

CACHES = ("past_key_values", "cache_params", "state")
"""Names under which models give their cache back, and take it."""
ROWS_WITHOUT_CACHE = 4096
"""Tokens of one forward without a cache."""


class CachedState(DecodeState):
    """Decodes with the cache that the model itself makes, whatever is in it.

    `one_length`: prompts of one batch have equal lengths, and the model is given nothing but tokens, for families that ignore
    or mishandle padding. Otherwise prompts are padded on the left.
    """

    def __init__(self, policy: Policy, one_length: bool) -> None:
        super().__init__(policy)
        self.one_length = one_length
        self.cache: dict[str, Any] = {}
        self.mask: Tensor | None = None

    def prefill(self, prompts: list[list[int]], num_samples: int, length: int) -> Tensor:
        width = max(map(len, prompts))
        self.cache = {}
        if self.one_length:
            ids = torch.tensor(prompts, device=self.device)
            logits = self._forward(input_ids=ids)
        else:
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
            self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
            logits = self._forward(input_ids=ids, attention_mask=self.mask, position_ids=positions)
        if num_samples > 1:
            rows = torch.arange(len(prompts), device=self.device).repeat_interleave(num_samples)
            self._select(rows)
            logits = logits[rows]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        if self.one_length:
            return self._forward(input_ids=tokens[:, None])
        assert self.mask is not None
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
        positions = self.mask.sum(-1, keepdim=True) - 1
        return self._forward(input_ids=tokens[:, None], attention_mask=self.mask, position_ids=positions)

    def keep(self, rows: Tensor) -> None:
        self._select(rows)

    def cache_size(self) -> int:
        """Returns the bytes of the cache as it is."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self.cache))

    def _select(self, rows: Tensor) -> None:
        for name, cache in self.cache.items():
            self.cache[name] = _select(cache, rows)
        if self.mask is not None:
            self.mask = self.mask[rows]

    def _forward(self, **inputs: Any) -> Tensor:
        out = _call(self.model, **inputs, **self.cache, use_cache=True)
        made = {name: out[name] for name in CACHES if out.get(name) is not None}
        if not made and not self.cache:
            # a family that makes no cache by itself may fill one that it is given
            from transformers import DynamicCache

            self.cache = {"past_key_values": DynamicCache(config=self.model.config)}
            return self._forward(**inputs)
        self.cache = made or self.cache
        return out.logits[:, -1].float()


class UncachedState(DecodeState):
    """Decodes by running each row from its first token again for each new one: slow, and right for all."""

    one_length = True

    def __init__(self, policy: Policy, one_row: bool) -> None:
        """`one_row`: rows run one by one, for families whose rows are not independent of each other."""
        super().__init__(policy)
        self.one_row = one_row
        self.ids: Tensor

    def bytes_per_row(self, length: int) -> int:
        return length * self.model.get_input_embeddings().weight.shape[1] * 4

    def prefill(self, prompts: list[list[int]], num_samples: int, length: int) -> Tensor:
        self.ids = torch.tensor(prompts, device=self.device)
        logits = self._logits()
        self.ids = self.ids.repeat_interleave(num_samples, 0)
        return logits.repeat_interleave(num_samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, tokens[:, None]], -1)
        return self._logits()

    def keep(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]

    def _logits(self) -> Tensor:
        """Returns next-token logits, (rows, V); equal rows, as the samples of a prompt at first, are computed once."""
        rows, back = torch.unique(self.ids, dim=0, return_inverse=True)
        at_once = 1 if self.one_row else max(1, ROWS_WITHOUT_CACHE // rows.shape[1])
        return torch.cat([self._last(part) for part in rows.split(at_once)])[back]

    def _last(self, ids: Tensor) -> Tensor:
        reset_positions(self.model)
        return _call(self.model, input_ids=ids, use_cache=False).logits[:, -1].float()


def _call(model: Any, **inputs: Any) -> Any:
    """Runs the model, with logits of the last position only where it can."""
    try:
        return model(**inputs, logits_to_keep=1)
    except TypeError as error:
        if "logits_to_keep" not in str(error):
            raise
        return model(**inputs)


def _select(cache: Any, rows: Tensor) -> Any:
    """Returns the cache with these rows of the batch, in this order."""
    from transformers import Cache

    if isinstance(cache, Cache):
        # a class of its own that overrides one of the two knows what else it holds
        if type(cache).batch_select_indices is not Cache.batch_select_indices:
            cache.batch_select_indices(rows)
        else:
            cache.reorder_cache(rows)
        return cache
    if isinstance(cache, Tensor):
        return cache.index_select(0, rows) if cache.is_floating_point() else cache
    if isinstance(cache, dict):
        return {key: _select(value, rows) for key, value in cache.items()}
    if isinstance(cache, list | tuple):
        return type(cache)(_select(value, rows) for value in cache)
    if hasattr(cache, "__dict__"):
        for name, value in vars(cache).items():
            if isinstance(value, Tensor | dict | list | tuple):
                setattr(cache, name, _select(value, rows))
    return cache


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yields each tensor anywhere in a cache, once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not hasattr(value, "to_dict"):
        yield from _tensors(vars(value), seen)
