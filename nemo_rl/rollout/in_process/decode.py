"""The decode loop: rows of a model's cache grow by a token at a time until each has ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process.sampler import argmax, keyed_uniforms, sample
from nemo_rl.rollout.protocol import Completion, Sampling

COMPACT_SHARE = 0.06
"""Finished rows are dropped once they are this share of the batch: moving the cache costs more than a few idle rows."""
POLL_EVERY = 16
"""Tokens between two looks at the stop flag."""
CACHE_BYTES_CPU = 2 * 2**30


class DecodeState(ABC):
    """A model's cache over a batch of rows. `one_length`: it takes prompts of one length only."""

    one_length = False

    def __init__(self, policy: Policy) -> None:
        self.policy, self.model, self.device = policy, policy.causal, policy.device

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context in which the other methods are called: one autocast around all steps, so that each weight is cast once
        and not for every token."""
        self.policy.set_recomputing(False)
        # not inference mode: what modules make and keep on the way, such as tables of positions, training uses later
        with torch.no_grad(), self.policy.autocast():
            yield

    @abstractmethod
    def prefill(self, prompts: list[list[int]], num_samples: int, max_new_tokens: int) -> Tensor:
        """Runs each prompt once, makes `num_samples` rows of it, and returns next-token logits, (rows, V)."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to each row and returns next-token logits, (rows, V)."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, in this order."""

    def bytes_per_row(self, length: int) -> int:
        """Returns the size of the cache of one row of `length` tokens."""
        constant, each = self.policy.rollout.cache_bytes
        return int(constant + each * length)


def decode(
    policy: Policy,
    state: DecodeState,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    end_ids: list[int],
    seed: int,
    step: int,
    keys: list[int] | None = None,
    poll: Callable[[], None] = lambda: None,
    on_group: Callable[[int, list[Completion]], None] | None = None,
    on_tokens: Callable[[Tensor, int], None] | None = None,
    version: int = 0,
) -> list[list[Completion]]:
    """Returns `num_samples` completions of each prompt (token ids).

    Sample s of the prompt with key k draws from numbers keyed by (seed, step, k, s): it does not depend on the batch.
    Keys default to the prompts' positions. `poll` is called every few tokens and may raise to stop; `on_group(i,
    completions)` is called as soon as all completions of prompt i are done, `on_tokens` with each token of the rows that
    are decoded, (rows,), on the model's device, and with how many of these have not ended before. `version`: of the policy's weights, for the
    completions to carry.
    """
    keys = list(range(len(prompts))) if keys is None else keys
    groups: list[list[Completion]] = [[] for _ in prompts]
    with state.running():
        for members in _chunks(policy, state, [len(prompt) for prompt in prompts], sampling):

            def done(i: int, completions: list[Completion], members: list[int] = members) -> None:
                groups[members[i]] = completions
                if on_group is not None:
                    on_group(members[i], completions)

            chunk = _Chunk(
                [prompts[i] for i in members], [keys[i] for i in members], sampling, end_ids, policy.device, version
            )
            chunk.run(state, seed, step, poll, done, on_tokens)
    return groups


def _chunks(policy: Policy, state: DecodeState, lengths: list[int], sampling: Sampling) -> list[list[int]]:
    """Returns which prompts are decoded together: as many as fit the memory, of similar or, where the state needs it, equal
    lengths: left padding of the prefill is wasted work."""
    row = state.bytes_per_row(max(lengths) + sampling.max_new_tokens)
    rows_at_once = max(_cache_bytes(policy) // max(row, 1), sampling.num_samples)
    per_chunk = max(1, rows_at_once // sampling.num_samples)
    chunks: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = not chunks or len(chunks[-1]) == per_chunk
        if full or (state.one_length and lengths[chunks[-1][-1]] != lengths[i]):
            chunks.append([])
        chunks[-1].append(i)
    return chunks


def _cache_bytes(policy: Policy) -> int:
    if policy.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(policy.device)
        # what the allocator keeps for itself after training is free for the cache
        free += torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        return int(free * 0.5)
    return CACHE_BYTES_CPU


class _Chunk:
    """The rows of some prompts while they are decoded together."""

    def __init__(
        self,
        prompts: list[list[int]],
        keys: list[int],
        sampling: Sampling,
        end_ids: list[int],
        device: torch.device,
        version: int,
    ) -> None:
        self.prompts, self.sampling, self.device, self.version = prompts, sampling, device, version
        samples = sampling.num_samples
        self.num_rows = len(prompts) * samples
        self.keys = [key for key in keys for _ in range(samples)]
        self.samples = list(range(samples)) * len(prompts)
        self.end_ids = torch.tensor(end_ids, device=device)
        self.tokens = torch.zeros(self.num_rows, sampling.max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(self.num_rows, sampling.max_new_tokens, device=device)
        self.lengths = [sampling.max_new_tokens] * self.num_rows
        self.finished = [False] * self.num_rows
        self.open_in_group = [samples] * len(prompts)

    def run(
        self,
        state: DecodeState,
        seed: int,
        step: int,
        poll: Callable[[], None],
        done: Callable[[int, list[Completion]], None],
        on_tokens: Callable[[Tensor, int], None] | None,
    ) -> None:
        sampling = self.sampling
        uniforms = None
        if not sampling.greedy:
            uniforms = keyed_uniforms(seed, step, self.keys, self.samples, sampling.max_new_tokens).to(self.device)
        poll()
        logits = state.prefill(self.prompts, sampling.num_samples, sampling.max_new_tokens)
        rows = torch.arange(self.num_rows, device=self.device)  # original number of each live row
        alive = torch.ones(self.num_rows, dtype=torch.bool, device=self.device)
        num_dead = 0
        for t in range(sampling.max_new_tokens):
            if t % POLL_EVERY == 0:
                poll()
            if uniforms is None:
                tokens, logprobs = argmax(logits, sampling.temperature)
            else:
                tokens, logprobs = sample(
                    logits,
                    uniforms[rows, t],
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                )
            self.tokens[rows, t], self.logprobs[rows, t] = tokens, logprobs
            if on_tokens is not None:
                on_tokens(tokens, len(rows) - num_dead)
            ended = (torch.isin(tokens, self.end_ids) | self._stopped(rows, t)) & alive
            if ended.any():
                self._finish(rows[ended].tolist(), t + 1, done)
                alive &= ~ended
                num_live = int(alive.sum())
                num_dead = len(rows) - num_live
                if num_live == 0:
                    return
                if num_dead >= COMPACT_SHARE * len(rows):
                    keep = _fill_holes(alive, num_live)
                    state.keep(keep)
                    rows, tokens = rows[keep], tokens[keep]
                    alive = torch.ones(num_live, dtype=torch.bool, device=self.device)
                    num_dead = 0
            if t + 1 < sampling.max_new_tokens:
                logits = state.step(tokens)
        self._finish(rows[alive].tolist(), sampling.max_new_tokens, done, finished=False)

    def _stopped(self, rows: Tensor, t: int) -> Tensor:
        """Returns which rows hold a stop text that token `t` completes."""
        stops = self.sampling.stops
        if stops is None or not stops.texts:
            return torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        recent = self.tokens[rows, max(0, t + 1 - stops.window) : t + 1]
        return torch.tensor(stops.reached(recent.tolist()), device=self.device)

    def _finish(
        self, rows: list[int], length: int, done: Callable[[int, list[Completion]], None], finished: bool = True
    ) -> None:
        samples = self.sampling.num_samples
        for row in rows:
            self.lengths[row], self.finished[row] = length, finished
            group = row // samples
            self.open_in_group[group] -= 1
            if self.open_in_group[group] == 0:
                done(group, self._completions(group))

    def _completions(self, group: int) -> list[Completion]:
        samples = self.sampling.num_samples
        span = range(group * samples, (group + 1) * samples)
        tokens, logprobs = self.tokens[span.start : span.stop].tolist(), self.logprobs[span.start : span.stop].tolist()
        return [
            Completion(
                tokens[i][: self.lengths[row]], logprobs[i][: self.lengths[row]], self.finished[row], self.version
            )
            for i, row in enumerate(span)
        ]


def _fill_holes(alive: Tensor, num_live: int) -> Tensor:
    """Returns which rows to keep so that few of them move: live rows of the tail take the places of dead ones."""
    keep = torch.arange(num_live, device=alive.device)
    keep[~alive[:num_live]] = alive[num_live:].nonzero()[:, 0] + num_live
    return keep
