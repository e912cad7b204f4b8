"""Forward and backward passes over the sequences of an optimizer batch, each rank taking a share of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_rl.job.spec import TrainingSpec
from nemo_rl.model.packing import PackedBatch, TokenSequence, pack, plan_microbatches
from nemo_rl.model.policy import Policy
from nemo_rl.run.ranks import Ranks
from nemo_rl.run.signals import StopSignals

TOKENS_PER_MICROBATCH_CPU = 4096
TOKENS_PER_MICROBATCH_CUDA = 16384


class Passes:
    """What a trainer computes with: micro-batches under the token budget, summed over micro-batches and ranks."""

    training: TrainingSpec
    device: torch.device
    ranks: Ranks
    signals: StopSignals

    def poll(self) -> None:
        """Raises Interrupted if a signal asked this process to stop; leaves the share of a rank when another one ended."""
        self.signals.check()
        self.ranks.check()

    def microbatches(self, sequences: list[TokenSequence], split_groups: bool = True) -> list[list[int]]:
        """Returns the plan of micro-batches of the sequences under the token budget."""
        budget = self.training.tokens_per_microbatch
        if budget is None:
            budget = TOKENS_PER_MICROBATCH_CUDA if self.device.type == "cuda" else TOKENS_PER_MICROBATCH_CPU
        return plan_microbatches(sequences, budget, split_groups)

    def accumulate(
        self,
        sequences: list[TokenSequence],
        loss_fn: Callable[[PackedBatch, list[int]], Tensor],
        *,
        split_groups: bool = True,
        may_stop: bool = True,
    ) -> float:
        """Adds the gradient of the sum of `loss_fn(batch, indices)` over all micro-batches, and returns that sum.

        `loss_fn` gets the packed micro-batch and the numbers of its sequences, and weighs by totals of the whole step.
        Each rank computes a share of the sequences, and the sum is over all of them; gradients are summed by the optimizer.
        """
        share = self._shares(sequences, split_groups)[self.ranks.rank]

        def compute() -> float:
            total = 0.0
            for plan in self.microbatches([sequences[i] for i in share], split_groups):
                if may_stop:
                    self.poll()
                indices = [share[i] for i in plan]
                loss = loss_fn(pack([sequences[i] for i in indices], self.device), indices)
                loss.backward()
                total += loss.item()
            return total

        return sum(self.ranks.gather(compute))

    def _shares(self, sequences: list[TokenSequence], split_groups: bool = True) -> list[list[int]]:
        """Returns the numbers of the sequences that each rank takes: whole groups, unless there are fewer than ranks."""
        groups: dict[object, list[int]] = {}
        for i, sequence in enumerate(sequences):
            groups.setdefault(("single", i) if sequence.group is None else sequence.group, []).append(i)
        units = list(groups.values())
        if split_groups and len(units) < self.ranks.size:
            units = [[i] for i in range(len(sequences))]
        shares = self.ranks.shares([sum(len(sequences[i].ids) for i in unit) for unit in units])
        return [sorted(i for unit in share for i in units[unit]) for share in shares]

    def sum_logprobs(self, policy: Policy, sequences: list[TokenSequence], temperature: float = 1.0) -> Tensor:
        """Returns the summed log-probability of the trained tokens of each sequence, (len(sequences),), without gradient."""
        return self.sum_over_tokens(sequences, lambda batch: policy.logprobs(batch, temperature))

    def sum_over_tokens(self, sequences: list[TokenSequence], values_of: Callable[[PackedBatch], Tensor]) -> Tensor:
        """Returns the sum of `values_of(batch)`, (S,), over the trained tokens of each sequence, (len(sequences),), without gradient."""
        sums = torch.zeros(len(sequences), device=self.device)
        shares = self._shares(sequences)

        @torch.no_grad()
        def compute() -> list[float]:
            mine = shares[self.ranks.rank]
            found = torch.zeros(len(mine), device=self.device)
            for indices in self.microbatches([sequences[i] for i in mine]):
                self.poll()
                batch = pack([sequences[mine[i]] for i in indices], self.device)
                found[torch.tensor(indices, device=self.device)] = batch.per_sequence(values_of(batch))
            return found.tolist()

        for share, found in zip(shares, self.ranks.gather(compute), strict=True):
            sums[torch.tensor(share, dtype=torch.long, device=self.device)] = torch.tensor(found, device=self.device)
        return sums
