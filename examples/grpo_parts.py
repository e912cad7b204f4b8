"""GRPO with a reward of two parts and a callback: on the cluster of the current context, or on this machine.

python examples/grpo_parts.py
"""

from __future__ import annotations

import re

import nemo_rl

QUESTIONS = [
    {"prompt": f"What is {a} + {b}? Answer with a number.", "answer": str(a + b)}
    for a in range(2, 6)
    for b in range(3, 5)
]


def numbers_in(text: str) -> list[str]:
    return re.findall(r"-?\d+", text)


def reward(prompt: str, response: str, answer: str) -> dict[str, float]:
    """The last number counts; short answers are a little better."""
    found = numbers_in(response)
    return {"correct": float(bool(found) and found[-1] == answer), "short": -len(response) / 1000}


class StopWhenGood(nemo_rl.Callback):
    """Ends the run when nearly every answer is right; it runs beside the trainer, on a cluster in the pod."""

    def on_step_end(self, trainer, step, metrics):
        print(f"step {step}: {metrics['reward/correct']:.0%} correct")
        if metrics["reward/correct"] > 0.95:
            trainer.should_stop = True


if __name__ == "__main__":
    result = nemo_rl.train(
        "Qwen/Qwen2.5-0.5B-Instruct",
        QUESTIONS,
        reward,
        max_steps=20,
        max_epochs=20,
        batch_size=8,
        num_generations_per_prompt=8,
        max_new_tokens=32,
        gpus=0,
        callbacks=[StopWhenGood()],
        output_dir="outputs/grpo_parts",
    )
    print(result)
