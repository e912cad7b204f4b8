"""The packed layout: each trained token is predicted once, at its place, from exactly the tokens before it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.model.packing import (
    AttentionView,
    PackedBatch,
    TokenSequence,
    cost_in_tokens,
    pack,
    plan_microbatches,
)

exact = settings(deadline=None, derandomize=True, max_examples=80)

tokens = st.integers(0, 50)


@st.composite
def plain_sequences(draw: st.DrawFn) -> list[TokenSequence]:
    """Sequences of at least two tokens with a boundary or a mask, in no group."""
    found = []
    for _ in range(draw(st.integers(1, 9))):
        ids = draw(st.lists(tokens, min_size=2, max_size=14))
        if draw(st.booleans()):
            mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
            found.append(TokenSequence(ids, 1, mask=mask))
        else:
            found.append(TokenSequence(ids, draw(st.integers(0, len(ids)))))
    return found


@st.composite
def grouped_sequences(draw: st.DrawFn, size: int | None = None) -> list[TokenSequence]:
    """Groups of completions of one prompt each, in any order. Equal prompts in different groups happen."""
    found = []
    for group in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(tokens, min_size=1, max_size=8))
        for _ in range(size or draw(st.integers(1, 4))):
            completion = draw(st.lists(tokens, min_size=1, max_size=7))
            ids = prompt + completion
            mask = None
            if not size and draw(st.booleans()):
                mask = [False, *draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))]
            found.append(TokenSequence(ids, len(prompt), mask=mask, group=group, shared=len(prompt)))
    return found if size else draw(st.permutations(found))


any_sequences = st.one_of(
    plain_sequences(), grouped_sequences(), st.tuples(plain_sequences(), grouped_sequences()).map(lambda t: t[0] + t[1])
)


def trained_positions(sequence: TokenSequence) -> list[int]:
    """The definition: positions of the tokens that are trained; the first token has nothing before it."""
    if sequence.mask is not None:
        return [p for p in range(1, len(sequence.ids)) if sequence.mask[p]]
    return list(range(max(sequence.first_target, 1), len(sequence.ids)))


def context_of(batch: PackedBatch, flat: int) -> list[int]:
    """The tokens that attention lets a flat token see, itself included, read from the layout alone."""
    slot = int(batch.back_N[flat])
    for view in batch.views:
        if slot < view.rows * view.length:
            row, column = divmod(slot, view.length)
            assert column < view.lengths[row], "a real token is read back from padding"
            return batch.ids_N[view.gather.view(view.rows, view.length)[row, : column + 1]].tolist()
        slot -= view.rows * view.length
    raise AssertionError("slot outside of all views")


@exact
@given(any_sequences)
def test_every_trained_token_is_selected_once_with_the_right_context(sequences: list[TokenSequence]):
    batch = pack(sequences)
    found: Counter[tuple[int, int]] = Counter()
    for flat, target, row in zip(batch.select_S.tolist(), batch.targets_S.tolist(), batch.rows_S.tolist(), strict=True):
        context = context_of(batch, flat)
        position = len(context)
        assert sequences[row].ids[:position] == context
        assert sequences[row].ids[position] == target
        found[row, position] += 1
    expected = Counter((i, p) for i, sequence in enumerate(sequences) for p in trained_positions(sequence))
    assert found == expected
    assert [sequence.num_targets for sequence in sequences] == [len(trained_positions(s)) for s in sequences]


@exact
@given(any_sequences)
def test_positions_count_from_the_start_of_each_sequence(sequences: list[TokenSequence]):
    batch = pack(sequences)
    for flat, position in enumerate(batch.positions_N.tolist()):
        assert len(context_of(batch, flat)) == position + 1


@exact
@given(any_sequences)
def test_views_hold_each_sequence_once_padded_on_the_right(sequences: list[TokenSequence]):
    batch = pack(sequences)
    rows: list[list[int]] = []
    for view in batch.views:
        slots = view.gather.view(view.rows, view.length)
        rows += [batch.ids_N[slots[r, : view.lengths[r]]].tolist() for r in range(view.rows)]
    assert rows == [sequences[i].ids[:-1] for i in batch.order]
    assert sorted(batch.order) == list(range(len(sequences)))
    slots = torch.cat([view.gather for view in batch.views])
    assert slots[batch.back_N].tolist() == list(range(len(batch.ids_N)))


@exact
@given(any_sequences)
def test_tokens_of_one_sequence_lie_together_in_the_given_order(sequences: list[TokenSequence]):
    batch = pack(sequences)
    expected = [(i, p) for i in batch.order for p in trained_positions(sequences[i])]
    found = [
        (row, len(context_of(batch, flat)))
        for flat, row in zip(batch.select_S.tolist(), batch.rows_S.tolist(), strict=True)
    ]
    assert found == expected


@exact
@given(grouped_sequences())
def test_the_prompt_of_a_group_is_computed_once(sequences: list[TokenSequence]):
    batch = pack(sequences)
    prompts = {s.group: s.shared for s in sequences}
    own = sum(len(s.ids) - 1 - s.shared for s in sequences)
    assert len(batch.ids_N) == sum(prompts.values()) + own


def test_sums_per_sequence_are_in_the_callers_order_and_zero_where_nothing_is_trained():
    sequences = [TokenSequence([1, 2, 3, 4, 5], 2), TokenSequence([6, 7], 2), TokenSequence([8, 9, 1], 1)]
    batch = pack(sequences)
    values = torch.ones(len(batch.targets_S), requires_grad=True)
    sums = batch.per_sequence(values)
    assert sums.tolist() == [3.0, 0.0, 2.0]
    (gradient,) = torch.autograd.grad((sums * torch.tensor([1.0, 10.0, 100.0])).sum(), values)
    assert sorted(gradient.tolist()) == [1.0] * 3 + [100.0] * 2


def test_a_completion_may_be_empty_in_a_group():
    """Its prompt's last token is then only a target, but others of the group still see it."""
    prompt = [3, 4, 5]
    sequences = [TokenSequence(prompt, 3, group=0, shared=3), TokenSequence([*prompt, 6, 7], 3, group=0, shared=3)]
    batch = pack(sequences)
    found = {
        (row, target): context_of(batch, flat)
        for flat, target, row in zip(
            batch.select_S.tolist(), batch.targets_S.tolist(), batch.rows_S.tolist(), strict=True
        )
    }
    assert found == {(1, 6): [3, 4, 5], (1, 7): [3, 4, 5, 6]}


def test_a_view_names_its_rows_and_width():
    (view,) = pack([TokenSequence([1, 2, 3, 4], 1)]).views
    assert isinstance(view, AttentionView)
    assert (view.rows, view.length, view.lengths) == (1, 3, [3])


# ------------------------------------------------------------------ micro-batches


def flat_tokens(sequences: list[TokenSequence], members: list[int]) -> int:
    return len(pack([sequences[i] for i in members]).ids_N)


@exact
@given(any_sequences, st.integers(1, 60))
def test_a_plan_holds_each_sequence_once_and_keeps_the_budget(sequences: list[TokenSequence], budget: int):
    plan = plan_microbatches(sequences, budget)
    assert sorted(i for members in plan for i in members) == list(range(len(sequences)))
    for members in plan:
        assert members
        assert len(members) == 1 or flat_tokens(sequences, members) <= budget


@exact
@given(grouped_sequences(2), st.integers(1, 60))
def test_pairs_are_never_split_and_keep_their_order(sequences: list[TokenSequence], budget: int):
    plan = plan_microbatches(sequences, budget, split_groups=False)
    assert sorted(i for members in plan for i in members) == list(range(len(sequences)))
    for members in plan:
        assert [i // 2 for i in members[::2]] == [i // 2 for i in members[1::2]]
        assert all(i % 2 == 0 for i in members[::2])
        assert len(members) == 2 or flat_tokens(sequences, members) <= budget


@exact
@given(any_sequences, st.integers(1, 60))
def test_a_plan_depends_on_the_sequences_alone(sequences: list[TokenSequence], budget: int):
    assert plan_microbatches(sequences, budget) == plan_microbatches(list(sequences), budget)


@pytest.mark.parametrize("budget", [10_000, 10**9])
def test_all_fits_into_one_microbatch_under_a_large_budget(budget: int):
    sequences = [TokenSequence(list(range(2, 3 + n)), 1) for n in range(1, 30)]
    assert len(plan_microbatches(sequences, budget)) == 1


@exact
@given(any_sequences, st.integers(1, 60), st.sampled_from(["apart", "padded", "alone"]))
def test_the_budget_holds_for_what_the_layout_computes(sequences: list[TokenSequence], budget: int, layout: str):
    for members in plan_microbatches(sequences, budget, layout=layout):
        lengths = [len(sequences[i].ids) - 1 for i in members]
        computed = len(lengths) * max(lengths) if layout == "padded" else sum(lengths)
        assert len(members) == 1 or computed <= budget
        batch = pack([sequences[i] for i in members])
        found = sum(view.rows * view.length for view in batch.views) if layout == "padded" else len(batch.apart.ids_N)
        assert found <= computed


def test_a_shared_prompt_counts_as_often_as_attention_sees_it():
    """Prompt 4000, 16 completions of 200: the flat tokens are 7,200, but attention has 67,000 places."""
    prompt = list(range(4000))
    sequences = [TokenSequence([*prompt, *range(201)], 4000, group=0, shared=4000) for _ in range(16)]
    assert cost_in_tokens(sequences) == 7_200 + 60_000 // 6
    assert cost_in_tokens(sequences, "padded") == 67_200
    assert len(plan_microbatches(sequences, 16_384)) == 2
    assert [len(members) for members in plan_microbatches(sequences, 16_384, layout="padded")] == [3, 3, 3, 3, 3, 1]


@exact
@given(any_sequences)
def test_sequences_apart_are_the_same_batch_without_shared_prompts(sequences: list[TokenSequence]):
    batch = pack(sequences)
    apart = batch.apart
    assert apart.ids_N.tolist() == [token for i in batch.order for token in sequences[i].ids[:-1]]
    assert apart.boundaries.tolist() == [0, *itertools.accumulate(len(sequences[i].ids) - 1 for i in batch.order)]
    assert torch.cat([view.gather for view in apart.views])[apart.back_N].tolist() == list(range(len(apart.ids_N)))
    for flat, other in zip(batch.select_S.tolist(), apart.select_S.tolist(), strict=True):
        assert context_of(batch, flat) == context_of(apart, other)


def test_a_group_that_fits_is_not_cut():
    prompt = list(range(40))
    sequences = [TokenSequence([*prompt, 1, 2], 40, group=g, shared=40) for g in (0, 1) for _ in range(4)]
    plan = plan_microbatches(sequences, 70)
    assert sorted(sorted(members) for members in plan) == [[0, 1, 2, 3], [4, 5, 6, 7]]
