"""Writes docs/what_fits.md from the estimate of memory: `python docs/what_fits.py`. tests/generated.py does so too.

Configurations are written out as published on the hub, since pages are made without a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "what_fits.md"

QWEN_HALF = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN_1_5 = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN_7 = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
MODELS = {"Qwen2.5-0.5B": QWEN_HALF, "Qwen2.5-1.5B": QWEN_1_5, "Qwen2.5-7B": QWEN_7}
"""config.json of Qwen/Qwen2.5-*, what of it decides about memory."""

EXAMPLES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("1 · minimal GRPO", "Qwen2.5-0.5B", "grpo", {}),
    ("2 · SFT", "Qwen2.5-0.5B", "sft", {"max_sequence_length": 1024}),
    ("3 · DPO", "Qwen2.5-0.5B", "dpo", {"beta": 0.1}),
    ("4 · DPO on a GPU cluster", "Qwen2.5-1.5B", "dpo", {}),
    (
        "5 · full configuration (KL)",
        "Qwen2.5-0.5B",
        "grpo",
        {
            **{"batch_size": 16, "num_generations_per_prompt": 8, "max_new_tokens": 256, "beta": 0.01},
            **{"max_sequence_length": 1024, "tokens_per_microbatch": 8192, "activation_checkpointing": True},
        },
    ),
    ("6 · GRPO of 7B, 4k sequences", "Qwen2.5-7B", "grpo", {"max_sequence_length": 4096, "max_new_tokens": 2048}),
    ("6, by LoRA", "Qwen2.5-7B", "grpo", {"max_sequence_length": 4096, "max_new_tokens": 2048, "lora_rank": 16}),
]
"""The documented examples: name, model, algorithm and the settings that decide about memory."""
CARDS = [(1, 24), (1, 80), (8, 80), (16, 80)]


def page() -> str:
    from transformers import Qwen2Config

    from nemo_rl.api.keywords import build_spec
    from nemo_rl.model.memory import GIB, RESERVED, SHARE, DoesNotFit, Planner, Where

    rows, changes, shown = [], [], ""
    for name, model, algorithm, settings in EXAMPLES:
        planner = Planner(Qwen2Config(**MODELS[model]), build_spec(model, algorithm=algorithm, **settings))
        cells = []
        for ranks, gib in CARDS:
            where = Where(ranks, gib * GIB)
            try:
                found = planner.choose(where)
            except DoesNotFit as error:
                cells.append(f"**no**: {error.least.peak / GIB:.0f} GiB")
                cures = planner.cures(where)
                changes.append(f"- {name}, {ranks} × {gib} GB: {', or '.join(cures) or 'a smaller model'}.")
                continue
            checkpointing = ", checkpointing" if found.activation_checkpointing else ""
            tight = "" if found.fits else ", tight"
            cells.append(f"{found.peak / GIB:.0f} GiB ({found.tokens_per_microbatch:,} tokens{checkpointing}{tight})")
            if name.startswith("6 ·") and (ranks, gib) == (8, 80):
                shown = found.table()
        rows.append(f"| {name} | {model} | {' | '.join(cells)} |")
    heads = " | ".join(f"{ranks} × {gib} GB" for ranks, gib in CARDS)
    text = [
        "# What fits",
        "<!-- written by docs/what_fits.py -->",
        "These numbers are **estimated, not measured on a GPU**: by `nemo-rl plan`, which counts weights, gradients and optimizer, "
        "and runs the training pass on tensors without numbers to count what it holds. On the CPU the estimate is compared with "
        "real steps of small models (a test: within 10 %; `benchmarks/memory_estimate.py` has one of 125 million parameters); "
        "`make gpu` compares it with a card, which was not done yet. The most that one GPU "
        f"holds may be {SHARE:.0%} of its memory less {RESERVED / GIB:.2f} GiB for CUDA itself.",
        "Each cell: the peak on each GPU, the micro-batch that is chosen where the example does not give one, and whether "
        "activation checkpointing is on.",
        f"| Example | Model | {heads} |\n| --- | --- |{' --- |' * len(CARDS)}\n" + "\n".join(rows),
        "## What would make the others fit",
        "\n".join(changes) or "All fit.",
        "## Example 6 on 8 × 80 GB, phase by phase",
        "GiB on each GPU:",
        f"```text\n{shown}\n```",
        "## Your own job",
        "<!-- not run: needs the configuration of a model from the hub -->\n"
        "```bash\nnemo-rl plan job.yaml --gpus 8 --gpu-memory 80\n"
        "nemo-rl plan --model Qwen/Qwen2.5-7B-Instruct --algorithm sft --gpus 2 --set training.loraRank=16\n```",
        "It reads the model's configuration only. On a GPU, `train()` and the pods of a job ask the same estimate before they load "
        "anything: it sets `tokens_per_microbatch` and `activation_checkpointing` where they are not given, and refuses what cannot "
        "fit with the cheapest change that would. On the CPU nothing is chosen.",
    ]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
