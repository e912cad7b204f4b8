"""Supervised fine-tuning: maximise the log-probability of completions and assistant turns."""

from __future__ import annotations

from array import array
from typing import Any

from torch import Tensor

from nemo_rl.data.prepare import Prepared, TextExample
from nemo_rl.model.packing import PackedBatch, TokenSequence
from nemo_rl.trainers.base import Trainer


class SFTTrainer(Trainer):
    """Minimises the mean negative log-likelihood over all trained tokens of each optimizer batch."""

    algorithm = "sft"

    def train_step(self, examples: list[TextExample], step: int) -> dict[str, Any]:
        sequences = [_sequence(example) for example in examples]
        num_trained = sum(sequence.num_targets for sequence in sequences)

        def loss_fn(batch: PackedBatch, indices: list[int]) -> Tensor:
            return -self.policy.logprobs(batch).sum() / num_trained

        loss = self.accumulate(sequences, loss_fn)
        grad_norm = self._optimizer.step(self.rate)
        tokens = sum(len(sequence.ids) for sequence in sequences)
        return {"loss": loss, "grad_norm": grad_norm, "trained_tokens": num_trained, "tokens": tokens}

    def evaluate(self, validation: Prepared) -> tuple[dict[str, float], float | None]:
        sequences = [_sequence(example) for example in validation.examples]
        num_trained = sum(sequence.num_targets for sequence in sequences)
        loss = -self.sum_logprobs(self.policy, sequences).sum().item() / num_trained
        return {"validation_loss": loss}, -loss


def _sequence(example: TextExample) -> TokenSequence:
    # 5 bytes a token: an evaluation makes those of its whole data set
    return TokenSequence(array("i", example.ids), first_target=1, mask=bytes(example.mask))
