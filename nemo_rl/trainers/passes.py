"""Forward and backward passes over the sequences of an optimizer batch, each rank taking a share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from nemo_rl.display.phases import Phase
from nemo_rl.job.spec import TrainingSpec
from nemo_rl.model.packing import PackedBatch, TokenSequence, pack, plan_microbatches
from nemo_rl.model.policy import Policy
from nemo_rl.run.ranks import Ranks
from nemo_rl.run.signals import StopSignals

T = TypeVar("T")

TOKENS_PER_MICROBATCH_CPU = 4096
TOKENS_PER_MICROBATCH_CUDA = 16384


class Passes:
    """What a trainer computes with: micro-batches under the token budget, summed over micro-batches and ranks."""

    training: TrainingSpec
    device: torch.device
    ranks: Ranks
    signals: StopSignals
    policy: Policy
    budget_share: float = 1.0
    """What is left of the token budget after passes that ran out of memory."""
    _can_be_smaller: bool = False
    """Whether any pass has more than one sequence, or pair."""
    planned_tokens: int | None = None
    """Tokens of a micro-batch that fit, where the specification leaves them to the estimate of memory."""

    current_phase: Phase | None = None
    """What the run does now; passes count their sequences there."""

    def poll(self) -> None:
        """Raises Interrupted if a signal asked this process to stop; leaves the share of a rank when another one ended."""
        self.signals.check()
        self.ranks.check()

    @property
    def token_budget(self) -> int:
        """Tokens of one pass."""
        budget = self.training.tokens_per_microbatch or self.planned_tokens
        if budget is None:
            budget = TOKENS_PER_MICROBATCH_CUDA if self.device.type == "cuda" else TOKENS_PER_MICROBATCH_CPU
        return max(1, int(budget * self.budget_share))

    def microbatches(self, sequences: list[TokenSequence], split_groups: bool = True) -> list[list[int]]:
        """Returns the plan of micro-batches of the sequences under the token budget.

        Where a sharded model runs each sequence by itself, it is one a micro-batch: ranks then make as many forward passes.
        """
        alone = self.policy.sharded is not None and self.policy.one_by_one
        budget = 1 if alone else self.token_budget
        return plan_microbatches(sequences, budget, split_groups, self.policy.layout)

    def passes(
        self, sequences: list[TokenSequence], split_groups: bool = True, may_stop: bool = True
    ) -> Iterator[tuple[PackedBatch, list[int], bool]]:
        """Yields this rank's micro-batches, each with the numbers of its sequences, and whether it counts.

        Ranks that share the weights of a model make equally many passes: one that has done its share runs its shortest
        sequences again, and they do not count.
        """
        shares = self._shares(sequences, split_groups)
        plans = [self._plan(sequences, share, split_groups) for share in shares]
        self._can_be_smaller = any(len(indices) > (1 if split_groups else 2) for plan in plans for indices in plan)
        plan, whole = plans[self.ranks.rank], self.policy.sharded is None
        idle = [] if whole else self._plan(sequences, shares[self.ranks.rank] or shares[0], split_groups)[:1]
        for i in range(len(plan) if whole else max(map(len, plans))):
            if may_stop:
                self.poll()
            indices = plan[i] if i < len(plan) else idle[0]
            views = None if whole else 1  # each view is a forward pass
            yield pack([sequences[j] for j in indices], self.device, views), indices, i < len(plan)
            if self.current_phase is not None and i < len(plan):
                self.current_phase.add(tokens=sum(len(sequences[j].ids) for j in indices))

    def _plan(self, sequences: list[TokenSequence], share: list[int], split_groups: bool) -> list[list[int]]:
        plan = self.microbatches([sequences[i] for i in share], split_groups)
        return [[share[i] for i in indices] for indices in plan]

    def accumulate(
        self,
        sequences: list[TokenSequence],
        loss_fn: Callable[[PackedBatch, list[int]], Tensor],
        *,
        sums: dict[str, float] | None = None,
        split_groups: bool = True,
        may_stop: bool = True,
    ) -> float:
        """Adds the gradient of the sum of `loss_fn(batch, indices)` over all micro-batches, and returns that sum.

        `loss_fn` gets the packed micro-batch and the numbers of its sequences, weighs by totals of the whole step, and may add
        to `sums`. Each rank computes a share of the sequences, and the result is over all of them; the gradients are summed by
        a sharded model in each pass, else by the optimizer.
        """
        sums = {} if sums is None else sums
        begin = dict(sums)

        def compute() -> float:
            total = 0.0
            sums.clear()
            sums.update(begin)
            for parameter in self.policy.trainable:  # of passes that ran out of memory
                parameter.grad = None
            for batch, indices, counts in self.passes(sequences, split_groups, may_stop):
                before = dict(sums)
                loss = loss_fn(batch, indices)
                if counts:
                    loss.backward()
                    if self.policy.sharded is not None:
                        self.ranks.settle(self.device)
                    total += loss.item()
                else:
                    (loss * 0.0).backward()
                    sums.clear()
                    sums.update(before)
            return total

        return sum(self.together(compute))

    def together(self, compute: Callable[[], T]) -> list[T]:
        """Returns what `compute` returned on each rank. It may run passes of a sharded model, which all ranks leave together.

        Where memory runs out on any rank, all compute again with half the token budget, as long as it can be less.
        """
        while True:
            try:
                return self.ranks.gather(compute)
            except BaseException as error:
                for policy in self.policies():
                    if policy.sharded is not None:
                        policy.sharded.reset()
                if not is_out_of_memory(error) or not self._can_be_smaller:
                    raise
                rank = getattr(error, "rank", self.ranks.rank)
            where = f" on rank {rank}" if self.ranks.size > 1 else ""
            budget = self.token_budget
            self.budget_share /= 2
            for parameter in self.policy.trainable:
                parameter.grad = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.say(
                f"out of memory{where} in a pass of up to {budget:,} tokens; the step is repeated, and the run goes on, with "
                f"passes of up to {self.token_budget:,} (tokens_per_microbatch), which changes no gradient"
            )

    def policies(self) -> list[Policy]:
        """Returns the models that passes run through."""
        return [self.policy]

    def say(self, sentence: str) -> None:
        """Tells the user something that happens once."""

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

        @torch.no_grad()
        def compute() -> list[tuple[list[int], list[float]]]:
            found = []
            for batch, indices, counts in self.passes(sequences):
                values = batch.per_sequence(values_of(batch))
                if counts:
                    found.append((indices, values.tolist()))
            return found

        for part in self.together(compute):
            for indices, values in part:
                sums[torch.tensor(indices, dtype=torch.long, device=self.device)] = torch.tensor(
                    values, device=self.device
                )
        return sums


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
