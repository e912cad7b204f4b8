"""Direct preference optimisation: raise chosen completions over rejected ones, relative to the model at the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_rl.data.prepare import PairExample, Prepared
from nemo_rl.model.packing import PackedBatch, TokenSequence
from nemo_rl.model.policy import Policy
from nemo_rl.objectives.losses import preference_loss
from nemo_rl.trainers.base import Trainer


class DPOTrainer(Trainer):
    """Minimises the preference loss, the mean over the pairs of each optimizer batch.

    The reference log-probabilities of all pairs that the run will see are computed once, before the first step, so that
    no second model stays in memory.
    """

    algorithm = "dpo"

    @property
    def needs_reference(self) -> bool:
        return True

    def _start(self, data: Prepared, validation: Prepared | None) -> None:
        policy = self.policy if self.current_step == 0 else self.initial_policy()
        self.reference = self._reference(policy, data.examples)
        if validation is not None:
            self.validation_reference = self._reference(policy, validation.examples)
        self.number_of = {id(example): i for i, example in enumerate(data.examples)}

    def _reference(self, policy: Policy, examples: list[PairExample]) -> Tensor:
        """Returns (pairs, 2): the summed log-probability of each chosen and rejected completion."""
        return self.sum_logprobs(policy, _sequences(examples)).view(-1, 2)

    def train_step(self, examples: list[PairExample], step: int) -> dict[str, Any]:
        sequences = _sequences(examples)
        reference = self.reference[[self.number_of[id(example)] for example in examples]]
        chosen_tokens = sum(sequence.num_targets for sequence in sequences[::2])
        totals = {"accuracy": 0.0, "chosen": 0.0, "rejected": 0.0}

        def loss_fn(batch: PackedBatch, indices: list[int]) -> Tensor:
            pairs = [i // 2 for i in indices[::2]]
            sums = batch.per_sequence(self.policy.logprobs(batch)).view(-1, 2)
            loss, chosen, rejected = self._losses(sums, reference[pairs], [sequences[i] for i in indices])
            totals["accuracy"] += (chosen > rejected).float().sum().item() / len(examples)
            totals["chosen"] += chosen.sum().item() / len(examples)
            totals["rejected"] += rejected.sum().item() / len(examples)
            return loss.sum() / len(examples) - self.settings.nll_weight * sums[:, 0].sum() / chosen_tokens

        loss = self.accumulate(sequences, loss_fn, split_groups=False)
        totals = self.ranks.sum(totals)
        grad_norm = self._optimizer.step(self.rate)
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "preference_accuracy": totals["accuracy"],
            "chosen_reward": totals["chosen"],
            "rejected_reward": totals["rejected"],
            "reward_margin": totals["chosen"] - totals["rejected"],
            "tokens": sum(len(sequence.ids) for sequence in sequences),
        }

    def _losses(self, sums: Tensor, reference: Tensor, sequences: list[TokenSequence]) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.tensor([s.num_targets for s in sequences], device=sums.device, dtype=sums.dtype).view(-1, 2)
        return preference_loss(
            sums[:, 0],
            sums[:, 1],
            reference[:, 0],
            reference[:, 1],
            beta=self.settings.beta,
            kind=self.settings.preference_loss,
            label_smoothing=self.settings.label_smoothing,
            chosen_lengths_P=lengths[:, 0],
            rejected_lengths_P=lengths[:, 1],
        )

    def evaluate(self, validation: Prepared) -> tuple[dict[str, float], float]:
        sequences = _sequences(validation.examples)
        sums = self._reference(self.policy, validation.examples)
        loss, chosen, rejected = self._losses(sums, self.validation_reference, sequences)
        value = loss.mean().item()
        accuracy = (chosen > rejected).float().mean().item()
        return {"validation_loss": value, "validation_accuracy": accuracy}, -value


def _sequences(examples: list[PairExample]) -> list[TokenSequence]:
    """Returns chosen and rejected in turn; both of a pair share the prompt's activations."""
    found = []
    for i, example in enumerate(examples):
        prompt = len(example.prompt_ids)
        for completion in (example.chosen_ids, example.rejected_ids):
            found.append(TokenSequence(example.prompt_ids + completion, prompt, group=i, shared=prompt))
    return found
