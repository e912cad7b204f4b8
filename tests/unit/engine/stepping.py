"""Trainers on live tiny models, ready for single optimizer steps, and batches for them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from nemo_rl.data.prepare import PairExample, PromptExample, TextExample
from nemo_rl.data.rows import PromptRow
from nemo_rl.environments.runner import RewardOutcome
from nemo_rl.model.packing import TokenSequence
from nemo_rl.rollout.protocol import Completion
from nemo_rl.run.ranks import join
from nemo_rl.run.signals import StopSignals
from nemo_rl.trainers.base import Trainer
from nemo_rl.trainers.grpo import GRPOTrainer, Rollouts
from unit.engine.tiny import plain_logprobs, random_ids

SAMPLES = 4


def ready(cls: type[Trainer], model: nn.Module, rate: float = 0.0, **keywords: Any) -> Any:
    """Returns a trainer of this model as it is before the first step; with rate 0 its weights stay as they are.

    On the CPU, also where there is a GPU: the comparisons are of float32 sums. In a rank of several it is one of theirs.
    """
    trainer = cls.from_pretrained(model, gpus=0, **keywords)
    if "WORLD_SIZE" in os.environ:
        trainer.ranks = join(trainer.device)
    trainer._load(None, None)  # type: ignore[arg-type]
    trainer.signals = StopSignals()
    trainer.rate = rate
    return trainer


def gradients_of(trainer: Trainer) -> list[Tensor]:
    """Returns a list that gets the whole gradient of each optimizer step from now on, before it is clipped."""
    found: list[Tensor] = []
    assert trainer.optimizer is not None
    step = trainer.optimizer.step

    def record(rate: float) -> float:
        found.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                    for p in trainer.model.parameters()
                ]
            )
        )
        return step(rate)

    trainer.optimizer.step = record  # type: ignore[method-assign]
    return found


def prompt_examples(count: int) -> list[PromptExample]:
    return [PromptExample(i, random_ids(3 + 4 * i, 200 + i), PromptRow(f"prompt {i}")) for i in range(count)]


def frozen_rollouts(model: nn.Module, prompts: int = 3, drift: float = 0.3, temperature: float = 1.0) -> Rollouts:
    """Completions of many lengths, drawn by nobody; their log-probabilities are the model's, moved by some noise, as if
    an older policy had drawn them. The last of each group ran into the length limit."""
    generator = torch.Generator().manual_seed(12)
    examples = prompt_examples(prompts)
    completions = []
    for example in examples:
        for sample in range(SAMPLES):
            ids = random_ids(1 + (5 * sample + 3 * example.index) % 12, 300 + 10 * example.index + sample)
            with torch.no_grad():
                logprobs = plain_logprobs(model, example.ids + ids, temperature)[len(example.ids) - 1 :]
            logprobs = logprobs + drift * torch.randn(len(ids), generator=generator)
            completions.append(Completion(ids, logprobs.tolist(), finished=sample != SAMPLES - 1))
    outcomes = [RewardOutcome(0.0) for _ in completions]
    return Rollouts(examples, completions, ["" for _ in completions], outcomes, {})


def some_advantages(rollouts: Rollouts) -> Tensor:
    values = torch.randn(len(rollouts.completions), generator=torch.Generator().manual_seed(13))
    values[5] = 0.0
    return values


def grpo(model: nn.Module, **keywords: Any) -> GRPOTrainer:
    keywords = {"num_generations_per_prompt": SAMPLES, "max_new_tokens": 16, "max_grad_norm": None, **keywords}
    return ready(GRPOTrainer, model, **keywords)


def update_an_older_policy(trainer: GRPOTrainer, rollouts: Rollouts) -> None:
    """Lets the trainer's old log-probabilities be those that the completions carry, in place of its own pass.

    That pass sees the weights as they are, so the first update would have ratios of 1 and nothing to clip.
    """
    known: dict[tuple[int, ...], Tensor] = {}
    for i, completion in enumerate(rollouts.completions):
        known[*rollouts.prompts[i // SAMPLES].ids, *completion.ids] = torch.tensor(completion.logprobs)

    def old_logprobs(sequences: list[TokenSequence]) -> dict[int, Tensor]:
        return {i: known[tuple(sequence.ids)] for i, sequence in enumerate(sequences)}

    trainer._old_logprobs = old_logprobs  # type: ignore[method-assign]


def text_examples(count: int = 6) -> list[TextExample]:
    """Prompt and completion, and one example with trained tokens in several places."""
    found = []
    for i in range(count):
        ids = random_ids(6 + 3 * i, 400 + i)
        boundary = 2 + i
        mask = [position >= boundary for position in range(len(ids))]
        if i == 2:
            mask = [position > 0 and position % 3 != 0 for position in range(len(ids))]
        found.append(TextExample(ids, mask))
    return found


def pair_examples(count: int = 5) -> list[PairExample]:
    return [
        PairExample(random_ids(2 + 2 * i, 500 + i), random_ids(1 + 3 * i, 520 + i), random_ids(9 - i, 540 + i), i)
        for i in range(count)
    ]
