"""A language model gets better by reinforcement learning, on this machine, in about two minutes.

    python examples/demo.py [--seed 0] [--output outputs/demo]

Nothing is downloaded: a tiny Qwen2 model and its tokenizer are made from scratch. The task is to sort digits
("52913=" -> "12359"). A little supervised fine-tuning teaches the format; GRPO then improves the answers from their
reward alone. Accuracy is measured on held-out prompts that neither ever trained on, with the saved checkpoints loaded
by transformers.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import nemo_rl

DIGITS = "0123456789"


def make_model(folder: Path, seed: int) -> str:
    """Writes a randomly initialised Qwen2 model (0.8 M parameters) and a tokenizer of single characters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<|endoftext|>", *DIGITS, "="])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_rows(count: int, seed: int, without: set[str]) -> list[dict[str, str]]:
    """Returns rows {prompt, answer} of different digits to sort, none of them in `without`."""
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        digits = "".join(draw.choices(DIGITS, k=draw.randint(3, 6)))
        if digits + "=" not in without:
            rows[digits + "="] = "".join(sorted(digits))
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()]


def accuracy(checkpoint: str, rows: list[dict[str, str]]) -> float:
    """Returns the share of rows that the saved model answers exactly, sampling each twice at temperature 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(0)
    inputs = tokenizer(
        [row["prompt"] for row in rows] * 2, return_tensors="pt", padding=True, return_token_type_ids=False
    )
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=10)
    answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer == row["answer"] for answer, row in zip(answers, rows * 2, strict=True)) / len(answers)


def sorted_exactly(prompt: str, response: str, answer: str) -> float:
    return float(response == answer)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seed", type=int, default=0, help="seed of model, data and training (default 0)")
    arguments.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder of all that is written")
    options = arguments.parse_args()
    started = time.monotonic()

    held_out = make_rows(256, seed=10_000, without=set())
    seen = {row["prompt"] for row in held_out}
    examples = make_rows(9_000, seed=options.seed, without=seen)
    model = make_model(options.output / "model", options.seed)

    taught = nemo_rl.train(
        model=model,
        dataset=[{"prompt": row["prompt"], "completion": row["answer"]} for row in examples],
        algorithm="sft",
        max_steps=80,
        max_epochs=2,
        batch_size=128,
        learning_rate=2e-3,
        warmup_steps=20,
        seed=options.seed,
        output_dir=options.output / "sft",
        backend="local",
    )
    before = accuracy(taught.checkpoint_path, held_out)

    result = nemo_rl.train(
        model=taught.checkpoint_path,
        dataset=examples,
        reward_fn=sorted_exactly,
        algorithm="grpo",
        max_steps=150,
        max_epochs=2,
        batch_size=64,
        num_generations_per_prompt=16,
        max_new_tokens=10,
        learning_rate=2e-4,
        warmup_steps=5,
        seed=options.seed,
        output_dir=options.output / "grpo",
        backend="local",
    )
    after = accuracy(result.checkpoint_path, held_out)

    curve = options.output / "reward.png"
    result.plot(curve, metrics=["reward"])
    print(f"\nheld-out accuracy before GRPO: {before:.2f}")
    print(f"held-out accuracy after GRPO:  {after:.2f}")
    print(f"reward curve: {curve}")
    print(f"checkpoint:   {result.checkpoint_path}")
    print(f"seconds:      {time.monotonic() - started:.0f}")


if __name__ == "__main__":
    main()
