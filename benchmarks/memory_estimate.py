"""The estimate of memory against real steps of a model of 125 million parameters, on the CPU: tensor bytes at the peak.

    python benchmarks/memory_estimate.py [--only full lora ...] [--small]

Each configuration takes one optimizer step of several micro-batches while every tensor that comes to life is counted; the
estimate knows the configuration alone. Printed is a table; the exit code is 1 where one is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LARGEST_ERROR = 0.10
LENGTH, NEW, GROUP = 256, 192, 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("sft", {}),
    "full-checkpointing": ("sft", {"activation_checkpointing": True}),
    "lora": ("sft", {"lora_rank": 16}),
    "lora-checkpointing": ("sft", {"lora_rank": 16, "activation_checkpointing": True}),
    "dpo-reference": ("dpo", {}),
    "grpo-kl": ("grpo", {"beta": 0.1, "num_generations_per_prompt": GROUP, "max_new_tokens": NEW}),
}


def configuration(small: bool) -> Any:
    from transformers import Qwen2Config

    layers, width = (3, 128) if small else (12, 768)
    return Qwen2Config(
        vocab_size=2000 if small else 32000,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        tie_word_embeddings=False,
        eos_token_id=1,
    )


def main() -> int:
    from nemo_rl.api.keywords import build_spec
    from nemo_rl.model.memory import Planner, Where
    from unit.engine import test_memory_estimate as steps

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--small", action="store_true", help="a model that takes seconds")
    arguments = parser.parse_args()
    steps.LENGTH, steps.NEW, steps.GROUP = LENGTH, NEW, GROUP
    config = configuration(arguments.small)
    worst = 0.0
    print("| Configuration | Measured, MiB | Estimated, MiB | Off by |\n| --- | ---: | ---: | ---: |")
    for name in arguments.only:
        algorithm, keywords = CASES[name]
        spec = build_spec("model", algorithm=algorithm, gpus=0, max_sequence_length=LENGTH, **keywords)
        recompute = bool(keywords.get("activation_checkpointing"))
        found = Planner(config, spec).estimate(Where(device="cpu"), 4 * LENGTH, recompute)
        estimated = sum(found.phases["training"].values())
        measured = steps.measured(algorithm, config, keywords, 4 * LENGTH)
        off = estimated / measured - 1
        worst = max(worst, abs(off))
        print(f"| {name} | {measured / 2**20:,.1f} | {estimated / 2**20:,.1f} | {off:+.1%} |", flush=True)
    return 1 if worst > LARGEST_ERROR else 0


if __name__ == "__main__":
    raise SystemExit(main())
