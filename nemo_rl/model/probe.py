"""Token sequences to compare two ways through a model with each other, and the plain model, one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_rl.model.limits import position_limit
from nemo_rl.model.norms import own_norms
from nemo_rl.model.packing import TokenSequence

TOLERANCE = 1e-3
"""Largest difference of a log-probability (nats), and of a gradient relative to its norm, in float32."""
SHORT = 40
"""Tokens of the longest sequence where the configuration has no window; at least this many positions are looked at."""
MARGIN = 9
"""Tokens by which the longest sequence outgrows a window."""
WORK_CPU, WORK_CUDA = 2e10, 3e13
"""Parameters times tokens that a comparison may cost: a few seconds."""
LONGEST_CPU, LONGEST_CUDA = 320, 2304
"""No sequence is longer: a small model is compared within a second, and activations must fit beside the weights."""
WINDOWS = ("window", "chunk", "block_size", "original_max_position", "max_window", "conv_kernel", "budget")


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Within it products are in float32, outside autocast and without TF32, and no random state is touched."""
    device = next(model.parameters()).device
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


def plain_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Returns the logits of one sequence, (len(ids), V), float32, by transformers' own forward, given nothing but the tokens."""
    device = next(model.parameters()).device
    reset_positions(model)
    with own_norms(model):
        return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()


def reset_positions(model: nn.Module) -> None:
    """Brings rotary embeddings that grow with the longest sequence seen back to where they began, so that the result for a
    sequence does not depend on the one before it."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "original_max_seq_len"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.register_buffer("inv_freq", module.original_inv_freq, persistent=False)


def logprobs_of(logits_NV: Tensor, ids: list[int]) -> Tensor:
    """Returns the log-probability of each token but the first under the logits of the sequence, (len(ids) - 1,)."""
    targets = torch.tensor(ids[1:], device=logits_NV.device)
    return logits_NV[:-1].log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def plain_logprobs(model: nn.Module, ids: list[int]) -> Tensor:
    """Returns the log-probability of each token but the first, (len(ids) - 1,), by `plain_logits`."""
    return logprobs_of(plain_logits(model, ids), ids)


class Probe:
    """Lengths and tokens that are fit to compare ways through one model."""

    def __init__(self, model: nn.Module, longest: int | None = None) -> None:
        """`longest`: no sequence of the run is longer, so none needs to be tried."""
        self.model = model
        config = model.config
        self.numbers = _numbers(config.to_dict())
        parameters = sum(p.numel() for p in model.parameters())
        device = next(model.parameters()).device
        work, most = (WORK_CUDA, LONGEST_CUDA) if device.type == "cuda" else (WORK_CPU, LONGEST_CPU)
        affordable = max(SHORT // 2, min(most, int(work / max(parameters, 1) / 4)))
        windows = [n for name, n in self.numbers if any(w in name for w in WINDOWS) and 1 < n <= affordable - MARGIN]
        wanted = min(max([SHORT, *(n + MARGIN for n in windows)]), affordable)
        self.longest = max(8, min(wanted, longest or wanted, position_limit(model) or wanted))

    def ids(self, length: int, seed: int) -> list[int]:
        """Returns random tokens, none of which has a meaning of its own (padding, image, ...)."""
        special = {n for name, n in self.numbers if "token" in name and ("id" in name or "index" in name)}
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        rows = min(module.weight.shape[0] for module in ends if module is not None)
        allowed = [i for i in range(min(3, rows - 1), min(rows, 1000)) if i not in special] or [0]
        generator = torch.Generator().manual_seed(seed)
        return [allowed[i] for i in torch.randint(0, len(allowed), (length,), generator=generator).tolist()]

    def sequences(self, longest: int, seed: int) -> list[TokenSequence]:
        """Returns one long sequence, short ones, and a group that shares its prompt; every token but the first is trained."""
        prompt = self.ids(max(longest // 4, 2), seed)
        group = [prompt + self.ids(n, seed + n) for n in (max(longest // 5, 1), 3)]
        alone = [self.ids(longest, seed + 101), self.ids(max(longest // 8, 4), seed + 102)]
        return [
            *(TokenSequence(ids, 1) for ids in alone),
            *(TokenSequence(ids, len(prompt), group=0, shared=len(prompt)) for ids in group),
        ]


def _numbers(values: Any, name: str = "") -> list[tuple[str, int]]:
    """Returns the whole numbers anywhere in a configuration, each with the last name on the way to it."""
    if isinstance(values, dict):
        return [found for key, value in values.items() for found in _numbers(value, str(key))]
    if isinstance(values, list | tuple):
        return [found for value in values for found in _numbers(value, name)]
    return [(name, values)] if isinstance(values, int) and not isinstance(values, bool) else []
