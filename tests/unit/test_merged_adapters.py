"""A checkpoint of a run with adapters is the adapted model, whatever the adapters are on, and brings the adapters back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from architectures.tiny_models import make_model
from nemo_rl.job.spec import TrainingSpec
from nemo_rl.model.activations import LiveBytes
from nemo_rl.model.adapters import add_adapters
from nemo_rl.model.load import prepare_model
from nemo_rl.run import checkpoint_tensors
from nemo_rl.run.checkpoint import load_into, read_checkpoint, write_checkpoint


def adapted(kind: str, targets: list[str] | None, seed: int = 4) -> Any:
    training = TrainingSpec(lora_rank=2, lora_target_modules=targets)
    model = prepare_model(make_model(kind), training, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits


CASES = [
    ("qwen2", None),
    ("qwen2", ["embed_tokens", "q_proj"]),  # tied to the output layer, which stays as it was
    ("qwen2", ["lm_head"]),
    ("gpt2", ["wte", "c_attn"]),
    ("mixtral", None),
    ("qwen3_moe", None),
    ("deepseek_v3", None),
    ("gpt_oss", None),
    ("mamba", None),  # reads the weight of a layer without calling it
    ("llama4_text", None),  # its routers are derived from linear layers
    ("falcon", None),  # so are its projections, which are linear all the same
]


@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_the_merged_checkpoint_is_the_adapted_model(tmp_path: Path, kind: str, targets: list[str] | None):
    model = adapted(kind, targets)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = write_checkpoint(tmp_path / "c", 1, model=model, tokenizer=None, state={})
    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert (logits(again) - logits(model)).abs().max() <= 1e-4
    with model.disable_adapter():
        assert (logits(again) - logits(model)).abs().max() > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    other = adapted(kind, targets, seed=8)
    load_into(read_checkpoint(path), other)
    assert torch.equal(logits(other), logits(model))


def test_of_the_merged_model_one_file_and_one_block_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_tensors, "FILE_BYTES", 2**15)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = add_adapters(AutoModelForCausalLM.from_config(config), TrainingSpec(lora_rank=2))
    with LiveBytes(list(model.state_dict(keep_vars=True).values())) as live:
        write_checkpoint(tmp_path / "c", 1, model=model, tokenizer=None, state={})
    base = model.get_base_model()
    block, size = (4 * sum(p.numel() for p in part.parameters()) for part in (base.model.layers[0], base))
    assert live.peak < 2**15 + 3 * block < size / 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    assert (logits(again) - logits(model)).abs().max() <= 1e-5
