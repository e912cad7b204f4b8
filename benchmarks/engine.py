"""Time of GRPO, DPO and SFT steps against TRL's trainers: same model, same data, same shapes, alternating runs.

    python benchmarks/engine.py [--rounds 3] [--steps 8] [--only grpo sft dpo import] [--max-new-tokens 32]
    python benchmarks/engine.py --size 125m [--family gemma2] [--lora] [--max-new-tokens 48] [--rounds 1] [--steps 4]

Both sides train the same Qwen2 (854 k parameters, fp32, CPU) on the same rows; with `--size 125m` one of 12 layers of 768 and
32,000 tokens with random weights, whose completions run to their limit, in steps of 4 prompts x 8 or 16 examples. TRL runs in its fastest known CPU
configuration, named in the output. First the loss and the gradient of one batch are compared; then each side runs in a
process of its own, in turn, and the median of its steps counts. Printed are ratios per trained token: TRL / nemo-rl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

WARMUP = 2
LORA_RANK = 16


class Shape(NamedTuple):
    """Prompts and completions of each in a GRPO step, examples of an SFT step or pairs of a DPO step, and how TRL cuts them."""

    prompts: int
    generations: int
    batch: int
    trl_completions: int
    trl_accumulation: int


SHAPES = {"tiny": Shape(32, 16, 64, 128, 4), "125m": Shape(4, 8, 16, 32, 1)}
TRL_CONFIGURATION = {
    "grpo": "fp32, no checkpointing, micro-batches of 128, fused AdamW, dynamic cache",
    "dpo": "fp32, no checkpointing, precompute_ref_log_probs, 16 pairs x 4 accumulation",
    "sft": "fp32, no checkpointing, group_by_length, 16 x 4 accumulation",
}


def digits(draw: random.Random, n: int) -> str:
    return "".join(draw.choices("0123456789", k=n))


def prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [digits(draw, draw.randint(8, 24)) + ":" for _ in range(count)]


def pairs(count: int, longest: int, seed: int) -> list[tuple[str, str]]:
    """Prompts with random digits whose number is log-normal: many short completions and a long tail."""
    draw = random.Random(seed)
    lengths = [max(2, min(longest, int(draw.lognormvariate(0, 0.6) * 0.35 * longest))) for _ in range(count)]
    return [(prompt, digits(draw, n)) for prompt, n in zip(prompts(count, seed + 1), lengths, strict=True)]


def sevens(text: str) -> float:
    return text.count("7") / max(1, len(text))


def large_config(family: str) -> Any:
    """The configuration of a model of 125 million parameters."""
    from transformers import Gemma2Config, Qwen2Config

    shared = {
        **{"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        **{"num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048},
        **{"tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
    }
    if family == "gemma2":
        return Gemma2Config(**shared, head_dim=64, query_pre_attn_scalar=64, sliding_window=512)
    return Qwen2Config(**shared)


def make_policy(folder: Path, longest: int, size: str = "tiny", family: str = "qwen2") -> None:
    """Writes the model of the benchmark; the tiny one taught to emit completions of varied length, so that groups finish
    unevenly."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    import nemo_rl

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "while",
        "reinforcement",
        "learning",
        "from",
        "verifiable",
        "rewards",
    ]
    draw = random.Random(0)
    tokenizer.train_from_iterator([" ".join(draw.choices(words, k=12)) for _ in range(400)], trainer)
    written = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=2048
    )
    torch.manual_seed(0)
    if size != "tiny":
        written.save_pretrained(folder / "policy")
        AutoModelForCausalLM.from_config(large_config(family)).save_pretrained(folder / "policy")
        return
    written.save_pretrained(folder / "init")
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "init")
    result = nemo_rl.train(
        str(folder / "init"),
        [{"prompt": p, "completion": c} for p, c in pairs(64 * 150, longest, seed=3)],
        algorithm="sft",
        max_steps=150,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=20,
        lr_schedule="linear",
        output_dir=folder / "teach",
        backend="local",
        log_level="warning",
    )
    Path(result.checkpoint_path).rename(folder / "policy")


def rows_of(algorithm: str, steps: int, longest: int, shape: Shape = SHAPES["tiny"]) -> list[dict[str, str]]:
    if algorithm == "grpo":
        return [{"prompt": p} for p in prompts(shape.prompts * steps, seed=7)]
    chosen = pairs(shape.batch * steps, longest, seed=21)
    if algorithm == "sft":
        return [{"prompt": p, "completion": c} for p, c in chosen]
    rejected = pairs(shape.batch * steps, longest, seed=41)
    return [{"prompt": p, "chosen": c, "rejected": r} for (p, c), (_, r) in zip(chosen, rejected, strict=True)]


# ---------------------------------------------------------------------- the two sides, each in a process of its own


def run_ours(algorithm: str, folder: Path, options: argparse.Namespace) -> list[tuple[float, int]]:
    import nemo_rl

    steps, longest, shape = options.steps, options.max_new_tokens, SHAPES[options.size]
    found: list[tuple[float, int]] = []

    class Clock(nemo_rl.Callback):
        def on_train_begin(self, trainer: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
            now = time.perf_counter()
            tokens = metrics["tokens"]
            if algorithm == "grpo":
                tokens = round(metrics["completion_length"] * shape.prompts * shape.generations)
            found.append((now - self.last, tokens))
            self.last = now

    extra: dict[str, Any] = {}
    if algorithm == "grpo":
        extra = {"num_generations_per_prompt": shape.generations, "max_new_tokens": longest}
    if options.lora:
        extra["lora_rank"] = LORA_RANK
    with tempfile.TemporaryDirectory() as output:
        nemo_rl.train(
            str(folder / "policy"),
            rows_of(algorithm, steps, longest, shape),
            (lambda prompt, response: sevens(response)) if algorithm == "grpo" else None,
            algorithm=algorithm,
            max_steps=steps,
            batch_size=shape.prompts if algorithm == "grpo" else shape.batch,
            learning_rate=1e-6,
            weight_decay=0.0,
            save_every=None,
            output_dir=output,
            callbacks=[Clock()],
            backend="local",
            log_level="warning",
            **extra,
        )
    return found


def run_trl(algorithm: str, folder: Path, options: argparse.Namespace) -> list[tuple[float, int]]:
    import torch
    from transformers import TrainerCallback

    steps, longest, shape = options.steps, options.max_new_tokens, SHAPES[options.size]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found: list[tuple[float, int]] = []
    tokens = [0]

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            found.append((now - self.last, tokens[0]))
            self.last, tokens[0] = now, 0

    with tempfile.TemporaryDirectory() as output:
        trainer = make_trl(
            *(algorithm, folder, output, rows_of(algorithm, steps, longest, shape), steps, longest, [Clock()]),
            shape=shape,
            lora=options.lora,
        )
        original = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if algorithm != "grpo":
                tokens[0] += int(inputs["attention_mask"].sum())
            return original(model, inputs, *args, **kwargs)

        trainer.training_step = training_step
        if algorithm == "grpo":
            generate = trainer._generate_single_turn

            def counted(*args: Any, **kwargs: Any) -> Any:
                result = generate(*args, **kwargs)
                tokens[0] += sum(map(len, result[0]))
                return result

            trainer._generate_single_turn = counted
        trainer.train()
    return found


def make_trl(
    algorithm: str,
    folder: Path,
    output: str,
    rows: list[dict[str, str]],
    steps: int,
    longest: int,
    callbacks: list[Any],
    shape: Shape = SHAPES["tiny"],
    lora: bool = False,
) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    common = {
        "output_dir": output,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "dataloader_pin_memory": False,
    }
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    shared = {
        "model": model,
        "train_dataset": Dataset.from_list(rows),
        "processing_class": AutoTokenizer.from_pretrained(folder / "policy"),
        "callbacks": callbacks,
    }
    if lora:
        from peft import LoraConfig

        shared["peft_config"] = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    if algorithm == "grpo":
        config = GRPOConfig(
            per_device_train_batch_size=shape.trl_completions,
            gradient_accumulation_steps=shape.prompts * shape.generations // shape.trl_completions,
            num_generations=shape.generations,
            max_completion_length=longest,
            beta=0.0,
            **common,
        )

        def reward(completions: list[str], **columns: Any) -> list[float]:
            return [sevens(text) for text in completions]

        return GRPOTrainer(reward_funcs=reward, args=config, **shared)
    batches = {
        "per_device_train_batch_size": shape.batch // shape.trl_accumulation,
        "gradient_accumulation_steps": shape.trl_accumulation,
        "max_length": None,
    }
    if algorithm == "sft":
        return SFTTrainer(args=SFTConfig(train_sampling_strategy="group_by_length", **batches, **common), **shared)
    if not lora:  # of adapters the reference is the model without them
        shared["ref_model"] = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    config = DPOConfig(precompute_ref_log_probs=True, beta=0.1, **batches, **common)
    return DPOTrainer(args=config, **shared)


# ---------------------------------------------------------------------- equality, ratios


def compare_one_batch(folder: Path, longest: int) -> None:
    """Prints the loss and the gradient of the same SFT batch on both sides: the same work is timed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_rl.model.packing import TokenSequence, pack
    from nemo_rl.model.policy import Policy

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    rows = pairs(SHAPES["tiny"].batch, longest, seed=5)
    sequences = []
    for prompt, completion in rows:
        start = tokenizer(prompt)["input_ids"]
        sequences.append(TokenSequence(start + tokenizer(completion)["input_ids"] + [1], len(start)))
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    batch = pack(sequences)
    ours = -Policy(model).logprobs(batch).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(ours, list(model.parameters()))])

    losses: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as output:
        trl_rows = [{"prompt": p, "completion": c} for p, c in rows]
        trainer = make_trl("sft", folder, output, trl_rows, 1, longest, [])
        trainer.args.learning_rate = 0.0
        original = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = original(model, inputs, *args, **kwargs)
            losses["loss"] = losses.get("loss", 0.0) + loss.item()
            losses["gradient"] = torch.cat([p.grad.flatten().clone() for p in trainer.model.parameters()])
            return loss

        trainer.training_step = training_step
        trainer.train()
    error = (gradient - losses["gradient"]).norm() / gradient.norm()
    print(
        f"one SFT batch: loss {ours.item():.6f} (TRL {losses['loss']:.6f}), relative difference of gradients {error:.1e}"
    )


def measure(side: str, algorithm: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--only", algorithm, "--folder", str(folder)]
    command += ["--steps", str(options.steps), "--max-new-tokens", str(options.max_new_tokens), "--size", options.size]
    command += ["--lora"] if options.lora else []
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def import_seconds(statement: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--size", choices=list(SHAPES), default="tiny")
    parser.add_argument("--family", choices=["qwen2", "gemma2"], default="qwen2", help="of --size 125m")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 16 on every linear layer, on both sides")
    parser.add_argument("--only", nargs="*", default=["grpo", "dpo", "sft", "import"])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run = run_ours if options.side == "ours" else run_trl
        steps = run(options.only[0], options.folder, options)[WARMUP:]
        per_token = statistics.median(seconds / tokens for seconds, tokens in steps)
        print(json.dumps({"seconds": statistics.median(s for s, _ in steps), "per_token": per_token}))
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if set(options.only) - {"import"}:
            make_policy(folder, options.max_new_tokens, options.size, options.family)
            if options.size == "tiny":
                compare_one_batch(folder, options.max_new_tokens)
        for algorithm in [name for name in options.only if name != "import"]:
            print(f"{algorithm}: TRL in {TRL_CONFIGURATION[algorithm]}", flush=True)
            ratios = []
            for number in range(options.rounds):
                trl, ours = (measure(side, algorithm, folder, options) for side in ("trl", "ours"))
                ratios.append(trl["per_token"] / ours["per_token"])
                print(
                    f"  round {number + 1}: TRL {trl['seconds']:.3f} s, nemo-rl {ours['seconds']:.3f} s a step",
                    flush=True,
                )
            figures[algorithm] = {"ratio": statistics.median(ratios), "rounds": ratios}
            print(
                f"  ratio per trained token: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    if "import" in options.only:
        theirs = [import_seconds("from trl import GRPOConfig, GRPOTrainer") for _ in range(options.rounds)]
        ours_seconds = [import_seconds("import nemo_rl; nemo_rl.train") for _ in range(options.rounds)]
        ratio = statistics.median(theirs) / statistics.median(ours_seconds)
        figures["import"] = {"ratio": ratio, "ours": statistics.median(ours_seconds), "trl": statistics.median(theirs)}
        print(
            f"import: TRL's trainer {statistics.median(theirs):.2f} s, nemo_rl {statistics.median(ours_seconds):.2f} s: {ratio:.1f} times"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
