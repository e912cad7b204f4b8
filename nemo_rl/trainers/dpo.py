"""Direct preference optimisation: raise chosen completions over rejected ones, relative to the model at the start."""

from __future__ import annotations

import os
import time
from array import array
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_rl.data.prepare import PairExample, Prepared, batches
from nemo_rl.model.packing import PackedBatch, TokenSequence
from nemo_rl.model.policy import Policy
from nemo_rl.objectives.losses import preference_loss
from nemo_rl.run.checkpoint import Checkpoint
from nemo_rl.run.lease import Lease, guarded
from nemo_rl.trainers.base import Trainer

REFERENCE_DIR = "reference"
"""In the run's folder: the log-probabilities at the start, a file for each data set."""
PAIRS_AT_ONCE = 256
"""Pairs between two looks at the clock while they are computed."""
PROGRESS_SECONDS = 15.0


class DPOTrainer(Trainer):
    """Minimises the preference loss, the mean over the pairs of each optimizer batch.

    The reference log-probabilities of the pairs that the run will see are computed once, before the first step, so that
    no second model stays in memory. They are kept in the run's folder: a run that goes on computes only what is new.
    """

    algorithm = "dpo"

    @property
    def needs_reference(self) -> bool:
        return True

    def needs_copy_of_start(self, checkpoint: Checkpoint | None) -> bool:
        return checkpoint is not None  # at the start the model itself is what it is compared with

    def _start(self, data: Prepared, validation: Prepared | None) -> None:
        self._start_policy: Policy | None = None
        self.reference = self._known_reference("training", data, self._numbers_to_come(data))
        if validation is not None:
            numbers = list(range(len(validation.examples)))
            self.validation_reference = self._known_reference("validation", validation, numbers)
        self._start_policy = None

    def _numbers_to_come(self, data: Prepared) -> list[int]:
        """The numbers of the pairs in the steps that are left."""
        size, training = len(data.examples), self.training
        per_epoch = -(-size // training.batch_size)
        found: set[int] = set()
        for epoch in range(self.current_step // per_epoch, -(-self.total_steps // per_epoch)):
            plan = batches(size, training.batch_size, training.seed, training.shuffle, epoch)
            for position, numbers in enumerate(plan):
                if self.current_step <= epoch * per_epoch + position < self.total_steps:
                    found.update(numbers)
            if len(found) == size:
                break
        return sorted(found)

    def _known_reference(self, what: str, data: Prepared, numbers: list[int]) -> Tensor:
        """Returns (all pairs, 2), the summed log-probabilities of chosen and rejected at the start; NaN but for `numbers`."""
        file = self.run_dir / REFERENCE_DIR / f"{data.fingerprint[:24]}.safetensors"
        sums = self.ranks.first(lambda: _read_sums(file, len(data.examples)))
        missing = [i for i in numbers if sums[i].isnan().any()]
        said = time.monotonic()
        for start in range(0, len(missing), PAIRS_AT_ONCE):
            chunk = missing[start : start + PAIRS_AT_ONCE]
            examples = [data.examples[i] for i in chunk]
            sums[chunk] = self._reference(self._policy_of_the_start(), examples).cpu()
            done = start + len(chunk)
            if done == len(missing) or time.monotonic() - said > PROGRESS_SECONDS:
                said = time.monotonic()
                self.display.note(f"reference log-probabilities: {done:,} of {len(missing):,} {what} pairs")
                self.ranks.first(lambda: _write_sums(file, sums, self.lease))
        return sums.to(self.device)

    def _policy_of_the_start(self) -> Policy:
        if self._start_policy is None:
            self._start_policy = self.policy if self.current_step == 0 else self.initial_policy()
        return self._start_policy

    def policies(self) -> list[Policy]:
        start = getattr(self, "_start_policy", None)
        return [self.policy, *([start] if start is not None and start is not self.policy else [])]

    def _reference(self, policy: Policy, examples: list[PairExample]) -> Tensor:
        """Returns (pairs, 2): the summed log-probability of each chosen and rejected completion."""
        return self.sum_logprobs(policy, _sequences(examples)).view(-1, 2)

    def train_step(self, examples: list[PairExample], step: int) -> dict[str, Any]:
        sequences = _sequences(examples)
        reference = self.reference[[example.index for example in examples]]
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

        loss = self.accumulate(sequences, loss_fn, sums=totals, split_groups=False)
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

    def evaluate(self, validation: Prepared) -> tuple[dict[str, float], float | None]:
        sequences = _sequences(validation.examples)
        sums = self._reference(self.policy, validation.examples)
        loss, chosen, rejected = self._losses(sums, self.validation_reference, sequences)
        value = loss.mean().item()
        accuracy = (chosen > rejected).float().mean().item()
        return {"validation_loss": value, "validation_accuracy": accuracy}, -value


def _read_sums(file: Path, count: int) -> Tensor:
    """Returns (count, 2) float32, NaN where nothing is known."""
    if file.is_file():
        sums = load_file(file)["sums"]
        if sums.shape == (count, 2):
            return sums
    return torch.full((count, 2), float("nan"))


def _write_sums(file: Path, sums: Tensor, lease: Lease | None) -> None:
    aside = lease.staging / file.name if lease else file.with_name(f".tmp-{file.name}")
    with guarded(lease):
        file.parent.mkdir(exist_ok=True)
        save_file({"sums": sums}, aside)
        os.replace(aside, file)


def _sequences(examples: list[PairExample]) -> list[TokenSequence]:
    """Returns chosen and rejected in turn; both of a pair share the prompt's activations."""
    found = []
    for i, example in enumerate(examples):
        prompt = len(example.prompt_ids)
        for completion in (example.chosen_ids, example.rejected_ids):
            ids = array("i", example.prompt_ids + completion)  # 4 bytes a token: there may be a whole data set of them
            found.append(TokenSequence(ids, prompt, group=i, shared=prompt))
    return found
