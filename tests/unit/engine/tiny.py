"""Tiny models made from their configurations, and plain, slow ways to what the engine computes fast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 97
END = 1

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": END,
    "initializer_range": 0.2,
}


def config_of(family: str, **changes: object) -> object:
    """Returns a small configuration of a model family."""
    import transformers as t

    def small(kind: Any, **own: object) -> Any:
        return kind(**{**_SMALL, **own, **changes})

    if family == "qwen2":
        return small(t.Qwen2Config, tie_word_embeddings=True)
    if family == "qwen3":
        return small(t.Qwen3Config, head_dim=16, tie_word_embeddings=True)
    if family == "llama":
        return small(t.LlamaConfig, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    if family == "llama3_rope":
        rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        return small(t.LlamaConfig, rope_parameters=rope, tie_word_embeddings=False)
    if family == "yarn_rope":
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
        return small(t.LlamaConfig, rope_parameters=rope, tie_word_embeddings=False)
    if family == "dynamic_rope":
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
        return small(t.LlamaConfig, max_position_embeddings=16, rope_parameters=rope)
    if family == "mistral":
        return small(t.MistralConfig, sliding_window=None, head_dim=8)
    if family == "mistral_window":
        return small(t.MistralConfig, sliding_window=5, head_dim=8)
    if family == "gemma2":
        return small(t.Gemma2Config, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, final_logit_softcapping=4.0)
    if family == "granite":
        return small(t.GraniteConfig, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.7)
    if family == "cohere":
        return small(t.CohereConfig, logit_scale=0.25)
    if family == "phi":  # its output layer has a bias
        return small(t.PhiConfig)
    if family == "gpt2":
        ids = {"bos_token_id": None, "eos_token_id": END}
        return t.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, **ids
        )
    raise AssertionError(family)


FAMILIES = (
    *("qwen2", "llama", "llama3_rope", "yarn_rope", "qwen3", "mistral"),
    *("gpt2", "gemma2", "mistral_window", "granite", "cohere", "phi", "dynamic_rope"),
)


def make_model(family: str, seed: int = 0, **changes: object) -> nn.Module:
    """Returns a model in float32 without dropout, with random weights everywhere: biases that are all zero, or norms
    that are all one, would hide an operation that was forgotten."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def neighbour_of(family: str) -> nn.Module:
    """Returns a model whose log-probabilities differ a little from those of `make_model(family)`, as after some training."""
    model = make_model(family)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def random_ids(length: int, seed: int) -> list[int]:
    """Returns tokens without the end token and the padding token."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()


def plain_logprobs(model: nn.Module, ids: list[int], temperature: float = 1.0) -> Tensor:
    """Returns the log-probability of each token but the first, (len(ids) - 1,), by one unpadded pass of transformers."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def gradient(model: nn.Module) -> Tensor:
    """Returns all gradients of the trainable parameters in one flat tensor, and clears them."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    flat = torch.cat([g.flatten() for g in found]).clone()
    model.zero_grad(set_to_none=True)
    return flat


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns |found - expected| / |expected|, of vectors by their norms."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Makes sums run in one fixed order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
