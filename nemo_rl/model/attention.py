"""Attention over packed tokens: transformers' own modules run on one row of flat tokens, and only attention knows the sequences.

transformers lets a model's attention be replaced by name (`AttentionInterface`), together with the function that makes its
mask (`AttentionMaskInterface`). Ours reads the layout of the batch that is running: a flat token belongs to one sequence, or,
in a shared prompt, to several. What a layer wants is taken from its call: scale, window, soft cap, sinks, grouped heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_rl.model.packing import PackedBatch

log = logging.getLogger(__name__)

NAME = "nemo_rl_packed"
"""Under which transformers knows our attention."""
SCORES_AT_ONCE = 2**24
"""Attention scores that exist at one time where they are written out: 64 MB in float32."""
ROWS_LOOKED_AT = 256
"""Rows of a mask that are looked at to tell whether it is a window."""
KERNEL_TOLERANCE = 3e-2
"""Largest difference of a half-precision kernel from the same attention written out, of numbers around one."""


# ---------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Band:
    """Which earlier tokens of its sequence a token sees: all (`window` None, `mask` None), the last `window` with itself, or
    those of `mask`, (T, T), True where it sees."""

    window: int | None = None
    mask: Tensor | None = None


CAUSAL = Band()


@dataclass
class PackedMask:
    """Stands in a model for the mask of one kind of layer: `visible(batch, head, query, key)` over positions in a sequence."""

    visible: Callable[..., Any]
    bands: dict[int, Band] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    """For whoever attends: what all layers with this mask share."""

    def band(self, length: int, device: torch.device) -> Band:
        """Returns which tokens are seen in sequences of up to `length` tokens."""
        if length not in self.bands:
            self.bands[length] = self._band(length, device)
        return self.bands[length]

    def _band(self, length: int, device: torch.device) -> Band:
        columns = torch.arange(length, device=device)
        step = max(1, length // ROWS_LOOKED_AT)
        rows = torch.unique(torch.cat([columns[::step], columns[-2:]]))
        seen = self.sees(rows, columns)
        distance = rows[:, None] - columns[None]
        if torch.equal(seen, distance >= 0):
            return CAUSAL
        window = int(seen[-1].sum())
        if torch.equal(seen, (distance >= 0) & (distance < window)):
            return Band(window)
        return Band(mask=self.sees(columns, columns))

    def sees(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns which columns each row sees, (rows, columns)."""
        zero = torch.zeros((), dtype=torch.long, device=rows.device)
        seen = self.visible(zero, zero, rows[:, None], columns[None])
        return torch.broadcast_to(seen, (len(rows), len(columns)))


def packed_mask(*_: Any, mask_function: Callable[..., Any], **others: Any) -> PackedMask:
    """transformers' mask interface: keeps the function that says what is seen, and makes no mask."""
    return PackedMask(mask_function)


@dataclass(frozen=True)
class Seen:
    """Which tokens a layer sees: `mask` where the model made one, else all earlier ones or the last `window` with itself."""

    mask: PackedMask | None
    window: int | None

    def band(self, length: int, device: torch.device) -> Band:
        if self.mask is not None:
            return self.mask.band(length, device)
        return Band(self.window) if self.window is not None and self.window < length else CAUSAL


@dataclass(frozen=True)
class Facts:
    """What a layer does with scores: scale * q k, cap * tanh(. / cap), one more key per head whose score is its sink."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


# ---------------------------------------------------------------------- the function that transformers calls


class Attend(Protocol):
    """Attention of a forward that is running."""

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Seen, facts: Facts) -> Tensor:
        """Takes queries (B, H, T, D), keys and values (B, KV, T, D), returns (B, T, H, D)."""
        ...


_running: ContextVar[Attend | None] = ContextVar("nemo_rl_attention", default=None)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for the forward that is running: (B, H, T, D) in, (B, T, H, D) out. Raises ValueError
    for what packed tokens cannot have, so that another path is taken."""
    attend = _running.get()
    if attend is None:
        raise RuntimeError("packed attention was called outside of a packed forward")
    if (is_causal if is_causal is not None else getattr(module, "is_causal", True)) is False:
        raise ValueError("attention in both directions")
    if others.get("position_bias") is not None or others.get("indices") is not None:
        raise ValueError("attention with a bias or a choice of its own")
    if attention_mask is not None and not isinstance(attention_mask, PackedMask):
        raise ValueError("the model makes attention masks of its own")
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)  # rotary embeddings leave queries and keys in float32
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    facts = Facts(scale, softcap or None, s_aux)
    return attend(module, query, key, value, Seen(attention_mask, sliding_window), facts), None


@dataclass(frozen=True)
class Flat:
    """Attention over the flat tokens of a batch, in one row."""

    batch: PackedBatch

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Seen, facts: Facts) -> Tensor:
        batch, tokens = self.batch, len(self.batch.ids_N)
        if q.shape[0] != 1 or q.shape[2] != tokens or k.shape[2] != tokens:
            raise ValueError(f"attention over {tuple(q.shape)} and {tuple(k.shape)}, not over {tokens} flat tokens")
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        band = seen.band(batch.longest, q.device)
        kernel = _kernel(q, k, v, band, facts)
        if kernel is not None:
            return kernel(q, k, v, batch, band, facts).unsqueeze(0)
        return grouped_attention(q, k, v, batch, lambda length: seen.band(length, q.device), facts).unsqueeze(0)


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, band: Callable[[int], Band], facts: Facts
) -> Tensor:
    """Attention of sequences of similar length together, (N, H, D): right padding needs no mask, since no real token sees a
    later slot."""
    outputs = []
    for view in batch.views:
        rows = [x.reshape(len(x), -1).index_select(0, view.gather) for x in (q, k, v)]
        gathered = [
            flat.view(view.rows, view.length, *x.shape[1:]).transpose(1, 2)
            for flat, x in zip(rows, (q, k, v), strict=True)
        ]
        out = _dense(*gathered, band(view.length), facts)
        outputs.append(out.transpose(1, 2).reshape(view.rows * view.length, -1))
    slots = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return slots.index_select(0, batch.back_N).view(len(q), q.shape[1], -1)


def _dense(q: Tensor, k: Tensor, v: Tensor, band: Band, facts: Facts) -> Tensor:
    """Attention of rows of equal length, (B, H, T, D), by PyTorch's fused kernel where it can, else written out."""
    mask = band.mask
    if band.window is not None:
        mask = _window(q.shape[2], band.window, q.device)
    if facts.softcap is None and facts.sinks is None and q.shape[-1] == v.shape[-1]:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=facts.scale, enable_gqa=grouped
        )
    if mask is None:
        mask = _window(q.shape[2], q.shape[2], q.device)
    return _Written.apply(q, k, v, facts.sinks, mask, facts.scale, facts.softcap)


def _window(length: int, window: int, device: torch.device) -> Tensor:
    columns = torch.arange(length, device=device)
    distance = columns[:, None] - columns[None]
    return (distance >= 0) & (distance < window)


class _Written(torch.autograd.Function):
    """Attention with scores that no fused kernel has: soft caps (arXiv 2408.00118), sinks (arXiv 2309.17453), values wider than
    keys. Keeps its inputs only, never a score; key and value heads are not repeated."""

    @staticmethod
    def _probabilities(q, k, sinks, mask, scale, softcap):
        """Returns probabilities (B, KV, G, T, T) in float32, that of the sink, and the derivative of the cap."""
        B, H, T, D = q.shape
        KV = k.shape[1]
        scores = torch.matmul(q.reshape(B, KV, (H // KV) * T, D), k.transpose(-1, -2)).float().mul_(scale)
        scores = scores.view(B, KV, H // KV, T, T)
        slope = None
        if softcap is not None:
            bent = torch.tanh_(scores.div_(softcap))
            slope = 1 - bent.square()
            scores = bent * softcap
        scores.masked_fill_(~mask, float("-inf"))
        if sinks is None:
            return torch.softmax(scores, -1), None, slope
        sink = sinks.float().view(1, KV, H // KV, 1, 1).expand(B, -1, -1, T, 1)
        joined = torch.softmax(torch.cat([scores, sink], -1), -1)
        return joined[..., :-1], joined[..., -1:], slope

    @staticmethod
    def _parts(q):
        rows = max(1, SCORES_AT_ONCE // max(1, q.shape[1] * q.shape[2] * q.shape[2]))
        return [slice(i, i + rows) for i in range(0, q.shape[0], rows)]

    @staticmethod
    def forward(ctx, q, k, v, sinks, mask, scale, softcap):
        ctx.save_for_backward(q, k, v, sinks, mask)
        ctx.facts = (scale, softcap)
        B, H, T, _ = q.shape
        out = torch.empty(B, H, T, v.shape[-1], dtype=q.dtype, device=q.device)
        for part in _Written._parts(q):
            p, _, _ = _Written._probabilities(q[part], k[part], sinks, mask, scale, softcap)
            rows = p.to(v.dtype).flatten(2, 3)
            out[part] = torch.matmul(rows, v[part]).view(-1, H, T, v.shape[-1])
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks, mask = ctx.saved_tensors
        scale, softcap = ctx.facts
        _, H, T, D = q.shape
        KV = k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_sinks = torch.zeros(H, dtype=torch.float32, device=q.device) if sinks is not None else None
        for part in _Written._parts(q):
            p, p_sink, slope = _Written._probabilities(q[part], k[part], sinks, mask, scale, softcap)
            B = p.shape[0]
            d_out = grad[part].reshape(B, KV, (H // KV) * T, -1).to(v.dtype)
            rows = p.to(v.dtype).flatten(2, 3)
            dv[part] = torch.matmul(rows.transpose(-1, -2), d_out)
            d_p = torch.matmul(d_out, v[part].transpose(-1, -2)).float().view_as(p)
            mean = (d_p * p).sum(-1, keepdim=True)
            if d_sinks is not None:
                d_sinks -= (p_sink * mean).sum((0, 3, 4)).flatten()
            d_scores = d_p.sub_(mean).mul_(p).mul_(scale)
            if slope is not None:
                d_scores.mul_(slope)
            d_scores = d_scores.to(q.dtype).flatten(2, 3)
            dq[part] = torch.matmul(d_scores, k[part]).view(B, H, T, D)
            dk[part] = torch.matmul(d_scores.transpose(-1, -2), q[part].reshape(B, KV, (H // KV) * T, D))
        return dq, dk, dv, d_sinks.to(sinks.dtype) if d_sinks is not None else None, None, None, None


# ---------------------------------------------------------------------- kernels for sequences of different lengths (CUDA)


def _kernel(q: Tensor, k: Tensor, v: Tensor, band: Band, facts: Facts) -> Any:
    """Returns a kernel without padding for the call, None where there is none: on the CPU, in float32, for other masks."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16) or band.mask is not None:
        return None
    if facts.sinks is not None or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return None
    window = band.window is not None
    return _chosen_kernel(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2], window, facts.softcap)


@cache
def _chosen_kernel(
    device: torch.device, dtype: torch.dtype, H: int, KV: int, D: int, window: bool, softcap: float | None
) -> Any:
    """Returns the first kernel that is installed and agrees with attention written out, and says which it is."""
    for name, kernel in (("PyTorch's varlen_attn", _varlen), ("flash-attn", _flash), ("flex_attention", _flex)):
        if softcap is not None and kernel is _varlen:
            continue
        try:
            off = _off(kernel, device, dtype, H, KV, D, window, softcap)
        except Exception as error:  # not installed, or not for this card, head size or window
            log.debug("attention by %s is not used: %s: %s", name, type(error).__name__, error)
            continue
        if off <= KERNEL_TOLERANCE:
            log.debug("attention of packed tokens by %s (%d heads of %d%s)", name, H, D, ", windows" if window else "")
            return kernel
        log.warning("attention by %s differs by %.2g from the same written out, so it is not used", name, off)
    log.debug("attention of packed tokens by scaled_dot_product_attention of padded groups")
    return None


@torch.enable_grad()
def _off(
    kernel: Any,
    device: torch.device,
    dtype: torch.dtype,
    H: int,
    KV: int,
    D: int,
    window: bool,
    softcap: float | None,
) -> float:
    """Returns how far a kernel's output and gradients are from attention written out, on a few random sequences."""
    from nemo_rl.model.packing import TokenSequence, pack

    batch = pack([TokenSequence(list(range(n)), 1) for n in (70, 5, 141)], device)
    generator = torch.Generator().manual_seed(0)
    heads = (H, KV, KV)
    draws = [torch.randn(len(batch.ids_N), h, D, generator=generator) for h in heads]
    half = [x.to(device, dtype).requires_grad_() for x in draws]
    full = [x.to(device).requires_grad_() for x in half]
    band, facts = Band(40 if window else None), Facts(D**-0.5, softcap)
    found = kernel(*half, batch, band, facts)
    expected = grouped_attention(*full, batch, lambda _: band, facts)
    pairs = [(found, expected)]
    pairs += zip(torch.autograd.grad(found.float().sum(), half), torch.autograd.grad(expected.sum(), full), strict=True)
    return max((a.float() - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in pairs)


def _slots(batch: PackedBatch, *flat: Tensor) -> list[Tensor]:
    return [x.index_select(0, batch.slots) for x in flat]


def _varlen(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, band: Band, facts: Facts) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = batch.boundaries, batch.longest
    left = -1 if band.window is None else band.window - 1
    grouped = q.shape[1] != k.shape[1]
    inputs = _slots(batch, q, k, v)
    out = varlen_attn(
        *inputs, ends, ends, longest, longest, scale=facts.scale, window_size=(left, 0), enable_gqa=grouped
    )
    return out.index_select(0, batch.from_slots)


def _flash(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, band: Band, facts: Facts) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    ends, longest = batch.boundaries, batch.longest
    left = -1 if band.window is None else band.window - 1
    out = flash_attn_varlen_func(
        *_slots(batch, q, k, v),
        *(ends, ends, longest, longest),
        softmax_scale=facts.scale,
        causal=True,
        window_size=(left, 0 if band.window is not None else -1),
        softcap=facts.softcap or 0.0,
    )
    return out.index_select(0, batch.from_slots)


def _flex(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, band: Band, facts: Facts) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(batch.lengths, device=q.device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
    window = band.window

    def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (document[query] == document[key]) & (key <= query)
        return seen if window is None else seen & (key > query - window)

    blocks = batch.blocks.get(window)
    if blocks is None:
        places = len(batch.slots)
        blocks = batch.blocks[window] = create_block_mask(visible, None, None, places, places, device=q.device)
    inputs = [x.transpose(0, 1).unsqueeze(0) for x in _slots(batch, q, k, v)]
    out = _compiled_flex()(
        *inputs,
        score_mod=_cap(facts.softcap) if facts.softcap is not None else None,
        block_mask=blocks,
        scale=facts.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1).index_select(0, batch.from_slots)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@cache
def _cap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


# ---------------------------------------------------------------------- switching a model to it


class PackedAttention:
    """Switches the attention of one model between its own and ours."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError where the model does not choose its attention by name."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(NAME, packed_attention)
        AttentionMaskInterface.register(NAME, packed_mask)
        found = [vars(module).get("config") for module in model.modules()]
        configs = {id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}
        self.configs: list[Any] = list(configs.values())
        if not self.configs:
            raise ValueError(f"{type(model).__name__} does not choose its attention by a configuration")

    @contextmanager
    def running(self, attend: Attend) -> Iterator[None]:
        """Within it the attention of the model is `attend`."""
        own = [config._attn_implementation_internal for config in self.configs]
        token = _running.set(attend)
        for config in self.configs:
            config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            for config, name in zip(self.configs, own, strict=True):
                config._attn_implementation_internal = name
            _running.reset(token)

    def again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: contexts of the forward and of its repetition in the backward pass."""
        attend = _running.get()
        return nullcontext(), nullcontext() if attend is None else self.running(attend)
