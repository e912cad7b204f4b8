from __future__ import annotations

import copy
import datetime
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.data.prepare import PairExample, PromptExample, TextExample, batches, describe_example, prepare
from nemo_rl.data.rows import PromptRow
from nemo_rl.errors import DatasetError
from nemo_rl.job.spec import DPOSpec, GRPOSpec, SFTSpec, TrainingSpec
from unit.data import rows_of_known_sets as known

MakeTokenizer = Callable[..., Any]
ROWS = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "1+1=", "completion": "2"}]
LONG = {"prompt": "the quick brown fox " * 5, "completion": "jumps over the lazy dog " * 5}


def grpo(**fields: Any) -> GRPOSpec:
    return GRPOSpec(max_new_tokens=8, **fields)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_grpo_examples_are_numbered_and_carry_their_columns(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    rows = copy.deepcopy(ROWS)
    prepared = prepare("grpo", rows, tokenizer, TrainingSpec(), grpo())
    first, second = prepared.examples
    assert isinstance(first, PromptExample)
    assert (first.index, second.index) == (0, 1)
    assert decode(tokenizer, second.ids) == "1+1="
    assert second.row == PromptRow("1+1=", columns={"completion": "2"})
    assert rows == ROWS


def test_sft_examples(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    prepared = prepare("sft", ROWS, tokenizer, TrainingSpec(), SFTSpec())
    assert [decode(tokenizer, e.ids) for e in prepared.examples] == ["2+2=4</s>", "1+1=2</s>"]
    assert [sum(e.mask) for e in prepared.examples] == [2, 2]
    whole = prepare("sft", ROWS, tokenizer, TrainingSpec(), SFTSpec(train_on_prompt=True))
    assert [sum(e.mask) for e in whole.examples] == [len(e.ids) - 1 for e in whole.examples]


def test_dpo_examples_of_helpsteer2(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    prepared = prepare("dpo", known.HELPSTEER2, tokenizer, TrainingSpec(), DPOSpec())
    first, second, _ = prepared.examples
    assert isinstance(first, PairExample)
    assert decode(tokenizer, first.prompt_ids + first.chosen_ids) == "c#\nA language by Microsoft.</s>"
    assert decode(tokenizer, second.prompt_ids) == "Name a colour.\nRed.</s>Another one, please.\n"


def test_openmath_through_a_template_has_no_separator(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["llama"])
    (example, _) = prepare("grpo", known.OPENMATH, tokenizer, TrainingSpec(), grpo()).examples
    assert "What is 2+2?<|eot_id|>" in decode(tokenizer, example.ids)
    assert (
        decode(
            make_tokenizer(), prepare("grpo", known.OPENMATH, make_tokenizer(), TrainingSpec(), grpo()).examples[0].ids
        )
        == "What is 2+2?\n"
    )


def test_section_of_another_algorithm_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match="found algorithm 'grpo' with SFTSpec"):
        prepare("grpo", ROWS, make_tokenizer(), TrainingSpec(), SFTSpec())


# --- over-long rows


def settings_of(algorithm: str) -> Any:
    return {"grpo": grpo(), "sft": SFTSpec(), "dpo": DPOSpec()}[algorithm]


def rows_of(algorithm: str) -> list[dict[str, Any]]:
    rows = [ROWS[0], LONG]
    if algorithm == "dpo":
        return [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no " + r["completion"]} for r in rows]
    return rows


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_overlong_rows_are_dropped_and_counted(make_tokenizer: MakeTokenizer, algorithm: str) -> None:
    training = TrainingSpec(max_sequence_length=20)
    prepared = prepare(algorithm, rows_of(algorithm), make_tokenizer(), training, settings_of(algorithm))
    assert len(prepared.examples) == prepared.report.used == 1
    assert prepared.report.dropped == {"longer than max_sequence_length allows": 1}


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_overlong_rows_may_stop_the_run(make_tokenizer: MakeTokenizer, algorithm: str) -> None:
    training = TrainingSpec(max_sequence_length=20, overlong_rows="error")
    with pytest.raises(
        DatasetError, match=r"found \d+ tokens in usable row 1; expected at most \d+, from max_sequence"
    ):
        prepare(algorithm, rows_of(algorithm), make_tokenizer(), training, settings_of(algorithm))


def test_truncation_cuts_the_beginning_of_a_grpo_prompt_but_keeps_its_bos(make_tokenizer: MakeTokenizer) -> None:
    for adds_bos in (False, True):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        whole = prepare("grpo", [LONG], tokenizer, TrainingSpec(), grpo()).examples[0].ids
        training = TrainingSpec(max_sequence_length=20, overlong_rows="truncate")
        prepared = prepare("grpo", rows_of("grpo"), tokenizer, training, grpo())
        assert prepared.report.truncated == 1
        ids = prepared.examples[1].ids
        assert len(ids) == 20 - 8
        if adds_bos:
            assert ids == [tokenizer.bos_token_id, *whole[-11:]]
        else:
            assert ids == whole[-12:]


def test_truncation_cuts_the_end_of_sft_and_dpo_rows(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    whole = prepare("sft", [LONG], tokenizer, TrainingSpec(), SFTSpec()).examples[0]
    room = whole.mask.index(True) + 3
    training = TrainingSpec(max_sequence_length=room, overlong_rows="truncate")
    cut = prepare("sft", [LONG], tokenizer, training, SFTSpec())
    assert cut.examples == [TextExample(whole.ids[:room], whole.mask[:room])]
    assert cut.report.truncated == 1
    prompt = prepare("dpo", [rows_of("dpo")[1]], tokenizer, TrainingSpec(), DPOSpec()).examples[0]
    training = TrainingSpec(max_sequence_length=len(prompt.prompt_ids) + 2, overlong_rows="truncate")
    pair = prepare("dpo", [rows_of("dpo")[1]], tokenizer, training, DPOSpec()).examples[0]
    assert pair == PairExample(prompt.prompt_ids, prompt.chosen_ids[:2], prompt.rejected_ids[:2], index=0)


def test_row_whose_trained_part_is_cut_off_is_left_out(make_tokenizer: MakeTokenizer) -> None:
    training = TrainingSpec(max_sequence_length=12, overlong_rows="truncate")
    prepared = prepare("sft", rows_of("sft"), make_tokenizer(), training, SFTSpec())
    assert prepared.report.dropped == {"without a trained token within max_sequence_length (an all-zero loss mask)": 1}
    assert prepared.report.truncated == 0
    prepared = prepare("dpo", rows_of("dpo"), make_tokenizer(), training, DPOSpec())
    assert prepared.report.dropped == {"without two different answers within max_sequence_length": 1}


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_nothing_left_is_an_error_with_a_cure(make_tokenizer: MakeTokenizer, algorithm: str) -> None:
    training = TrainingSpec(max_sequence_length=20)
    with pytest.raises(
        DatasetError, match=r"found 1 rows .* raise max_sequence_length, or set overlong_rows to truncate"
    ):
        prepare(algorithm, rows_of(algorithm)[1:], make_tokenizer(), training, settings_of(algorithm))


def test_completion_length_that_leaves_no_room_for_a_prompt_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(DatasetError, match="found max_new_tokens 512 and max_sequence_length 512"):
        prepare("grpo", ROWS, make_tokenizer(), TrainingSpec(max_sequence_length=512), GRPOSpec(max_new_tokens=512))


# --- streams


def test_stream_is_read_until_enough_rows_are_usable(make_tokenizer: MakeTokenizer) -> None:
    read = 0

    def endless() -> Iterator[dict[str, str]]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield ROWS[0] if number % 3 == 0 else {"prompt": "a", "completion": ""}

    prepared = prepare("sft", endless(), make_tokenizer(), TrainingSpec(), SFTSpec(), needed=10)
    assert len(prepared.examples) >= 10
    assert read == prepared.report.found + 1 < 100, "one more row tells that the stream has not ended"
    assert prepared.streamed == prepared.report.found


def test_short_stream_gives_what_it_has(make_tokenizer: MakeTokenizer) -> None:
    prepared = prepare("sft", iter(ROWS), make_tokenizer(), TrainingSpec(), SFTSpec(), needed=10)
    assert len(prepared.examples) == 2


def test_empty_source_is_an_error(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(DatasetError, match="found no rows"):
        prepare("sft", [], make_tokenizer(), TrainingSpec(), SFTSpec())


# --- fingerprint

SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
from conftest import build_tokenizer
from unit.data.test_prepare import awkward_fingerprint
print(awkward_fingerprint(build_tokenizer()))
"""


def awkward_fingerprint(tokenizer: Any) -> str:
    """Fingerprint of a row whose columns have no natural order, or no text that is the same in every process."""
    row = {"prompt": "2+2=", "answer": {"b": 1, "a": {"x", "y", "z"}}, "raw": b"1", "thing": SimpleNamespace()}
    return prepare("grpo", [row], tokenizer, TrainingSpec(), grpo()).fingerprint


def test_fingerprint_is_equal_in_another_process(make_tokenizer: MakeTokenizer) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", SCRIPT, str(here), str(here.parent.parent)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == awkward_fingerprint(make_tokenizer())
    assert len(printed.strip()) == 64


def test_fingerprint_is_of_the_rows_their_columns_and_their_order(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()

    def of(rows: list[dict[str, Any]], algorithm: str = "grpo", settings: Any = None) -> str:
        return prepare(algorithm, rows, tokenizer, TrainingSpec(), settings or grpo()).fingerprint

    today = datetime.date(2026, 1, 1)
    variants = [
        of(ROWS),
        of(ROWS[::-1]),
        of(ROWS[:1]),
        of([{**row, "completion": "9"} for row in ROWS]),
        of([{**row, "day": today} for row in ROWS]),
        of([{**row, "day": today.replace(day=2)} for row in ROWS]),
        of(ROWS, "sft", SFTSpec()),
    ]
    for answer in ({1: "a", "b": 2}, {"1": "a", "b": 2}, {(1, 2): "a"}):
        variants.insert(0, of([{**row, "answer": answer} for row in ROWS]))
    assert len(set(variants)) == len(variants)
    assert of(ROWS, "sft", SFTSpec(train_on_prompt=True)) == variants[-1], "settings are told apart by themselves"
    assert of(copy.deepcopy(ROWS)) == variants[3]


# --- batches


@given(st.integers(0, 200), st.integers(1, 40), st.integers(0, 2**32 - 1), st.booleans(), st.integers(0, 50))
def test_every_row_comes_once_an_epoch(n_rows: int, batch_size: int, seed: int, shuffle: bool, epoch: int) -> None:
    plan = batches(n_rows, batch_size, seed, shuffle, epoch)
    assert sorted(itertools.chain.from_iterable(plan)) == list(range(n_rows))
    assert all(len(batch) == batch_size for batch in plan[:-1])
    assert all(0 < len(batch) <= batch_size for batch in plan)
    assert plan == batches(n_rows, batch_size, seed, shuffle, epoch)
    if not shuffle:
        assert list(itertools.chain.from_iterable(plan)) == list(range(n_rows))


def test_epochs_and_seeds_differ_in_order() -> None:
    plans = [batches(100, 10, seed, True, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(plans, 2))


def test_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="found batch_size 0"):
        batches(4, 0, 1, True, 0)


# --- description


def test_description_marks_what_is_trained(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    prompt, text, pair = (
        prepare(algorithm, rows_of(algorithm), tokenizer, TrainingSpec(), settings_of(algorithm)).examples[0]
        for algorithm in ("grpo", "sft", "dpo")
    )
    assert describe_example(tokenizer, prompt).endswith("2+2=⟦completion⟧")
    assert describe_example(tokenizer, text) == f"example ({len(text.ids)} tokens, 2 trained): 2+2=⟦4</s>⟧"
    assert describe_example(tokenizer, pair).splitlines()[0].endswith("2+2=⟦4</s>⟧")
    assert describe_example(tokenizer, pair).splitlines()[1].endswith("⟦no 4</s>⟧")


def test_description_of_a_long_example_is_short(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    row = {"prompt": "fox " * 500, "completion": "dog " * 500}
    example = prepare("sft", [row], tokenizer, TrainingSpec(max_sequence_length=8000), SFTSpec()).examples[0]
    shown = describe_example(tokenizer, example)
    assert len(shown) < 2000
    assert " … " in shown
