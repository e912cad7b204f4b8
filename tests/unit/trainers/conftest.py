"""A tiny language model over single characters, made once for all trainer tests."""

from __future__ import annotations

from pathlib import Path

import pytest

CHARACTERS = "0123456789=abcĠ"


def write_model(
    folder: Path, *, hidden_size: int = 32, layers: int = 2, seed: int = 0, initializer_range: float = 0.02
) -> str:
    """Writes a randomly initialised Qwen2 model and a tokenizer of single characters; returns the folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    # byte-level, as transformers rebuilds the tokenizer of a Qwen2 model; "Ġ" is its space
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<|endoftext|>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(vocabulary),
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=initializer_range,
                tie_word_embeddings=True,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=None,
            )
        )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("tiny-model"))
