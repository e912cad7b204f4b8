"""Checkpoints have the dtype of the model as it was loaded, and a resumed run loses nothing by it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

import nemo_rl
from nemo_rl.run.checkpoint import load_into, read_checkpoint, write_checkpoint
from nemo_rl.run.dtypes import remember_dtypes

ROWS = [{"prompt": f"{i}=", "completion": f"{i % 10}a"} for i in range(10, 26)]


class Stop(nemo_rl.Callback):
    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        if step == 3:
            raise KeyboardInterrupt


def train(model: Any, output: Path, stop: bool = False, **changed: Any) -> Any:
    keywords: dict[str, Any] = dict(algorithm="sft", max_steps=6, max_epochs=9, batch_size=4, learning_rate=1e-3)
    keywords |= dict(save_every=2, backend="local", log_level="warning", output_dir=output) | changed
    try:
        return nemo_rl.train(model, ROWS, callbacks=[Stop()] if stop else None, **keywords)
    except KeyboardInterrupt:
        return None


def in_dtype(folder: str, dtype: torch.dtype, target: Path) -> str:
    """A copy of the model whose files and configuration have this dtype."""
    from transformers import AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder).to(dtype).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    assert json.loads((target / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    return str(target)


@pytest.fixture(scope="module")
def bf16_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return in_dtype(tiny_model, torch.bfloat16, tmp_path_factory.mktemp("bf16") / "model")


def in_memory(result: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in result.trainer.model.named_parameters()}


def assert_files_are(path: str | Path, dtype: torch.dtype) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert {p.dtype for p in loaded.parameters()} == {loaded.dtype} == {loaded.config.dtype} == {dtype}
    assert {t.dtype for t in load_file(Path(path) / "model.safetensors").values()} == {dtype}


@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 4}])
def test_a_bf16_model_stays_one_and_its_run_goes_on_bit_by_bit(bf16_model: str, tmp_path: Path, adapters: dict) -> None:
    unbroken = train(bf16_model, tmp_path / "unbroken", **adapters)
    assert_files_are(unbroken.checkpoint_path, torch.bfloat16)
    weights = in_memory(unbroken)
    trained = {name: w for name, w in weights.items() if not adapters or ".lora_" in name}
    assert any((w != w.bfloat16().float()).any() for w in trained.values()), "training has more than bf16 holds"

    assert train(bf16_model, tmp_path / "run", stop=True, **adapters) is None
    resumed = train(bf16_model, tmp_path / "run", **adapters)
    assert resumed.total_steps == 6
    after = in_memory(resumed)
    assert weights.keys() == after.keys()
    assert [name for name in weights if not torch.equal(weights[name], after[name])] == []
    left, right = (Path(r.checkpoint_path) / "model.safetensors" for r in (unbroken, resumed))
    assert left.read_bytes() == right.read_bytes()


def test_files_hold_what_training_ended_with_rounded_once(bf16_model: str, tmp_path: Path) -> None:
    result = train(bf16_model, tmp_path / "run")
    loaded = dict(AutoModelForCausalLM.from_pretrained(result.checkpoint_path).named_parameters())
    for name, weight in in_memory(result).items():
        assert torch.equal(loaded[name], weight.bfloat16()), name


def test_merged_adapters_are_merged_before_they_are_rounded(bf16_model: str, tmp_path: Path) -> None:
    result = train(bf16_model, tmp_path / "run", lora_rank=4, learning_rate=1e-2)
    merged = result.trainer.model.merge_and_unload()
    loaded = dict(AutoModelForCausalLM.from_pretrained(result.checkpoint_path).named_parameters())
    moved = 0
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(loaded[name], weight.bfloat16(), rtol=2**-7, atol=1e-6)
        moved += int((loaded[name] != AutoModelForCausalLM.from_pretrained(bf16_model).get_parameter(name)).any())
    assert moved > 4
    adapter = load_file(Path(result.checkpoint_path) / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32}


def test_weights_take_half_the_disk(tiny_model: str, bf16_model: str, tmp_path: Path) -> None:
    sizes = []
    for name, model in (("wide", tiny_model), ("narrow", bf16_model)):
        path = Path(train(model, tmp_path / name, max_steps=1).checkpoint_path)
        sizes.append(sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values()))
    assert sizes[1] == sizes[0] / 2
    assert_files_are(tmp_path / "wide" / "checkpoints" / "latest", torch.float32)


def test_fp32_on_request_and_back(bf16_model: str, tmp_path: Path) -> None:
    unbroken = train(bf16_model, tmp_path / "unbroken")
    train(bf16_model, tmp_path / "run", stop=True, checkpoint_dtype="fp32")
    assert_files_are(tmp_path / "run" / "checkpoints" / "latest", torch.float32)
    resumed = train(bf16_model, tmp_path / "run")
    assert resumed.output_dir == tmp_path / "run"
    assert_files_are(resumed.checkpoint_path, torch.bfloat16)
    before, after = in_memory(unbroken), in_memory(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_live_model_keeps_its_dtype_over_several_runs(bf16_model: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    live = AutoModelForCausalLM.from_pretrained(bf16_model)
    tokenizer = AutoTokenizer.from_pretrained(bf16_model)
    for name in ("first", "second"):
        result = train(live, tmp_path / name, tokenizer=tokenizer, max_steps=2)
        assert_files_are(result.checkpoint_path, torch.bfloat16)
    wide = train(live.half(), tmp_path / "third", tokenizer=tokenizer, max_steps=2)
    assert_files_are(wide.checkpoint_path, torch.float16)


def test_weights_that_transformers_keeps_in_fp32_stay_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = dict(vocab_size=32, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2)
    size |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, n_routed_experts=4, num_experts_per_tok=2)
    config = Glm4MoeConfig(**size, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1)
    Glm4MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")

    from nemo_rl.job.spec import TrainingSpec
    from nemo_rl.model.load import load_model

    model = load_model(str(tmp_path / "base"), TrainingSpec(), torch.device("cpu"))
    bias = next(b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    bias += torch.linspace(0, 1e-3, 4)  # more than bf16 holds
    optimizer = torch.optim.AdamW(model.parameters())
    path = write_checkpoint(tmp_path / "c", 1, model=model, tokenizer=None, optimizer=optimizer, state={})
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert plain.dtype == torch.bfloat16
    expected, found = model.state_dict(), plain.state_dict()
    kept = [name for name in found if name.endswith("e_score_correction_bias")]
    assert kept
    for name in found:
        wanted = expected[name] if name in kept else expected[name].bfloat16()
        assert torch.equal(found[name], wanted), name
    other = load_model(str(tmp_path / "base"), TrainingSpec(), torch.device("cpu"))
    load_into(read_checkpoint(path), other, torch.optim.AdamW(other.parameters()))
    assert all(torch.equal(expected[name], tensor) for name, tensor in other.state_dict().items())


def test_weights_that_float16_cannot_hold_are_saved_whole_and_said(tiny_model: str, tmp_path: Path, caplog) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).half()
    remember_dtypes(model, fp32=False)
    model.float()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 70000.0
    with caplog.at_level(logging.WARNING):
        path = write_checkpoint(tmp_path / "c", 1, model=model, tokenizer=None, state={})
    assert_files_are(path, torch.float32)
    assert "up_proj.weight has grown to 7e+04, more than float16 can hold" in caplog.text
