"""The estimate of memory against real steps of a model of 125 million parameters, on the CPU: tensor bytes at the peak.

    python benchmarks/memory_estimate.py [--only full lora ...] [--ranks 1 2] [--small]

Each configuration takes one optimizer step of several micro-batches while every tensor that comes to life is counted; the
estimate knows the configuration alone. Several ranks are processes that share the model (FSDP2, gloo); the largest counts.
Printed is a table; the exit code is 1 where one is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import PeakOfTensors, on_ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LARGEST_ERROR = 0.10
GROUP = 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("sft", {}),
    "full-checkpointing": ("sft", {"activation_checkpointing": True}),
    "lora": ("sft", {"lora_rank": 16}),
    "lora-checkpointing": ("sft", {"lora_rank": 16, "activation_checkpointing": True}),
    "dpo-reference": ("dpo", {}),
    "grpo-kl": ("grpo", {"beta": 0.1, "num_generations_per_prompt": GROUP}),
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


def held_in(step: Callable[[], None], standing: list[Any]) -> int:
    """The peak of tensor bytes in a step; FSDP2 makes tensors anew in the storages that it has emptied, and these count too."""
    gc.collect()
    with PeakOfTensors() as held:
        held.restart()
        step()
    return held.peak


def main() -> int:
    from nemo_rl.api.keywords import build_spec
    from nemo_rl.model.memory import Planner, Where
    from unit.engine import test_memory_estimate as steps

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence, of which a micro-batch has four")
    parser.add_argument("--small", action="store_true", help="a model that takes seconds")
    parser.add_argument("--seconds", type=float, default=1800, help="after which a measurement counts as hanging")
    arguments = parser.parse_args()
    length, new = arguments.length, 3 * arguments.length // 4
    steps.LENGTH, steps.NEW, steps.GROUP = length, new, GROUP
    config = configuration(arguments.small)
    worst = 0.0
    print("| Ranks | Configuration | Measured, MiB | Estimated, MiB | Off by |\n| ---: | --- | ---: | ---: | ---: |")
    for size in arguments.ranks:
        for name in arguments.only:
            algorithm, keywords = CASES[name]
            if algorithm == "grpo":
                keywords = {**keywords, "max_new_tokens": new}
            spec = build_spec("model", algorithm=algorithm, gpus=0, max_sequence_length=length, **keywords)
            recompute = bool(keywords.get("activation_checkpointing"))
            found = Planner(config, spec).estimate(Where(size, device="cpu"), 4 * length, recompute)
            estimated = sum(found.phases["training"].values())

            def step(_: int, algorithm: str = algorithm, keywords: dict[str, Any] = keywords) -> int:
                return steps.measured(algorithm, config, keywords, 4 * length, held_in)

            measured = max(on_ranks(size, step, arguments.seconds))
            off = estimated / measured - 1
            worst = max(worst, abs(off))
            shown = f"| {size} | {name} | {measured / 2**20:,.1f} | {estimated / 2**20:,.1f} | {off:+.1%} |"
            print(shown, flush=True)
    return 1 if worst > LARGEST_ERROR else 0


if __name__ == "__main__":
    raise SystemExit(main())
