"""What GRPO trains on: completions with their rewards, cut into the mini-batches of optimizer updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_rl.data.prepare import PromptExample
from nemo_rl.environments.runner import RewardOutcome
from nemo_rl.model.packing import TokenSequence
from nemo_rl.objectives.correction import importance_quantiles
from nemo_rl.rollout.protocol import Completion
from nemo_rl.run.ranks import Ranks


@dataclass(frozen=True)
class Rollouts:
    """Completions of P prompts, G each, prompt by prompt, with the outcome of their rewards."""

    prompts: list[PromptExample]
    completions: list[Completion]
    responses: list[str]
    outcomes: list[RewardOutcome]
    seconds: dict[str, float]

    def and_then(self, others: Rollouts) -> Rollouts:
        """Returns these rollouts followed by others."""
        return Rollouts(
            self.prompts + others.prompts,
            self.completions + others.completions,
            self.responses + others.responses,
            self.outcomes + others.outcomes,
            {name: seconds + others.seconds.get(name, 0.0) for name, seconds in self.seconds.items()},
        )

    def with_groups(self, places: dict[int, int], others: Rollouts) -> Rollouts:
        """Returns these rollouts with group j of others in place of group i, for each i and j of `places`."""
        size = len(self.completions) // len(self.prompts)

        def placed(own: list[Any], new: list[Any], width: int) -> list[Any]:
            result = list(own)
            for i, j in places.items():
                result[i * width : (i + 1) * width] = new[j * width : (j + 1) * width]
            return result

        return Rollouts(
            placed(self.prompts, others.prompts, 1),
            placed(self.completions, others.completions, size),
            placed(self.responses, others.responses, size),
            placed(self.outcomes, others.outcomes, size),
            self.seconds,
        )


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer update is made from: sequences, and of each the number of its completion, what the log-probabilities of
    its tokens were when they were drawn, its advantage, and the weight of its tokens."""

    numbers: list[int]
    sequences: list[TokenSequence]
    drawn: list[list[float]]
    advantages: Tensor
    weights: Tensor

    def sampled(self, order: list[int]) -> Tensor:
        """Returns the log-probabilities of all tokens of the sequences `order` when they were drawn, one after the other."""
        values = [value for i in order for value in self.drawn[i]]
        return torch.tensor(values, device=self.advantages.device)


class TokenSums:
    """Sums over the tokens of a step's updates; their means are metrics."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.log_weights: dict[int, Tensor] = {}
        """Log importance weights of the tokens of each completion, by its number: made again they are the same."""

    def keep(self, numbers: list[int], logprobs: Tensor, sampled: Tensor, sizes: list[int]) -> None:
        """Remembers the importance weights of completions, whose tokens lie together, of each as many as `sizes` says."""
        parts = (logprobs.detach().float() - sampled).cpu().split(sizes)
        self.log_weights.update(zip(numbers, parts, strict=True))

    def add(self, **values: Tensor) -> None:
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
        for name, number in zip(values, numbers, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + number

    def means(self, ranks: Ranks, trained_tokens: int) -> dict[str, float]:
        """Returns the metrics over the sums of all ranks; of what was not measured there is none."""
        totals: dict[str, float] = {}
        for part in ranks.gather(lambda: self.sums):
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + value
        known = totals.pop("tokens", 0.0)
        measured = {name: known if name in ("kl", "error") else trained_tokens for name in totals}
        found = {METRICS[name]: value / measured[name] for name, value in totals.items() if measured[name]}
        weights: dict[int, Tensor] = {}
        for shares in ranks.gather(lambda: self.log_weights):
            weights |= shares
        return found | importance_quantiles(list(weights.values()))


METRICS = {
    "divergence": "kl",
    "clipped": "clip_fraction",
    "kl": "rollout_kl",
    "error": "rollout_logprob_error",
    "bounded": "importance_bounded_fraction",
}


def mean_parts(outcomes: list[RewardOutcome]) -> dict[str, float]:
    """Returns the mean of each named part of the rewards over the completions that have it, as reward/<part>."""
    names = sorted({name for outcome in outcomes for name in outcome.parts})
    found = {}
    for name in names:
        values = [outcome.parts[name] for outcome in outcomes if name in outcome.parts]
        found[f"reward/{name}"] = sum(values) / len(values)
    return found
