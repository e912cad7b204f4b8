"""Tokens of a real vLLM server have the log-probabilities that transformers gives them, after every update."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process.engine import InProcess
from nemo_rl.rollout.protocol import Completion, Request, Sampling
from nemo_rl.rollout.vllm.engine import VLLMRollouts
from real_vllm.conftest import ENDS, WIDE, Start
from unit.engine.tiny import make_model

UPDATES = 5
REQUESTS = [Request([(7 * key + i) % 97 for i in range(2 + 5 * key)], key) for key in range(6)]


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=97, hidden_size=WIDE, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, initializer_range=0.2,
        eos_token_id=1, bos_token_id=None, pad_token_id=0, router_aux_loss_coef=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MixtralForCausalLM(config).eval()


MODELS = {
    "qwen2, tied": lambda: make_model("qwen2", hidden_size=WIDE),
    "qwen2, untied": lambda: make_model("qwen2", hidden_size=WIDE, tie_word_embeddings=False),
    "llama": lambda: make_model("llama", hidden_size=WIDE),
    "gemma2": lambda: make_model("gemma2", hidden_size=WIDE, head_dim=32),
    "mixtral": mixtral,
    "qwen2 with LoRA": lambda: make_model("qwen2", hidden_size=WIDE),
}


@torch.no_grad()
def plain_distribution(model: Any, request: Request, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of all tokens at each place of the completion: by transformers' own forward, one sequence at a time."""
    logits = model(torch.tensor([request.ids + completion.ids]), use_cache=False).logits[0].float()
    return (logits / temperature).log_softmax(-1)[len(request.ids) - 1 : -1]


def plain_logprobs(model: Any, request: Request, completion: Completion, temperature: float) -> torch.Tensor:
    distribution = plain_distribution(model, request, completion, temperature)
    return distribution.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]


def move(model: Any, seed: int) -> None:
    """As an optimizer step does, only further."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def difference(engine: VLLMRollouts, own: InProcess, policy: Policy, version: int) -> float:
    """How far log-probabilities of the server are from the truth at most, in nats; greedy completions are the same."""
    worst = 0.0
    engine.update(policy, version)
    own.update(policy, version)
    for sampling in (Sampling(3, 24), Sampling(3, 24, temperature=0.7)):
        groups = engine.generate(REQUESTS, sampling, seed=5, step=version)
        for request, group in zip(REQUESTS, groups, strict=True):
            assert len(group) == 3
            for completion in group:
                truth = plain_logprobs(policy.model, request, completion, sampling.temperature)
                worst = max(worst, (torch.tensor(completion.logprobs) - truth).abs().max().item())
                assert completion.version == version
                assert completion.finished == (completion.ids[-1] in ENDS)
                assert not any(token in ENDS for token in completion.ids[:-1])
                assert completion.finished or len(completion.ids) == 24
    greedy = Sampling(1, 24, greedy=True)
    theirs, ours = (e.generate(REQUESTS, greedy, seed=5, step=0) for e in (engine, own))
    assert [c.ids for group in theirs for c in group] == [c.ids for group in ours for c in group]
    return worst


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_greedy_tokens_agree_after_each_update(start: Start, name: str) -> None:
    engine, policy = start(MODELS[name](), lora_rank=8 if "LoRA" in name else None)
    own = InProcess(ENDS)
    worst = 0.0
    for version in range(UPDATES):
        if version:
            move(policy.model, version)
        worst = max(worst, difference(engine, own, policy, version))
    print(f"{name}: at most {worst:.1e} nats a token over {UPDATES} updates")
    assert worst <= 1e-4


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODELS)
def test_with_top_k_or_top_p_they_are_of_the_whole_distribution(start: Start, name: str) -> None:
    """One server serves both: what vLLM restricts it is told with each request."""
    restricted = (Sampling(3, 24, top_k=5), Sampling(3, 24, top_p=0.7))
    engine, policy = start(MODELS[name](), lora_rank=8 if "LoRA" in name else None, probe=restricted[0])
    worst = 0.0
    for version in range(UPDATES):
        if version:
            move(policy.model, version)
        engine.update(policy, version)
        for sampling in restricted:
            groups = engine.generate(REQUESTS, sampling, seed=5, step=version)
            for request, group in zip(REQUESTS, groups, strict=True):
                for completion in group:
                    truth = plain_distribution(policy.model, request, completion)
                    own = truth.gather(-1, torch.tensor(completion.ids)[:, None])
                    worst = max(worst, (torch.tensor(completion.logprobs) - own[:, 0]).abs().max().item())
                    likelier = torch.where(truth > own + 1e-4, truth.exp(), 0.0)  # ties may fall on either side
                    if sampling.top_k is not None:
                        assert (likelier > 0).sum(-1).max().item() < sampling.top_k
                    else:
                        assert likelier.sum(-1).max().item() < sampling.top_p
    print(f"{name}: at most {worst:.1e} nats a token over {UPDATES} updates")
    assert worst <= 1e-4
