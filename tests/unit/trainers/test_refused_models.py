"""Models that cannot be trained right are refused by `train()` before the first step, in a sentence with the cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

import nemo_rl

PAIRS = [{"prompt": f"{i}=", "completion": "a"} for i in range(8)]


def sft(model: Any, folder: Path, rows: list[dict[str, Any]] = PAIRS, **more: Any) -> nemo_rl.TrainResult:
    quick = {"algorithm": "sft", "max_steps": 1, "batch_size": 4, "backend": "local", "log_level": "error"}
    return nemo_rl.train(model, rows, output_dir=folder / "out", **{**quick, **more})


def test_an_encoder(tiny_model: str, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "bert")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=17, **small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"BertLMHeadModel \(bert\) is an encoder.*not a causal"):
        sft(str(tmp_path / "bert"), tmp_path)


def test_a_live_model_without_output_layer(tiny_model: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
        sft(AutoModel.from_pretrained(tiny_model), tmp_path, tokenizer=tokenizer)


def test_tokens_that_were_added_without_rows_of_the_embedding(tiny_model: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<zzz>"])
    with pytest.raises(ValueError, match=r"token 17 \('<zzz>'\).*has 17 rows.*resize_token_embeddings"):
        sft(tiny_model, tmp_path, [{"prompt": "<zzz>", "completion": "a"}] * 4, tokenizer=tokenizer)


def test_such_tokens_do_no_harm_where_no_row_has_them(tiny_model: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<zzz>"])
    assert sft(tiny_model, tmp_path, tokenizer=tokenizer).total_steps == 1


def test_modules_of_adapters_that_are_not_there(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_target_modules 'qproj'.*did you mean"):
        sft(tiny_model, tmp_path, lora_rank=2, lora_target_modules=["qproj"])


def test_adapters_of_embeddings_are_saved(tiny_model: str, tmp_path: Path) -> None:
    result = sft(tiny_model, tmp_path, lora_rank=2, lora_target_modules=["q_proj", "embed_tokens"])
    assert AutoModel.from_pretrained(result.checkpoint_path) is not None
