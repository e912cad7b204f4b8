"""Token sequences of different lengths laid out for one forward pass without padding, and cut into micro-batches.

All linear layers see one flat list of tokens. Only attention looks at padded views of it, made from sequences of similar
length. The prompt that several completions share is in the flat list once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

ATTENTION_VIEWS = 4
"""Length classes of one micro-batch: more waste less padding but make more, smaller attention calls."""

ATTENTION_SHARE = 1 / 6
"""What a place in attention costs, of a token through a whole layer: queries, keys, values and outputs of all its numbers."""


@dataclass(frozen=True)
class TokenSequence:
    """One sequence and the tokens of it that are trained.

    `ids` are all tokens. Trained are `ids[first_target:]`, or, with `mask` (one flag per token), those with a true flag.
    Sequences with the same `group` share their first `shared` tokens, for which activations are computed once.
    """

    ids: SequenceOf[int]
    first_target: int
    mask: SequenceOf[int] | None = None
    group: int | None = None
    shared: int = 0

    @property
    def num_targets(self) -> int:
        return sum(self.mask[1:]) if self.mask is not None else len(self.ids) - max(self.first_target, 1)


@dataclass(frozen=True)
class AttentionView:
    """A right-padded (rows, length) view: `gather` holds for each slot the index of its token in the flat list."""

    rows: int
    length: int
    gather: Tensor
    lengths: list[int]


@dataclass(frozen=True)
class PackedBatch:
    """N flat tokens, and S trained ones.

    ids_N, positions_N: tokens and their positions. views: cover every flat token. back_N: index of each flat token among
    the concatenated slots of all views. select_S: flat index whose hidden state predicts each trained token.
    targets_S: the trained tokens. rows_S: index of the sequence that each belongs to; the tokens of one sequence lie
    together, sequences in `order`.
    """

    ids_N: Tensor
    positions_N: Tensor
    views: list[AttentionView]
    back_N: Tensor
    select_S: Tensor
    targets_S: Tensor
    rows_S: Tensor
    order: list[int]
    num_sequences: int

    @cached_property
    def blocks(self) -> dict[int | None, Any]:
        """Block masks of the batch by window, made where a kernel wants them."""
        return {}

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence, without the last, which is only a target."""
        return max(max(view.lengths) for view in self.views)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence in `order`, without the last."""
        return [length for view in self.views for length in view.lengths]

    @cached_property
    def slots(self) -> Tensor:
        """The flat index of each token of each sequence in `order`, one sequence after the other: shared prompts repeat."""
        rows = [view.gather.view(view.rows, view.length) for view in self.views]
        return torch.cat(
            [
                row[:length]
                for view, r in zip(self.views, rows, strict=True)
                for row, length in zip(r, view.lengths, strict=True)
            ]
        )

    @cached_property
    def from_slots(self) -> Tensor:
        """For each flat token the index in `slots` of one of its places."""
        places = torch.arange(len(self.slots), device=self.slots.device)
        first = places.new_zeros(len(self.ids_N))
        return first.scatter_reduce_(0, self.slots, places, "amin", include_self=False)

    @cached_property
    def apart(self) -> PackedBatch:
        """The same batch with every sequence whole in the flat list, in `order`."""
        ends = [0, *itertools.accumulate(self.lengths)]
        number, begin, views = 0, 0, []
        back = torch.empty(ends[-1], dtype=torch.long, device=self.ids_N.device)
        for view in self.views:
            columns = torch.arange(view.length, device=back.device)
            starts = torch.tensor(ends[number : number + view.rows], device=back.device)
            lengths = torch.tensor(view.lengths, device=back.device)
            real = columns[None] < lengths[:, None]
            places = torch.where(real, starts[:, None] + columns[None], starts[:, None])
            slots = begin + torch.arange(view.rows * view.length, device=back.device).view_as(places)
            back[places[real]] = slots[real]
            views.append(AttentionView(view.rows, view.length, places.flatten(), view.lengths))
            number, begin = number + view.rows, begin + view.rows * view.length
        return replace(
            self,
            ids_N=self.ids_N[self.slots],
            positions_N=self.positions_N[self.slots],
            views=views,
            back_N=back,
            select_S=self.from_slots[self.select_S],
        )

    @cached_property
    def boundaries(self) -> Tensor:
        """Where the sequences begin and end in `slots`, (sequences + 1,), int32."""
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32)
        return ends.cumsum(0, dtype=torch.int32).to(self.slots.device)

    def per_sequence(self, values_S: Tensor) -> Tensor:
        """Returns the sum of `values_S` over the trained tokens of each sequence, (num_sequences,), differentiable."""
        return values_S.new_zeros(self.num_sequences).index_add(0, self.rows_S, values_S)


def pack(
    sequences: SequenceOf[TokenSequence], device: torch.device | str = "cpu", views: int | None = None
) -> PackedBatch:
    """Returns the packed layout of the sequences, in ATTENTION_VIEWS length classes or in `views`.

    The last token of each is only a target: it needs no forward.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
    num_views = min(views or ATTENTION_VIEWS, len(sequences))
    cuts = [len(order) * j // num_views for j in range(num_views + 1)]
    ids: list[int] = []
    positions: list[int] = []
    back: list[int] = []
    select: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    made: list[AttentionView] = []
    start_of_group: dict[
        tuple[int | None, int], int
    ] = {}  # by group and shared length: an empty completion shares less
    num_slots = 0
    for j in range(num_views):
        members = order[cuts[j] : cuts[j + 1]]
        width = max(len(sequences[i].ids) for i in members) - 1
        gather: list[int] = []
        for i in members:
            sequence = sequences[i]
            tokens, length = sequence.ids, len(sequence.ids) - 1
            shared = min(sequence.shared, length) if sequence.group is not None else 0
            slot = num_slots + len(gather)
            prefix = start_of_group.get((sequence.group, shared), -1) if shared else len(ids)
            if shared and prefix < 0:
                prefix = start_of_group[sequence.group, shared] = len(ids)
                ids += tokens[:shared]
                positions += range(shared)
                back += range(slot, slot + shared)
            own = len(ids)
            ids += tokens[shared:length]
            positions += range(shared, length)
            back += range(slot + shared, slot + length)
            gather += range(prefix, prefix + shared)
            gather += range(own, own + length - shared)
            gather += [own if length > shared else prefix] * (width - length)
            # the token at position p predicts the one at p + 1
            if sequence.mask is None:
                first = max(sequence.first_target, 1) - 1
                if first < shared:
                    select += range(prefix + first, prefix + shared)
                select += range(own + max(first - shared, 0), own + length - shared)
                targets += tokens[first + 1 :]
                rows += [i] * (length - first)
            else:
                wanted = [p for p in range(length) if sequence.mask[p + 1]]
                select += [prefix + p if p < shared else own + p - shared for p in wanted]
                targets += [tokens[p + 1] for p in wanted]
                rows += [i] * len(wanted)
        lengths = [len(sequences[i].ids) - 1 for i in members]
        made.append(AttentionView(len(members), width, _tensor(gather, device), lengths))
        num_slots += len(gather)
    return PackedBatch(
        ids_N=_tensor(ids, device),
        positions_N=_tensor(positions, device),
        views=made,
        back_N=_tensor(back, device),
        select_S=_tensor(select, device),
        targets_S=_tensor(targets, device),
        rows_S=_tensor(rows, device),
        order=order,
        num_sequences=len(sequences),
    )


def _tensor(values: list[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def plan_microbatches(
    sequences: SequenceOf[TokenSequence], budget: int, split_groups: bool = True, layout: str = "packed"
) -> list[list[int]]:
    """Returns lists of sequence indices, each of a cost of at most `budget` tokens where one sequence alone does not cost more.

    `layout`: how a batch goes through the model (`nemo_rl.model.policy.Way`), which decides what is computed; see
    `cost_in_tokens`. Sequences of one group stay together as far as the budget allows (always without `split_groups`), so that
    their prompt is computed once; sequences of similar length come together, so that attention pads little. Depends on the
    sequences alone, never on timing.
    """
    groups: dict[object, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(("single", i) if sequence.group is None else sequence.group, []).append(i)
    units: list[list[int]] = []
    for members in groups.values():
        units += _split(members, sequences, budget, layout) if split_groups else [members]
    units.sort(key=lambda unit: max(len(sequences[i].ids) for i in unit))
    plan: list[list[int]] = []
    sizes = _Sizes()
    for unit in units:
        more = _sizes(unit, sequences)
        if not plan or sizes.plus(more).cost(layout) > budget:
            plan.append([])
            sizes = _Sizes()
        plan[-1] += unit
        sizes = sizes.plus(more)
    return plan


def cost_in_tokens(sequences: SequenceOf[TokenSequence], layout: str = "packed") -> int:
    """Returns what is computed for a batch, in tokens that go through all layers: flat tokens, with a share of ATTENTION_SHARE
    for each place in attention that repeats one of a shared prompt ("packed"); every token of every sequence ("apart",
    "alone"); every slot, padding too ("padded")."""
    sizes = _Sizes()
    groups: dict[object, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(("single", i) if sequence.group is None else sequence.group, []).append(i)
    for members in groups.values():
        sizes = sizes.plus(_sizes(members, sequences))
    return sizes.cost(layout)


@dataclass(frozen=True)
class _Sizes:
    """Of some sequences: `flat` tokens with each shared prompt once, tokens of all in `places`, the longest, their number."""

    flat: int = 0
    places: int = 0
    longest: int = 0
    number: int = 0

    def plus(self, other: _Sizes) -> _Sizes:
        longest = max(self.longest, other.longest)
        return _Sizes(self.flat + other.flat, self.places + other.places, longest, self.number + other.number)

    def cost(self, layout: str) -> int:
        if layout == "padded":
            return self.number * self.longest
        if layout == "packed":
            return self.flat + int(ATTENTION_SHARE * (self.places - self.flat))
        return self.places


def _sizes(members: list[int], sequences: SequenceOf[TokenSequence]) -> _Sizes:
    """Returns the sizes of sequences that share a prompt, or of one."""
    lengths = [len(sequences[i].ids) - 1 for i in members]
    shared = sequences[members[0]].shared if sequences[members[0]].group is not None else 0
    return _Sizes(shared + sum(lengths) - shared * len(members), sum(lengths), max(lengths), len(members))


def _split(members: list[int], sequences: SequenceOf[TokenSequence], budget: int, layout: str) -> list[list[int]]:
    """Cuts one group into parts that fit the budget, if it does not fit as a whole."""
    if len(members) == 1 or _sizes(members, sequences).cost(layout) <= budget:
        return [members]
    parts: list[list[int]] = [[]]
    for i in sorted(members, key=lambda i: len(sequences[i].ids)):
        if parts[-1] and _sizes([*parts[-1], i], sequences).cost(layout) > budget:
            parts.append([])
        parts[-1].append(i)
    return parts
