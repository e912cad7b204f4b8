"""Cached decoding of any causal language model through transformers' own forward and cache."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rl.model.policy import Policy


class GenericState:
    """Implements `DecodeState` with a transformers cache. Prompts are padded on the left."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.model, self.device = policy, policy.causal, policy.device

    def bytes_per_row(self, length: int) -> int:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * size * length * self.policy.dtype.itemsize

    def prefill(self, prompts: list[list[int]], num_samples: int, max_new_tokens: int) -> Tensor:
        from transformers import DynamicCache

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
        self.mask = mask
        if num_samples > 1:
            self.cache.batch_repeat_interleave(num_samples)
            self.mask = mask.repeat_interleave(num_samples, 0)
        return logits.repeat_interleave(num_samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], -1)
        return self._forward(tokens[:, None], self.mask, self.mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        with self.policy._autocast():
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1].float()
