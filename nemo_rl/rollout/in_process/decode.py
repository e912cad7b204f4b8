"""The decode loop: rows of a model's cache grow by a token at a time until each has ended, and prompts that wait take their place."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process.sampler import argmax, keyed_uniforms, sample
from nemo_rl.rollout.protocol import Completion, Sampling

COMPACT_SHARE = 0.06
"""Finished rows are dropped, or filled with prompts that wait, once they are this share of the batch: moving the cache, or a
forward pass for one prompt, costs more than a few idle rows."""
POLL_EVERY = 16
"""Tokens between two looks at the stop flag."""
CACHE_BYTES_CPU = 2 * 2**30


class DecodeState(ABC):
    """A model's cache over a batch of rows. `one_length`: it takes prompts of one length only. `refills`: rows that have ended
    can be filled anew while the others go on."""

    one_length = False
    refills = False

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
    def prefill(self, prompts: list[list[int]], num_samples: int, length: int) -> Tensor:
        """Runs each prompt once, makes `num_samples` rows of it, and returns next-token logits, (rows, V). No row, also none
        that is filled later, gets more than `length` tokens."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to each row and returns next-token logits, (rows, V)."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, in this order."""

    def release(self, rows: list[int]) -> None:
        """Takes note that nothing of these rows is needed any more; they stay in the batch."""

    def refill(self, prompts: list[list[int]], rows: Tensor) -> Tensor:
        """Runs prompts into the rows of each, (prompts, samples), in place of what was there; returns their next-token logits,
        (prompts, V)."""
        raise NotImplementedError

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
        for members, at_once in _chunks(policy, state, [len(prompt) for prompt in prompts], sampling):

            def done(i: int, completions: list[Completion], members: list[int] = members) -> None:
                groups[members[i]] = completions
                if on_group is not None:
                    on_group(members[i], completions)

            chunk = _Chunk(
                [prompts[i] for i in members], [keys[i] for i in members], sampling, end_ids, policy.device, version
            )
            chunk.run(state, at_once, (seed, step), poll, done, on_tokens)
    return groups


def _chunks(policy: Policy, state: DecodeState, lengths: list[int], sampling: Sampling) -> list[tuple[list[int], int]]:
    """Returns which prompts are decoded one after the other in the same rows, and how many of them at once: as many as fit the
    memory. Where rows cannot be filled again, these are all of a chunk, of similar or, where the state needs it, equal
    lengths: left padding of the prefill is wasted work."""
    row = state.bytes_per_row(max(lengths) + sampling.max_new_tokens)
    rows_at_once = max(_cache_bytes(policy) // max(row, 1), sampling.num_samples)
    at_once = max(1, rows_at_once // sampling.num_samples)
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    if state.refills:
        return [(by_length, at_once)]
    chunks: list[list[int]] = []
    for i in by_length:
        full = not chunks or len(chunks[-1]) == at_once
        if full or (state.one_length and lengths[chunks[-1][-1]] != lengths[i]):
            chunks.append([])
        chunks[-1].append(i)
    return [(chunk, at_once) for chunk in chunks]


def _cache_bytes(policy: Policy) -> int:
    if policy.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(policy.device)
        # what the allocator keeps for itself after training is free for the cache
        free += torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        return int(free * 0.5)
    return CACHE_BYTES_CPU


class _Chunk:
    """Prompts that are decoded in the same rows: some at once, and others in the rows of those that have ended."""

    def __init__(
        self,
        prompts: list[list[int]],
        keys: list[int],
        sampling: Sampling,
        end_ids: list[int],
        device: torch.device,
        version: int,
    ) -> None:
        self.prompts, self.keys, self.sampling, self.device, self.version = prompts, keys, sampling, device, version
        self.end_ids = torch.tensor(end_ids, device=device)
        self.started = 0
        """Prompts that have rows, or had them."""
        self.groups: list[dict[int, Completion]] = [{} for _ in prompts]

    def run(
        self,
        state: DecodeState,
        at_once: int,
        seeds: tuple[int, int],
        poll: Callable[[], None],
        done: Callable[[int, list[Completion]], None],
        on_tokens: Callable[[Tensor, int], None] | None,
    ) -> None:
        sampling, samples, most = self.sampling, self.sampling.num_samples, self.sampling.max_new_tokens
        poll()
        first = self.prompts[:at_once]
        logits = state.prefill(first, samples, max(map(len, self.prompts)) + most)
        places = torch.arange(len(first) * samples, device=self.device)  # of each row of the state in what follows
        self.tokens = torch.zeros(len(places), most, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(len(places), most, device=self.device)
        self.uniforms = None if sampling.greedy else torch.zeros(len(places), most, device=self.device)
        self.rows = [(0, 0)] * len(places)  # prompt and sample
        self._start(len(first), places, seeds)
        count = torch.zeros_like(places)  # tokens that each row has
        alive = torch.ones_like(places, dtype=torch.bool)
        num_live = len(places)
        for number in itertools.count():
            if number % POLL_EVERY == 0:
                poll()
            tokens, logprobs = self._draw(logits, places, count)
            self.tokens[places, count], self.logprobs[places, count] = tokens, logprobs
            if on_tokens is not None:
                on_tokens(tokens, num_live)
            count = count + 1
            ended = torch.isin(tokens, self.end_ids) | self._stopped(places, count)
            over = (ended | (count == most)) & alive
            if over.any():
                self._finish(places[over], count[over].tolist(), ended[over].tolist(), done)
                state.release(over.nonzero()[:, 0].tolist())
                alive &= ~over
                num_live = int(alive.sum())
            waiting, num_dead = len(self.prompts) - self.started, len(places) - num_live
            if num_live == 0 and waiting == 0:
                return
            if num_dead >= max(1, COMPACT_SHARE * len(places)) and waiting == 0:
                keep = _fill_holes(alive, num_live)
                state.keep(keep)
                places, tokens, count = places[keep], tokens[keep], count[keep]
                alive = torch.ones(num_live, dtype=torch.bool, device=self.device)
            count.clamp_(max=most - 1)  # of rows that have ended
            if num_live > 0:
                logits = state.step(tokens)
            if waiting and (num_live == 0 or num_dead >= max(samples, COMPACT_SHARE * len(places))):
                new = min(waiting, num_dead // samples)
                rows = (~alive).nonzero()[: new * samples, 0]
                prompts = self.prompts[self.started : self.started + new]
                logits[rows] = state.refill(prompts, rows.view(new, samples)).repeat_interleave(samples, 0)
                self._start(new, places[rows], seeds)
                alive[rows], count[rows] = True, 0
                num_live += len(rows)

    def _start(self, new: int, places: Tensor, seeds: tuple[int, int]) -> None:
        """Gives the next prompts these places, one for each sample."""
        samples = range(self.sampling.num_samples)
        rows = [(prompt, sample) for prompt in range(self.started, self.started + new) for sample in samples]
        self.started += new
        for place, row in zip(places.tolist(), rows, strict=True):
            self.rows[place] = row
        if self.uniforms is not None:
            keys, numbers = [self.keys[prompt] for prompt, _ in rows], [sample for _, sample in rows]
            drawn = keyed_uniforms(*seeds, keys, numbers, self.sampling.max_new_tokens)
            self.uniforms[places] = drawn.to(self.device)

    def _draw(self, logits: Tensor, places: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next token of each row and its log-probability."""
        sampling = self.sampling
        if self.uniforms is None:
            return argmax(logits, sampling.temperature)
        uniforms, options = self.uniforms[places, count], {"top_k": sampling.top_k, "top_p": sampling.top_p}
        return sample(logits, uniforms, temperature=sampling.temperature, **options)

    def _stopped(self, places: Tensor, count: Tensor) -> Tensor:
        """Returns which rows hold a stop text that their last token completes."""
        stops = self.sampling.stops
        if stops is None or not stops.texts:
            return torch.zeros(len(places), dtype=torch.bool, device=self.device)
        columns = count[:, None] - torch.arange(stops.window, 0, -1, device=self.device)
        recent = self.tokens[places[:, None], columns.clamp(min=0)].tolist()
        written = [row[-min(n, stops.window) :] for row, n in zip(recent, count.tolist(), strict=True)]
        return torch.tensor(stops.reached(written), device=self.device)

    def _finish(
        self, places: Tensor, lengths: list[int], ended: list[bool], done: Callable[[int, list[Completion]], None]
    ) -> None:
        tokens, logprobs = (kept[places, : max(lengths)].tolist() for kept in (self.tokens, self.logprobs))
        for i, place in enumerate(places.tolist()):
            prompt, sample = self.rows[place]
            ids, drawn = tokens[i][: lengths[i]], logprobs[i][: lengths[i]]
            group = self.groups[prompt]
            group[sample] = Completion(ids, drawn, ended[i], self.version)
            if len(group) == self.sampling.num_samples:
                done(prompt, [group[number] for number in range(len(group))])


def _fill_holes(alive: Tensor, num_live: int) -> Tensor:
    """Returns which rows to keep so that few of them move: live rows of the tail take the places of dead ones."""
    keep = torch.arange(num_live, device=alive.device)
    keep[~alive[:num_live]] = alive[num_live:].nonzero()[:, 0] + num_live
    return keep
