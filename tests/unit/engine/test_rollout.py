"""The decode loop: log-probabilities, independence of the batch, end tokens, interruption."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from nemo_rl.model.packing import TokenSequence, pack
from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process import decode, engine
from nemo_rl.rollout.in_process.engine import end_tokens, generate
from nemo_rl.rollout.in_process.generic import CachedState
from nemo_rl.rollout.in_process.packed import PackedState
from nemo_rl.rollout.protocol import Completion, Sampling
from unit.engine import tiny
from unit.engine.tiny import END, plain_logprobs, random_ids

ENDS = [END, *range(9, 90, 9)]
PROMPTS = [random_ids(n, 70 + n) for n in (4, 11, 2, 7, 19, 1)]


def roll_out(model: nn.Module, prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[list[Completion]]:
    options = {"end_ids": ENDS, "seed": 3, "step": 5, **options}
    packed = options.pop("packed", True)
    policy = Policy(model, options.pop("precision", "fp32"))
    if not packed:
        policy.path = "hidden"
    return generate(policy, prompts, sampling, **options)


def ids_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in groups]


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


# ------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("family", "packed"),
    [(family, True) for family in tiny.FAMILIES if family != "dynamic_rope"]
    + [(family, False) for family in ("qwen2", "gpt2", "gemma2", "mistral_window")],
)
def test_log_probabilities_are_those_of_a_teacher_forced_pass(model_of, family: str, packed: bool, temperature: float):
    model = model_of(family)
    groups = roll_out(model, PROMPTS, Sampling(5, 14, temperature), packed=packed)
    worst = 0.0
    with torch.no_grad():
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for completion in group:
                expected = plain_logprobs(model, prompt + completion.ids, temperature)[len(prompt) - 1 :]
                worst = max(worst, (torch.tensor(completion.logprobs) - expected).abs().max().item())
    assert worst <= 1e-5
    lengths = Counter(len(completion.ids) for group in groups for completion in group)
    assert len(lengths) > 1, "completions of many lengths, or dropping of finished rows is not tested"


@pytest.mark.parametrize("packed", [True, False])
def test_the_state_is_the_one_for_the_model(model_of, packed: bool):
    policy = Policy(model_of("qwen2"), "fp32")
    if not packed:
        policy.path = "hidden"
    assert isinstance(engine.make_state(policy), PackedState if packed else CachedState)


@pytest.mark.parametrize("packed", [True, False])
def test_bf16_rollouts_are_close_to_fp32(model_of, packed: bool):
    model = model_of("llama")
    groups = roll_out(model, PROMPTS, Sampling(4, 10), packed=packed, precision="bf16")
    with torch.no_grad():
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for completion in group:
                expected = plain_logprobs(model, prompt + completion.ids)[len(prompt) - 1 :]
                assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=0.5, rtol=0.1)


def test_adapters_take_part_in_rollouts():
    from nemo_rl.job.spec import TrainingSpec
    from nemo_rl.model.load import prepare_model

    model = prepare_model(tiny.make_model("qwen2"), TrainingSpec(lora_rank=2), torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.2
    ((completion,),) = roll_out(model, PROMPTS[:1], Sampling(1, 8))
    with torch.no_grad():
        expected = plain_logprobs(model, PROMPTS[0] + completion.ids)[len(PROMPTS[0]) - 1 :]
        without = plain_logprobs(tiny.make_model("qwen2"), PROMPTS[0] + completion.ids)[len(PROMPTS[0]) - 1 :]
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-5)
    assert not torch.allclose(expected, without, atol=1e-2)


def test_rollouts_follow_the_weights_of_the_moment():
    model = tiny.make_model("qwen2")
    policy = Policy(model, "fp32")
    options = {"end_ids": [END], "seed": 0, "step": 0}
    generate(policy, PROMPTS[:1], Sampling(1, 6), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
    ((completion,),) = generate(policy, PROMPTS[:1], Sampling(1, 6), **options)
    with torch.no_grad():
        expected = plain_logprobs(model, PROMPTS[0] + completion.ids)[len(PROMPTS[0]) - 1 :]
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-5)


# ------------------------------------------------------------------ independence of the batch

WAYS = [("qwen2", True), ("gemma2", True), ("gpt2", False), ("gemma2", False)]


@pytest.mark.parametrize(("family", "packed"), WAYS)
@pytest.mark.parametrize("rows", [1, 4, 9, 13])
def test_chunks_of_the_cache_never_change_completions(model_of, monkeypatch, family: str, packed: bool, rows: int):
    sampling = Sampling(4, 16)
    expected = ids_of(roll_out(model_of(family), PROMPTS, sampling, packed=packed))
    policy = Policy(model_of(family), "fp32")
    policy.path = policy.path if packed else "hidden"
    row = engine.make_state(policy).bytes_per_row(max(map(len, PROMPTS)) + 16)
    monkeypatch.setattr(decode, "CACHE_BYTES_CPU", rows * row)
    begun = []
    start = decode._Chunk._start
    monkeypatch.setattr(decode._Chunk, "_start", lambda self, new, *args: (begun.append(new), start(self, new, *args)))
    assert ids_of(generate(policy, PROMPTS, sampling, end_ids=ENDS, seed=3, step=5)) == expected
    at_once = max(1, rows // 4)
    assert begun[0] == at_once
    assert sum(begun) == 6
    if not packed:
        assert begun == [at_once] * (6 // at_once)


def test_prompts_take_the_rows_of_those_that_have_ended(model_of, monkeypatch):
    """Many more prompts than rows, of many lengths: fewer passes than one batch of rows after the other would take, and the
    same completions, whenever rows are filled again."""
    prompts, sampling = [random_ids(1 + (5 * i) % 23, 900 + i) for i in range(24)], Sampling(2, 40)
    expected = roll_out(model_of("qwen2"), prompts, sampling)
    policy = Policy(model_of("qwen2"), "fp32")
    row = engine.make_state(policy).bytes_per_row(max(map(len, prompts)) + 40)
    steps = [0]
    step = PackedState.step
    monkeypatch.setattr(PackedState, "step", lambda *args: (steps.__setitem__(0, steps[0] + 1), step(*args))[1])
    monkeypatch.setattr(decode, "CACHE_BYTES_CPU", 8 * row)
    taken = {}
    for share in (decode.COMPACT_SHARE, 0.5, 2.0):  # with the last one rows wait for each other
        monkeypatch.setattr(decode, "COMPACT_SHARE", share)
        steps[0] = 0
        found = generate(policy, prompts, sampling, end_ids=ENDS, seed=3, step=5)
        taken[share] = steps[0]
        assert ids_of(found) == ids_of(expected)
        for a, b in zip(flat(found), flat(expected), strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
            assert a.finished == b.finished
    assert taken[0.06] < 0.75 * taken[2.0]


@pytest.mark.parametrize("share", [0.06, 2.0])
def test_stop_texts_end_rows_that_were_filled_again(model_of, monkeypatch, share: float):
    class Digits:
        texts, tokens, window = ("1 2",), [], 3

        def reached(self, rows: list[list[int]]) -> list[bool]:
            return [len(row) > 1 and row[-1] % 3 == row[-2] % 3 == 0 for row in rows]

    prompts, sampling = [random_ids(1 + i, 700 + i) for i in range(9)], Sampling(2, 30, stops=Digits())
    expected = roll_out(model_of("qwen2"), prompts, sampling)
    for completion in flat(expected):
        pairs = [a % 3 == b % 3 == 0 for a, b in itertools.pairwise(completion.ids)]
        assert not any(pairs[:-1])
    policy = Policy(model_of("qwen2"), "fp32")
    row = engine.make_state(policy).bytes_per_row(max(map(len, prompts)) + 30)
    monkeypatch.setattr(decode, "CACHE_BYTES_CPU", 4 * row)
    monkeypatch.setattr(decode, "COMPACT_SHARE", share)
    found = generate(policy, prompts, sampling, end_ids=ENDS, seed=3, step=5)
    assert ids_of(found) == ids_of(expected)
    assert [c.finished for c in flat(found)] == [c.finished for c in flat(expected)]


@pytest.mark.parametrize(("family", "packed"), WAYS)
def test_a_completion_does_not_depend_on_its_neighbours(model_of, family: str, packed: bool):
    sampling = Sampling(4, 16)
    together = ids_of(roll_out(model_of(family), PROMPTS, sampling, packed=packed))
    for i, prompt in enumerate(PROMPTS):
        assert ids_of(roll_out(model_of(family), [prompt], sampling, packed=packed, keys=[i])) == [together[i]]
    order = [3, 5, 0, 1, 4, 2]
    shuffled = ids_of(roll_out(model_of(family), [PROMPTS[i] for i in order], sampling, packed=packed, keys=order))
    assert shuffled == [together[i] for i in order]


def test_the_first_samples_do_not_depend_on_how_many_follow(model_of):
    few = ids_of(roll_out(model_of("qwen2"), PROMPTS, Sampling(2, 12)))
    many = ids_of(roll_out(model_of("qwen2"), PROMPTS, Sampling(7, 12)))
    assert [group[:2] for group in many] == few


@pytest.mark.parametrize("share", [1e-9, 0.3, 2.0])
@pytest.mark.parametrize(("family", "packed"), WAYS)
def test_when_finished_rows_are_dropped_never_changes_completions(
    model_of, monkeypatch, family: str, packed: bool, share: float
):
    sampling = Sampling(6, 20)
    expected = roll_out(model_of(family), PROMPTS, sampling, packed=packed)
    monkeypatch.setattr(decode, "COMPACT_SHARE", share)
    found = roll_out(model_of(family), PROMPTS, sampling, packed=packed)
    assert ids_of(found) == ids_of(expected)
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert a.finished == b.finished


def test_seed_and_step_change_the_completions_and_equal_ones_repeat_them(model_of):
    model, sampling = model_of("qwen2"), Sampling(3, 10)
    first = ids_of(roll_out(model, PROMPTS, sampling))
    assert ids_of(roll_out(model, PROMPTS, sampling)) == first
    assert ids_of(roll_out(model, PROMPTS, sampling, seed=4)) != first
    assert ids_of(roll_out(model, PROMPTS, sampling, step=6)) != first
    assert len({tuple(ids) for ids in first[0]}) == 3


def test_our_cache_and_the_models_own_draw_the_same_tokens(model_of):
    for family in ("qwen2", "gpt2", "gemma2"):
        sampling = Sampling(4, 16, 0.8)
        packed = ids_of(roll_out(model_of(family), PROMPTS, sampling))
        assert ids_of(roll_out(model_of(family), PROMPTS, sampling, packed=False)) == packed


# ------------------------------------------------------------------ ends


def test_any_of_several_end_tokens_ends_a_completion_and_is_kept(model_of):
    ends = [END, 9, 10, 40, 41]
    groups = roll_out(model_of("qwen2"), PROMPTS, Sampling(16, 30), end_ids=ends)
    seen = set()
    for completion in flat(groups):
        assert len(completion.ids) == len(completion.logprobs)
        assert not set(completion.ids[:-1]) & set(ends)
        if completion.finished:
            assert completion.ids[-1] in ends
            seen.add(completion.ids[-1])
        else:
            assert len(completion.ids) == 30
            assert completion.ids[-1] not in ends
    assert len(seen) > 2


def test_an_end_token_as_the_last_allowed_token_still_finishes(model_of):
    every = list(range(tiny.VOCABULARY))
    for completion in flat(roll_out(model_of("qwen2"), PROMPTS, Sampling(2, 1), end_ids=every)):
        assert completion.finished
        assert len(completion.ids) == 1
    for completion in flat(roll_out(model_of("qwen2"), PROMPTS, Sampling(2, 1), end_ids=[10**6])):
        assert not completion.finished


class Named:
    def __init__(self, eos_token_id: Any) -> None:
        self.eos_token_id = eos_token_id


def test_end_tokens_are_collected_from_generation_config_config_and_tokenizer():
    model = tiny.make_model("qwen2")
    model.generation_config.eos_token_id = [7, 5]
    assert end_tokens(model, Named(11)) == [7, 5, END, 11]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, Named(None)) == [END]


def test_a_model_without_any_end_token_is_refused_with_the_cure():
    model = tiny.make_model("qwen2")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*expected at least one.*eos_token"):
        end_tokens(model, Named(None))


# ------------------------------------------------------------------ greedy, filters


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "gemma2"])
def test_greedy_is_transformers_generate_without_sampling(model_of, family: str):
    from transformers import GenerationConfig

    model = model_of(family)
    groups = roll_out(model, PROMPTS, Sampling(1, 12, greedy=True))
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=ENDS, pad_token_id=0)
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        out = model.generate(torch.tensor([prompt]), generation_config=config)
        assert completion.ids == out[0, len(prompt) :].tolist()


def test_filters_leave_only_their_tokens_to_draw(model_of):
    model = model_of("qwen2")
    with torch.no_grad():
        for sampling in (Sampling(8, 6, top_k=3), Sampling(8, 6, top_p=0.4), Sampling(8, 6, 1.5, 5, 0.6)):
            for prompt, group in zip(PROMPTS[:3], roll_out(model, PROMPTS[:3], sampling), strict=True):
                for completion in group:
                    ids = prompt + completion.ids
                    logits = model(torch.tensor([ids])).logits[0].float() / sampling.temperature
                    for position in range(len(prompt), len(ids)):
                        assert ids[position] in allowed(logits[position - 1], sampling)


def allowed(logits: torch.Tensor, sampling: Sampling) -> set[int]:
    order = logits.argsort(descending=True)[: sampling.top_k or None]
    probabilities = logits[order].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return set(order[before < sampling.top_p + 1e-5].tolist())


# ------------------------------------------------------------------ calls back


@pytest.mark.parametrize(("family", "packed"), WAYS)
def test_each_group_is_reported_once_as_it_is_returned(model_of, family: str, packed: bool):
    reported: list[tuple[int, list[Completion]]] = []
    groups = roll_out(
        model_of(family), PROMPTS, Sampling(4, 16), packed=packed, on_group=lambda i, group: reported.append((i, group))
    )
    assert sorted(i for i, _ in reported) == list(range(len(PROMPTS)))
    for i, group in reported:
        assert group == groups[i]


def test_a_group_is_reported_while_others_are_still_decoded(model_of):
    polls, at = [0], {}

    def poll() -> None:
        polls[0] += 1

    groups = roll_out(
        model_of("qwen2"), PROMPTS, Sampling(1, 64), poll=poll, on_group=lambda i, _: at.__setitem__(i, polls[0])
    )
    lengths = [len(group[0].ids) for group in groups]
    assert min(lengths) < 16 < max(lengths)
    assert at[lengths.index(min(lengths))] < at[lengths.index(max(lengths))]


def test_the_tokens_that_are_told_are_those_that_are_returned(model_of):
    told: list[int] = []
    groups = roll_out(
        model_of("qwen2"), PROMPTS, Sampling(4, 32), on_tokens=lambda tokens, live: told.append(min(live, len(tokens)))
    )
    assert sum(told) == sum(len(completion.ids) for group in groups for completion in group)
    assert len(set(told)) > 1  # some rows end before others


class Stop(Exception):
    pass


@pytest.mark.parametrize(("family", "packed"), [("qwen2", True), ("gpt2", False)])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_poll_that_raises_ends_the_rollout_and_leaves_nothing_behind(family: str, packed: bool, last: int):
    model = tiny.make_model(family)
    policy = Policy(model, "fp32")
    policy.path = policy.path if packed else "hidden"
    options = {"end_ids": [10**6], "seed": 3, "step": 5}
    calls = [0]

    def poll() -> None:
        calls[0] += 1
        if calls[0] == last:
            raise Stop

    with pytest.raises(Stop):
        generate(policy, PROMPTS, Sampling(3, 40), poll=poll, **options)
    assert not torch.is_inference_mode_enabled()
    # training goes on, and the next rollout is that of a policy that was never interrupted
    policy.logprobs(pack([TokenSequence(random_ids(9, 1), 1)])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    fresh = Policy(tiny.make_model(family), "fp32")
    fresh.path = fresh.path if packed else "hidden"
    found, expected = (generate(p, PROMPTS, Sampling(3, 40), **options) for p in (policy, fresh))
    assert found == expected


def test_the_stop_flag_is_looked_at_every_few_tokens(model_of):
    calls = [0]
    roll_out(
        model_of("qwen2"),
        PROMPTS[:2],
        Sampling(1, 65),
        end_ids=[10**6],
        poll=lambda: calls.__setitem__(0, calls[0] + 1),
    )
    assert calls[0] >= 65 // decode.POLL_EVERY


def test_training_works_after_rollouts_that_saw_the_first_positions(model_of):
    """Whatever a rollout caches must serve a backward pass, or stay out of its way."""
    for family in ("qwen2", "gemma2", "dynamic_rope"):
        model = tiny.make_model(family)
        # a rotary embedding that follows the length is refused for longer sequences, but keeps tables all the same
        policy = Policy(model, "fp32", longest=16 if family == "dynamic_rope" else None)
        generate(policy, [random_ids(30, 1)], Sampling(2, 20), end_ids=[END], seed=0, step=0)
        policy.logprobs(pack([TokenSequence(random_ids(40, 2), 1)])).sum().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
