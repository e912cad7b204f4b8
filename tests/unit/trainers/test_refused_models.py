"""Models that cannot be trained right are refused by `train()` before the first step, in a sentence with the cure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

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


def test_a_live_model_from_nowhere_without_a_tokenizer(tiny_model: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"in memory .* and no tokenizer.*give tokenizer=") as caught:
        sft(model, tmp_path)
    assert "python://" not in str(caught.value)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n".encode()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", POINTER, r"model\.safetensors is a pointer of Git LFS.*git lfs pull"),
        ("tokenizer.json", POINTER, r"tokenizer\.json is a pointer of Git LFS.*git lfs pull"),
        ("config.json", b"<!DOCTYPE html><html></html>", r"config\.json is a web page.*download its folder again"),
        ("model.safetensors", b"", r"model\.safetensors is empty.*copy or download"),
        ("model.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "damaged or cut off.*copy or download"),
        ("config.json", {"intermediate_size": 112}, "other shapes than its config.json says.*copy or download"),
        ("config.json", {"model_type": "qwen99"}, "does not recognize this architecture.*upgrade transformers"),
        ("pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'true'\ntR.", "pickles.*would run their code.*safetensors"),
        ("model.gguf", b"GGUF\x03", "GGUF.*take the model that it was made from"),
    ],
)
def test_files_of_a_model_that_are_not_what_they_should_be(
    tiny_model: str, tmp_path: Path, file: str, content: Any, words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    if file in ("pytorch_model.bin", "model.gguf"):
        (folder / "model.safetensors").unlink()
    if file == "model.gguf":
        (folder / "config.json").unlink()
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / file).read_text()) | content).encode()
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        sft(str(folder), tmp_path)


@pytest.mark.parametrize("name", ["https://huggingface.co/Qwen/Qwen3-0.6B", "huggingface.co/Qwen/Qwen3-0.6B/tree/main"])
def test_the_page_of_a_model_leads_to_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"write the name alone: Qwen/Qwen3-0\.6B"):
        sft(name, tmp_path)


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
