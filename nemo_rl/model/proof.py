"""The proof at the door: before step 1, each way to log-probabilities is compared with the plain model, and the fastest right one is taken."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_rl.errors import NonFiniteTraining
from nemo_rl.model.kinds import describe
from nemo_rl.model.packing import TokenSequence, pack
from nemo_rl.model.probe import TOLERANCE, Probe, exact, plain_logprobs
from nemo_rl.model.sharding import local

if TYPE_CHECKING:
    from nemo_rl.model.policy import Policy

log = logging.getLogger(__name__)

GRADIENT_TOKENS = 192
"""Longest sequence whose gradient is compared: autograd keeps every activation of it."""
ALL_GRADIENTS, SOME_GRADIENTS = 2**26, 2**24
"""Up to so many trained numbers all gradients are compared; of larger models the smallest tensors of this many numbers."""
LEAK = 4e-6
"""Largest difference (nats) that other sequences of a packed batch may make: rounding. A fresh layer with a state of its own, such as
a convolution, may leak less than TOLERANCE at first, and more as it is trained."""
CHANCE = 0.1
"""A router may choose another expert where two are equally good. If no more tokens than this differ, other tokens decide."""


def check_causal(policy: Policy, probe: Probe) -> None:
    """Raises ValueError where the plain model cannot run, or where tokens change the log-probabilities of those before them,
    NonFiniteTraining where its log-probabilities are not finite: training would not change that."""
    length = min(12, probe.longest)
    ids = probe.ids(length, 1)
    other = ids[:-3] + probe.ids(3, 2)
    try:
        with torch.no_grad(), exact(policy.causal):
            first, second = _plain(policy, ids), _plain(policy, other)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if policy.model is not policy.causal:
            raise ValueError(
                f"the adapters do not fit {describe(policy.causal)}: its forward fails with them ({type(error).__name__}: "
                f"{_line(error)}); give lora_target_modules without the layers concerned, routers for example"
            ) from error
        raise ValueError(
            f"{describe(policy.causal)} cannot be used as a language model: transformers' own forward fails on {length} "
            f"tokens ({type(error).__name__}: {_line(error)}); expected a model that continues text"
        ) from error
    if not torch.isfinite(first).all():
        raise NonFiniteTraining(
            f"{describe(policy.causal)} gives log-probabilities that are NaN or infinite before the first step, so its weights "
            "are damaged or not loaded; expected finite numbers. Take an undamaged copy of the model, or an earlier checkpoint"
        )
    change = (first[: length - 4] - second[: length - 4]).abs().max().item()
    if change > TOLERANCE:
        raise ValueError(
            f"{describe(policy.causal)} is not a causal language model: tokens change the log-probabilities of tokens before "
            f"them (by {change:.2g} nats), so sampling and training would disagree; take a model that sees each text from left to right"
        )


def length_limit(policy: Policy, probe: Probe) -> int | None:
    """Returns the number of tokens from which on the plain model's log-probabilities change with the length of the sequence
    (as with rotary embeddings that are stretched to the length of each call); None if they never do."""
    ids = probe.ids(probe.longest, 7)

    @torch.no_grad()
    def depends(length: int) -> bool:
        with exact(policy.causal):
            whole, less = _plain(policy, ids[:length]), _plain(policy, ids[: length - 1])
        return (whole[:-1] - less).abs().max().item() > TOLERANCE

    if not depends(probe.longest):
        return None
    low, high = 2, probe.longest  # it depends on the length at high, and not at low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if depends(middle) else (middle, high)
    return low


def choose_path(policy: Policy, probe: Probe, paths: list[str]) -> str:
    """Returns the first of the paths whose log-probabilities and gradients are the plain model's. Raises ValueError if none is."""
    failures = []
    for path in paths:
        reason = _fault(policy, probe, path)
        if reason is None:
            return path
        log.debug("log-probabilities by way %r are not used: %s", path, reason)
        failures.append(f"{path}: {reason}")
    raise ValueError("; ".join(failures))


def _fault(policy: Policy, probe: Probe, path: str) -> str | None:
    """Returns what is wrong with a path, None if it is right to TOLERANCE."""
    try:
        if path.startswith("packed") and (leak := _leak(policy, probe, path)) > LEAK:
            return f"tokens of other sequences change log-probabilities by up to {leak:.2g} nats"
        errors, gradient = _errors(policy, probe, path, seed=11)
        bad = errors > TOLERANCE
        if (bad.any() and bad.float().mean() <= CHANCE) or gradient > TOLERANCE:
            others, other_gradient = _errors(policy, probe, path, seed=23)
            bad &= others > TOLERANCE
            gradient = min(gradient, other_gradient)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's code raises, it cannot take this path
        if policy.sharded is not None:
            policy.sharded.reset()
        return f"{type(error).__name__}: {_line(error)}"
    if bad.any():
        return f"log-probabilities differ from the plain model's by up to {errors.max():.2g} nats"
    if gradient > TOLERANCE:
        return f"the gradient differs from the plain model's by {gradient:.2g} of its norm"
    return None


def _errors(policy: Policy, probe: Probe, path: str, seed: int) -> tuple[Tensor, float]:
    """Returns the error of each log-probability, and the relative error of the gradient (0 where nothing is trained)."""
    # a caller may have switched gradients off
    with exact(policy.causal), torch.inference_mode(False), torch.enable_grad():
        sequences = probe.sequences(probe.longest, seed)
        with torch.no_grad():
            truth = torch.cat([_trained(policy, s) for s in sequences])
            errors = (_by_path(policy, sequences, path) - truth).abs()
        errors = policy.worst(torch.nan_to_num(errors, nan=torch.inf))
        parameters = _compared(policy)
        if not parameters or bool((errors > TOLERANCE).float().mean() > CHANCE):
            return errors, 0.0
        sequences = probe.sequences(min(probe.longest, GRADIENT_TOKENS), seed)
        plain = torch.zeros(sum(local(p).numel() for p in parameters), device=policy.device)
        weights = [_weights(s, i).to(policy.device) for i, s in enumerate(sequences)]
        for sequence, weight in zip(sequences, weights, strict=True):
            plain += _gradient(policy, (_trained(policy, sequence) * weight).sum(), parameters)
        found = _gradient(policy, (_by_path(policy, sequences, path) * torch.cat(weights)).sum(), parameters)
        off = policy.norm(found - plain) / policy.norm(plain).clamp(min=1e-20)
        return errors, off.item() if torch.isfinite(off) else float("inf")


def _leak(policy: Policy, probe: Probe, path: str) -> float:
    """Returns how much the log-probabilities of sequences change with the tokens of others, of the same lengths, between them."""
    length = min(9, probe.longest)
    first, last = probe.ids(length, 41), probe.ids(length, 42)
    with exact(policy.causal), torch.no_grad():
        found = []
        for seed in (43, 44):
            sequences = [TokenSequence(ids, 1) for ids in (first, probe.ids(length, seed), last)]
            logprobs = _by_path(policy, sequences, path)
            found.append(torch.cat([logprobs[: length - 1], logprobs[-(length - 1) :]]))
        return policy.worst(torch.nan_to_num((found[0] - found[1]).abs(), nan=torch.inf)).max().item()


def _trained(policy: Policy, sequence: TokenSequence) -> Tensor:
    """Returns the plain model's log-probabilities of the trained tokens."""
    policy.set_recomputing(False)
    return _plain(policy, sequence.ids)[sequence.first_target - 1 :]


def _plain(policy: Policy, ids: list[int]) -> Tensor:
    return policy.run(lambda: plain_logprobs(policy.causal, ids))


def _by_path(policy: Policy, sequences: list[TokenSequence], path: str) -> Tensor:
    """Returns the log-probabilities of the trained tokens in the order of the sequences."""
    batch = pack(sequences, policy.device, views=2)  # so that sequences of different lengths share a padded view
    found = policy.by_path(batch, 1.0, path)
    return torch.cat([found[batch.rows_S == i] for i in range(len(sequences))])


def _weights(sequence: TokenSequence, number: int) -> Tensor:
    return torch.rand(sequence.num_targets, generator=torch.Generator().manual_seed(number)) + 0.5


def _gradient(policy: Policy, loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """Returns the gradients of the parameters as one vector; of sharded ones this rank's part."""
    if policy.sharded is None:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    else:  # its hooks take part in whole backward passes alone
        loss.backward()
        found = tuple(p.grad for p in parameters)
        for parameter in policy.trainable:
            parameter.grad = None
    return torch.cat(
        [local(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def _compared(policy: Policy) -> list[Tensor]:
    """Returns the parameters whose gradients are compared."""
    trained = sorted(policy.trainable, key=lambda p: p.numel())
    if sum(p.numel() for p in trained) <= ALL_GRADIENTS:
        return trained
    chosen, total = [], 0
    for parameter in trained:
        total += parameter.numel()
        if total > SOME_GRADIENTS:
            break
        chosen.append(parameter)
    return chosen


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
