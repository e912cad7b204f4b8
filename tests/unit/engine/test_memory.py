"""A training pass over a vocabulary of 151,936 must not hold tokens x vocabulary numbers, as torch's allocator counts them.

The size of the process would say the same less surely: the system maps and reclaims pages of libraries as it likes.
"""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from nemo_rl.model.packing import TokenSequence, pack
from nemo_rl.model.policy import Policy

VOCABULARY = 151_936
LOGIT_BYTES = 4 * VOCABULARY
"""What one token costs where its logits are held once."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=8,
        tie_word_embeddings=True,
    )
    return Policy(AutoModelForCausalLM.from_config(config), "fp32")


def peak_bytes(policy: Policy, path: str, tokens: int) -> int:
    """The most that was allocated at once, forward and backward, beyond what was there before."""
    policy.path = path
    policy.model.zero_grad(set_to_none=True)
    batch = pack([TokenSequence(list(range(1, 34)), 1) for _ in range(tokens // 32)])
    gc.collect()  # what other tests left behind and is freed meanwhile would count as less
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        policy.logprobs(batch).sum().backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def bytes_per_token(policy: Policy, path: str, few: int = 640, many: int = 1280) -> float:
    """The growth of the peak with each token more, in as many passes: each pass has a gradient of the weights of its own."""
    return (peak_bytes(policy, path, many) - peak_bytes(policy, path, few)) / (many - few)


@pytest.mark.parametrize("path", ["packed", "hidden"])
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(path: str, policy: Policy) -> None:
    assert bytes_per_token(policy, path) < LOGIT_BYTES / 50


@pytest.mark.parametrize("path", ["packed", "hidden"])
def test_passes_of_sequences_of_several_lengths_add_few_gradients_of_the_output_layer(
    path: str, policy: Policy
) -> None:
    weights = VOCABULARY * 8 * 4
    assert peak_bytes(policy, path, 640) - peak_bytes(policy, path, 64) < 3 * weights


def test_the_measurement_sees_logits_where_they_are_made(policy: Policy) -> None:
    assert bytes_per_token(policy, "logits", 32, 96) > LOGIT_BYTES * 0.9
    assert peak_bytes(policy, "packed", 64) > VOCABULARY * 8 * 4, "the gradient of the embedding"
