"""Cached decoding on transformers' own modules with our attention: prompts run packed, each row has its own length, nothing is padded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nemo_rl.model.attention import Facts, Flat, Seen
from nemo_rl.model.packing import PackedBatch, TokenSequence, pack
from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process.decode import DecodeState


@dataclass
class _Cache:
    """Keys and values of the rows, for each attention module (rows, KV, columns, D); column p holds position p."""

    rows: int
    columns: int
    layers: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, module: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of a module; made at its first call, as keys and values (., KV, ., D) are. What no row has
        written yet is multiplied by shares of zero, so it must be finite."""
        if module not in self.layers:
            self.layers[module] = (
                k.new_zeros(self.rows, k.shape[1], self.columns, k.shape[-1]),
                v.new_zeros(self.rows, v.shape[1], self.columns, v.shape[-1]),
            )
        return self.layers[module]


@dataclass(frozen=True)
class _Filling:
    """Attention of prompts, packed; their keys and values go into the cache. `rows`: those of each prompt, (prompts, samples)."""

    batch: PackedBatch
    cache: _Cache
    rows: Tensor

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Seen, facts: Facts) -> Tensor:
        out = Flat(self.batch)(module, q, k, v, seen, facts)
        number = 0
        for view in self.batch.views:
            rows = self.rows[self.batch.order[number : number + view.rows]]
            number += view.rows
            for kept, new in zip(self.cache.of(module, k, v), (k, v), strict=True):
                # beyond a shorter prompt lie values that its own tokens overwrite before they are seen
                each = new[0].transpose(0, 1)[view.gather].view(view.rows, view.length, *new.shape[1::2])
                kept[rows, :, : view.length] = each.transpose(1, 2).unsqueeze(1)
        return out


@dataclass(frozen=True)
class _Decoding:
    """Attention of one new token of each row to its row. `positions`: of the new tokens; `used`: columns in use after them."""

    cache: _Cache
    positions: Tensor
    used: int

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Seen, facts: Facts) -> Tensor:
        rows, H, _, D = q.shape
        KV = k.shape[1]
        keys, values = (kept[:rows] for kept in self.cache.of(module, k, v))
        numbers = torch.arange(rows, device=q.device)
        keys[numbers, :, self.positions], values[numbers, :, self.positions] = k[:, :, 0], v[:, :, 0]
        # query heads of one key head are rows of one product: (rows, KV, H / KV, D)
        products = torch.matmul(q.reshape(rows, KV, H // KV, D), keys[:, :, : self.used].transpose(-1, -2))
        scores = products.float().mul_(facts.scale)
        if facts.softcap is not None:
            scores = torch.tanh_(scores.div_(facts.softcap)).mul_(facts.softcap)
        scores += self._hidden(seen)
        if facts.sinks is not None:
            sinks = facts.sinks.float().view(1, KV, H // KV, 1).expand(rows, -1, -1, 1)
            shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            shares = scores.softmax(-1)
        out = torch.matmul(shares.to(values.dtype), values[:, :, : self.used])
        return out.view(rows, 1, H, -1)

    def _hidden(self, seen: Seen) -> Tensor:
        """Returns 0 where a row's new token sees a column and minus infinity elsewhere, (rows, 1, 1, used)."""
        kept = seen.mask.kept if seen.mask is not None else {}
        if "hidden" not in kept:
            columns = torch.arange(self.used, device=self.positions.device)
            if seen.mask is not None:
                visible = seen.mask.sees(self.positions, columns)
            else:
                distance = self.positions[:, None] - columns[None]
                visible = (distance >= 0) & (distance < (seen.window or self.used))
            hidden = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))
            kept["hidden"] = hidden[:, None, None]
        return kept["hidden"]


class PackedState(DecodeState):
    """Decodes with a cache of its own behind our attention."""

    refills = True

    def __init__(self, policy: Policy) -> None:
        assert policy.attention is not None
        super().__init__(policy)
        self.attention = policy.attention
        self.cache: _Cache
        self.lengths: list[int] = []
        """Tokens of each live row."""

    def prefill(self, prompts: list[list[int]], num_samples: int, length: int) -> Tensor:
        rows = torch.arange(len(prompts) * num_samples, device=self.device)
        self.cache = _Cache(len(rows), length)
        self.lengths = [0] * len(rows)
        return self.refill(prompts, rows.view(-1, num_samples)).repeat_interleave(num_samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        positions = torch.tensor(self.lengths, device=self.device)
        # a row that has ended goes on until it is filled anew, maybe for longer than there are columns
        self.lengths = [(length + 1) % self.cache.columns for length in self.lengths]
        inputs = {"input_ids": tokens[:, None], "position_ids": positions[:, None]}
        mask = torch.ones_like(inputs["input_ids"])
        with self.attention.running(_Decoding(self.cache, positions, max(self.lengths))):
            return self.model(**inputs, attention_mask=mask, use_cache=False).logits[:, -1].float()

    def keep(self, rows: Tensor) -> None:
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        used = max(self.lengths)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        if len(moved):
            for pair in self.cache.layers.values():
                for kept in pair:
                    kept[moved, :, :used] = kept[rows[moved], :, :used]

    def cache_size(self) -> int:
        """Returns the bytes of the cache."""
        return sum(kept.numel() * kept.element_size() for pair in self.cache.layers.values() for kept in pair)

    def release(self, rows: list[int]) -> None:
        for row in rows:
            self.lengths[row] = 0  # what it goes on to write is seen by nobody

    def refill(self, prompts: list[list[int]], rows: Tensor) -> Tensor:
        for prompt, members in zip(prompts, rows.tolist(), strict=True):
            for row in members:
                self.lengths[row] = len(prompt)
        # the last token of a packed sequence is only a target
        batch = pack([TokenSequence([*prompt, 0], len(prompt)) for prompt in prompts], self.device)
        inputs = {
            "input_ids": batch.ids_N[None],
            "position_ids": batch.positions_N[None],
            "attention_mask": torch.ones_like(batch.ids_N)[None],
        }
        with self.attention.running(_Filling(batch, self.cache, rows)):
            logits = self.policy.next_logits(inputs, batch.select_S)
        return logits[torch.argsort(batch.rows_S)]
