from __future__ import annotations

import copy
import random

import pytest

from nemo_rl.data.formats import to_preference_rows, to_prompt_rows, to_text_rows
from nemo_rl.data.helpsteer import parse_turns
from nemo_rl.data.rows import PreferenceRow, PromptRow, TextRow
from unit.data import rows_of_known_sets as known


def test_helpsteer2_pairs_are_the_most_against_the_least_helpful_response() -> None:
    rows = copy.deepcopy(known.HELPSTEER2)
    pairs, report = to_preference_rows(rows)
    assert pairs == [
        PreferenceRow("c#", "A language by Microsoft.", "I do not know.", separator="\n"),
        PreferenceRow(known.MULTI_TURN_MESSAGES, "Blue.", "Red.", separator="\n"),
        PreferenceRow("Sort a list.", "Use list.sort() or sorted().", "No.", separator="\n"),
    ]
    assert report.format == "HelpSteer2"
    assert report.dropped == {
        "in a tie": 2,
        "with one response only": 1,
        "merged into the pair of their prompt": 4,
    }
    assert report.found == report.used + sum(report.dropped.values())
    assert rows == known.HELPSTEER2


def test_helpsteer2_pairs_do_not_depend_on_the_order_of_rows() -> None:
    expected = {(str(p.prompt), p.chosen, p.rejected) for p in to_preference_rows(known.HELPSTEER2)[0]}
    shuffled = list(known.HELPSTEER2)
    for seed in range(20):
        random.Random(seed).shuffle(shuffled)
        assert {(str(p.prompt), p.chosen, p.rejected) for p in to_preference_rows(shuffled)[0]} == expected


def test_helpsteer2_trains_the_best_response_of_each_prompt() -> None:
    texts, report = to_text_rows(known.HELPSTEER2)
    assert [(t.prompt, t.completion) for t in texts] == [
        ("c#", "A language by Microsoft."),
        (known.MULTI_TURN_MESSAGES, "Blue."),
        ("What is DNA?", "A molecule."),
        ("Sort a list.", "Use list.sort() or sorted()."),
        ("Say hi.", "Hi!"),
    ]
    assert report.dropped == {"not the best response of their prompt": 5}


def test_helpsteer2_prompts_are_unique_and_tell_nothing_of_the_responses() -> None:
    prompts, report = to_prompt_rows([{**row, "source": "web"} for row in known.HELPSTEER2])
    assert [p.prompt for p in prompts] == ["c#", "Another one, please.", "What is DNA?", "Sort a list.", "Say hi."]
    assert prompts[1].messages == known.MULTI_TURN_MESSAGES
    assert all(p.columns == {"source": "web"} for p in prompts)
    assert report.dropped == {"repeating a prompt": 5}


def test_helpsteer2_preference_follows_its_sign_and_drops_ties() -> None:
    pairs, report = to_preference_rows(known.HELPSTEER2_PREFERENCE)
    assert pairs == [
        PreferenceRow("c#", "A language.", "No idea.", separator="\n"),
        PreferenceRow(known.MULTI_TURN_MESSAGES, "Blue.", "Red.", separator="\n"),
    ]
    assert report.dropped == {"in a tie": 1, "of the validation part": 1}


def test_helpsteer2_preference_of_the_validation_part_alone_is_used() -> None:
    pairs, _ = to_preference_rows(known.HELPSTEER2_PREFERENCE[-1:])
    assert [(p.chosen, p.rejected) for p in pairs] == [("No.", "Yes.")]


def test_helpsteer2_preference_serves_the_other_algorithms_too() -> None:
    texts, _ = to_text_rows(known.HELPSTEER2_PREFERENCE)
    assert [t.completion for t in texts] == ["A language.", "Blue."]
    prompts, _ = to_prompt_rows(known.HELPSTEER2_PREFERENCE)
    assert [p.prompt for p in prompts] == ["c#", "Another one, please.", "What is DNA?"]
    assert all(not any("response" in c or "preference_s" in c for c in p.columns) for p in prompts)


def test_openmath_prompt_shows_the_reward_the_answer_but_not_the_solution() -> None:
    prompts, report = to_prompt_rows(known.OPENMATH)
    assert report.format == "OpenMathInstruct-2"
    assert prompts[0] == PromptRow(
        "What is 2+2?",
        columns={
            "problem": "What is 2+2?",
            "expected_answer": "4",
            "problem_source": "augmented_gsm8k",
            "answer": "4",
        },
        separator="\n",
    )


def test_openmath_trains_the_generated_solution() -> None:
    texts, _ = to_text_rows(known.OPENMATH)
    assert texts[1] == TextRow("What is 3*3?", "Three times three is \\boxed{9}.", separator="\n")


@pytest.mark.parametrize(
    ("prompt", "roles", "contents"),
    [
        ("plain", ["user"], ["plain"]),
        (known.MULTI_TURN, ["user", "assistant", "user"], ["Name a colour.", "Red.", "Another one, please."]),
        ("<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi", ["system", "user"], ["Be kind.", "Hi"]),
        ("Hi\n<extra_id_1>Assistant\n", ["user"], ["Hi"]),
        ("Two\n\nlines\n<extra_id_1>User\nmore\nlines\n", ["user", "user"], ["Two\n\nlines", "more\nlines\n"]),
        ("What is <extra_id_1>?", ["user"], ["What is <extra_id_1>?"]),
    ],
)
def test_markers_of_turns_are_parsed(prompt: str, roles: list[str], contents: list[str]) -> None:
    turns = parse_turns(prompt)
    assert [t["role"] for t in turns] == roles
    assert [t["content"] for t in turns] == contents
