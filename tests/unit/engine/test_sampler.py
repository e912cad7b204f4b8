"""Keyed uniform numbers and the drawing of tokens with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.rollout.in_process.sampler import argmax, filter_logits, keyed_uniforms, sample

exact = settings(deadline=None, derandomize=True, max_examples=60)

number = st.integers(0, 2**32 - 1)


# ------------------------------------------------------------------ keyed uniforms


@exact
@given(number, number, st.lists(st.tuples(number, number), min_size=1, max_size=6), st.integers(1, 20))
def test_a_number_depends_on_its_own_key_alone(seed, step, keys, length):
    prompts, samples = [k[0] for k in keys], [k[1] for k in keys]
    together = keyed_uniforms(seed, step, prompts, samples, length)
    for row in range(len(keys)):
        alone = keyed_uniforms(seed, step, prompts[row : row + 1], samples[row : row + 1], length + 5)
        assert torch.equal(alone[0, :length], together[row])


def test_numbers_are_the_same_in_every_version_and_process():
    """Runs are resumed by other processes: these are part of what a checkpoint means."""
    found = keyed_uniforms(42, 7, [0, 3], [1, 2], 3)
    assert found.dtype == torch.float32
    assert found.tolist() == slow_uniforms(42, 7, [(0, 1), (3, 2)], 3)


def slow_uniforms(seed: int, step: int, keys: list[tuple[int, int]], length: int) -> list[list[float]]:
    """The same by Python's integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x &= mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    run = mix(mix(seed + golden) + step * golden + 1)
    found = []
    for prompt, draw in keys:
        row = mix(mix(run + prompt * golden + 2) + draw * golden + 3)
        found.append([(mix(row + (t + 1) * golden) >> 40) / 2**24 for t in range(length)])
    return found


def kolmogorov_smirnov(values: np.ndarray) -> float:
    """Returns the distance of the empirical distribution from the uniform one, times sqrt(n): beyond 1.95 has p < 1e-3."""
    ordered = np.sort(values)
    n = len(ordered)
    grid = np.arange(1, n + 1) / n
    return float(np.maximum(grid - ordered, ordered - (grid - 1 / n)).max() * math.sqrt(n))


@pytest.mark.parametrize("varied", ["seed", "step", "prompt", "sample", "position"])
def test_numbers_are_uniform_along_each_part_of_the_key(varied: str):
    n = 20_000
    if varied == "seed":
        values = [keyed_uniforms(i, 1, [0], [0], 1).item() for i in range(n // 10)]
    elif varied == "step":
        values = [keyed_uniforms(0, i, [0], [0], 1).item() for i in range(n // 10)]
    elif varied == "prompt":
        values = keyed_uniforms(0, 1, list(range(n)), [0] * n, 1)[:, 0].tolist()
    elif varied == "sample":
        values = keyed_uniforms(0, 1, [0] * n, list(range(n)), 1)[:, 0].tolist()
    else:
        values = keyed_uniforms(0, 1, [0], [0], n)[0].tolist()
    assert min(values) >= 0
    assert max(values) < 1
    assert kolmogorov_smirnov(np.array(values, dtype=np.float64)) < 1.95
    # neighbours are uncorrelated: the standard deviation of r is 1 / sqrt(n)
    first, second = np.array(values[:-1]), np.array(values[1:])
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(first))


def test_neighbouring_keys_never_share_a_run_of_numbers():
    """Also not shifted by some positions, which adding up the parts of a key would cause."""
    length = 48
    rows: list[np.ndarray] = []
    for seed in range(3):
        for step in range(3):
            grid = [(p, s) for p in range(12) for s in range(12)]
            found = keyed_uniforms(seed, step, [p for p, _ in grid], [s for _, s in grid], length)
            rows += list(found.numpy())
    windows = {row[t : t + 3].tobytes() for row in rows for t in range(length - 2)}
    assert len(windows) == len(rows) * (length - 2)


def test_swapping_two_parts_of_a_key_gives_other_numbers():
    found = {
        keyed_uniforms(a, b, [c], [d], 4).numpy().tobytes()
        for a, b, c, d in {(1, 2, 3, 4), (2, 1, 3, 4), (1, 2, 4, 3), (3, 2, 1, 4)}
    }
    assert len(found) == 4


# ------------------------------------------------------------------ draws


def chi_square_bound(freedom: int) -> float:
    """Returns the value that chi-square exceeds with probability 1e-4 (Wilson and Hilferty, 1931)."""
    z = 3.719
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 12, "top_p": 0.7}]
)
def test_tokens_are_drawn_with_their_probabilities(options: dict[str, float]):
    n, vocabulary = 60_000, 50
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(5))
    uniforms = keyed_uniforms(1, 1, list(range(n)), [0] * n, 1)[:, 0]
    tokens, _ = sample(logits.expand(n, -1), uniforms, **options)
    expected = slow_distribution(logits.tolist(), **options)
    counts = torch.bincount(tokens, minlength=vocabulary).tolist()
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    cells = [(count, n * p) for count, p in zip(counts, expected, strict=True) if n * p >= 5]
    rest = n - sum(count for count, _ in cells), n - sum(mean for _, mean in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    assert statistic < chi_square_bound(len(cells) - 1)


def slow_distribution(
    logits: list[float], temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> list[float]:
    """Temperature, then the k likeliest, then the smallest set of likeliest of them that reaches top_p (arXiv 1904.09751)."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: top_k or None]
    total, kept, reached = sum(weights[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if reached >= top_p:
            break
    share = sum(weights[i] for i in kept)
    return [weights[i] / share if i in kept else 0.0 for i in range(len(logits))]


@exact
@given(
    st.lists(st.floats(-8, 8), min_size=2, max_size=12, unique_by=lambda x: round(x, 2)),
    st.floats(0.3, 2.0),
    st.one_of(st.none(), st.integers(1, 14)),
    st.floats(0.05, 1.0),
)
def test_only_allowed_tokens_are_drawn_at_any_uniform(logits, temperature, top_k, top_p):
    logits = [round(x, 2) for x in logits]
    uniforms = torch.tensor([0.0, 2.0**-24, 0.1, 0.5, 0.9, 1 - 2.0**-10, 1 - 2.0**-24])
    tokens, _ = sample(
        torch.tensor(logits).expand(len(uniforms), -1), uniforms, temperature=temperature, top_k=top_k, top_p=top_p
    )
    # at the very edge of the nucleus rounding may decide either way
    allowed = slow_distribution(logits, temperature, top_k, min(top_p + 1e-5, 1.0))
    assert all(allowed[i] > 0 for i in tokens.tolist())
    assert tokens[0].item() == next(
        i for i, p in enumerate(slow_distribution(logits, temperature, top_k, top_p)) if p
    ) or (slow_distribution(logits, temperature, top_k, top_p) != allowed)


@exact
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=9), st.floats(0, 1, exclude_max=True, width=32))
def test_the_drawn_token_is_where_the_cumulative_distribution_passes_the_uniform(logits, uniform):
    uniform = min(uniform, 1 - 2.0**-24)
    tokens, _ = sample(torch.tensor([logits]), torch.tensor([uniform]))
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    below = sum(weights[: tokens.item()]) / sum(weights)
    upto = sum(weights[: tokens.item() + 1]) / sum(weights)
    assert below <= uniform + 1e-6
    assert upto >= uniform - 1e-6


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((4, 6), float("-inf"))
    logits[:, 2], logits[:, 3] = 0.0, 0.0
    tokens, logprobs = sample(logits, torch.tensor([0.0, 0.49, 0.51, 1 - 2.0**-24]))
    assert tokens.tolist() == [2, 2, 3, 3]
    assert logprobs.tolist() == pytest.approx([-math.log(2)] * 4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 3}, {"temperature": 1.3, "top_p": 0.5}])
def test_log_probabilities_are_those_of_the_whole_distribution_at_this_temperature(options: dict[str, float]):
    """As the trainer computes them, whatever the filters leave to draw from."""
    generator = torch.Generator().manual_seed(6)
    logits = 5 * torch.randn(40, 30, generator=generator)
    tokens, logprobs = sample(logits, torch.rand(40, generator=generator), **options)
    whole = (logits.double() / options.get("temperature", 1.0)).log_softmax(-1)
    assert torch.allclose(logprobs.double(), whole.gather(-1, tokens[:, None])[:, 0], atol=2e-6)


def test_sampling_leaves_the_logits_as_they_are():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    for options in ({}, {"temperature": 0.5}, {"top_k": 2, "top_p": 0.5}):
        before = logits.clone()
        sample(logits, torch.tensor([0.1, 0.5, 0.9]), **options)
        argmax(logits, 0.5)
        assert torch.equal(logits, before)


def test_greedy_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    tokens, logprobs = argmax(logits, temperature=0.5)
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logprobs, (logits / 0.5).log_softmax(-1)[[0, 1], [1, 0]])


def test_filters_keep_the_likeliest_token_however_small_the_nucleus():
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    kept = filter_logits(logits, None, 1e-6)
    assert torch.isfinite(kept)[0].tolist() == [False, True, False]
    assert torch.equal(filter_logits(logits, 99, 1.0), logits)
