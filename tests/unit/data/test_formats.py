from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.data.formats import to_preference_rows, to_prompt_rows, to_text_rows
from nemo_rl.data.rows import PreferenceRow, PromptRow, TextRow
from nemo_rl.data.shapes import ACCEPTED
from nemo_rl.errors import DatasetError

CONVERT = {"grpo": to_prompt_rows, "sft": to_text_rows, "dpo": to_preference_rows}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("algorithm", "name", "example"),
    [(algorithm, name, example) for algorithm, shapes in ACCEPTED.items() for name, example in shapes],
)
def test_every_shape_that_the_error_advertises_is_accepted(algorithm: str, name: str, example: str) -> None:
    row = json.loads(example)
    rows = [row]
    if algorithm == "dpo" and "helpfulness" in row:
        rows = [row, {**row, "response": "No.", "helpfulness": 0}]
    before = copy.deepcopy(rows)
    converted, report = CONVERT[algorithm](rows)
    assert len(converted) == report.used == 1
    assert rows == before


# --- GRPO


def test_prompt_keeps_the_other_columns_for_the_reward() -> None:
    rows, report = to_prompt_rows([{"prompt": "2+2=", "answer": "4", "level": 1}, {"prompt": "1+1=", "answer": "2"}])
    assert rows == [
        PromptRow("2+2=", columns={"answer": "4", "level": 1}),
        PromptRow("1+1=", columns={"answer": "2", "level": None}),
    ]
    assert report.format == "prompt"


def test_completion_of_a_prompt_is_a_column_of_the_reward() -> None:
    (row,), _ = to_prompt_rows([{"prompt": "2+2=", "completion": "4"}])
    assert row == PromptRow("2+2=", columns={"completion": "4"})


def test_prompt_given_as_messages_is_named_by_its_last_user_turn() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("2+2?")]
    (row,), _ = to_prompt_rows([{"prompt": messages, "answer": "4"}])
    assert row == PromptRow("2+2?", messages, {"answer": "4"})


def test_final_assistant_turn_of_a_conversation_never_reaches_the_prompt() -> None:
    (row,), _ = to_prompt_rows([{"messages": [user("2+2?"), assistant("4")], "id": 7}])
    assert row == PromptRow("2+2?", [user("2+2?")], {"id": 7, "completion": "4"})


def test_conversation_without_answers_offers_no_completion_column() -> None:
    (row,), _ = to_prompt_rows([{"messages": [user("2+2?")], "answer": "4"}])
    assert row.columns == {"answer": "4"}


def test_question_keeps_its_answer_and_its_own_column() -> None:
    (row,), report = to_prompt_rows([{"question": "2+2?", "answer": "#### 4"}])
    assert row == PromptRow("2+2?", columns={"question": "2+2?", "answer": "#### 4"})
    assert report.format == "question"


def test_reference_named_response_is_renamed_for_the_models_response_takes_that_name() -> None:
    (row,), _ = to_prompt_rows([{"prompt": "2+2?", "response": "4"}])
    assert row.columns == {"completion": "4"}


def test_prompt_of_an_implicit_preference_is_what_the_conversations_share() -> None:
    pair = {"chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]}
    (row,), _ = to_prompt_rows([pair])
    assert (row.prompt, row.messages) == ("2+2?", [user("2+2?")])


# --- SFT


def test_explicit_messages_come_before_other_columns() -> None:
    messages = [user("Hi"), assistant("Hello")]
    (row,), report = to_text_rows([{"messages": messages, "prompt": "Hi", "completion": "other", "text": "third"}])
    assert (row, report.format) == (TextRow(messages=messages), "messages")


def test_sharegpt_conversations_become_messages() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (row,), _ = to_text_rows([{"conversations": turns}])
    assert row.messages == [{"role": "system", "content": "s"}, user("q"), assistant("a")]


def test_text_parts_are_joined_and_null_fields_left_out() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}], "name": None}
    (row,), _ = to_text_rows([{"messages": [parts, assistant("4")]}])
    assert row.messages == [user("2+2?"), assistant("4")]


def test_instruction_and_input_are_joined_by_a_blank_line() -> None:
    rows, _ = to_text_rows(
        [
            {"instruction": "Translate.", "input": "Hallo", "output": "Hello"},
            {"instruction": "Greet.", "input": "", "output": "Hi"},
        ]
    )
    assert rows == [TextRow("Translate.\n\nHallo", "Hello"), TextRow("Greet.", "Hi")]


@pytest.mark.parametrize("question", ["question", "problem", "instruction", "input", "prompt"])
@pytest.mark.parametrize("answer", ["answer", "solution", "output", "response"])
def test_every_name_of_question_and_answer_is_known(question: str, answer: str) -> None:
    (row,), _ = to_text_rows([{question: "2+2?", answer: "4"}])
    assert row == TextRow("2+2?", "4")


def test_columns_that_are_null_everywhere_do_not_decide_the_shape() -> None:
    (row,), report = to_text_rows([{"messages": None, "prompt": "2+2=", "completion": "4"}])
    assert (row, report.format) == (TextRow("2+2=", "4"), "prompt + completion")


def test_rows_without_an_answer_are_left_out_and_counted() -> None:
    rows, report = to_text_rows(
        [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": " "}, {"prompt": None, "completion": "d"}]
    )
    assert rows == [TextRow("a", "b")]
    assert (report.found, report.used) == (3, 1)
    assert report.dropped == {"without a completion": 1, "without a prompt": 1}
    assert str(report) == (
        "1 of 3 rows used (prompt + completion); left out: 1 without a completion, 1 without a prompt"
    )


def test_conversations_without_an_assistant_turn_are_left_out_and_counted() -> None:
    rows, report = to_text_rows([{"messages": [user("a"), assistant("b")]}, {"messages": [user("c")]}])
    assert (len(rows), report.dropped) == (1, {"without an assistant turn": 1})


def test_chosen_answer_is_trained_where_the_set_has_preferences() -> None:
    (row,), _ = to_text_rows([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}])
    assert row == TextRow("2+2=", "4")
    (row,), _ = to_text_rows([{"chosen": "Human: hi Bot: yes", "rejected": "Human: hi Bot: no"}])
    assert row == TextRow(text="Human: hi Bot: yes")


# --- DPO


def test_explicit_prompt_with_two_answers() -> None:
    (row,), _ = to_preference_rows([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}])
    assert row == PreferenceRow("2+2=", "4", "5")


def test_conversations_that_repeat_an_explicit_prompt_are_not_given_it_twice() -> None:
    row = {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]}
    (pair,), _ = to_preference_rows([row])
    assert pair == PreferenceRow([user("2+2?")], [assistant("4")], [assistant("5")])


@pytest.mark.parametrize("prompt", ["2+2?", [user("2+2?")]])
def test_explicit_prompt_precedes_answers_given_as_messages(prompt: Any) -> None:
    (pair,), _ = to_preference_rows([{"prompt": prompt, "chosen": [assistant("4")], "rejected": [assistant("5")]}])
    assert pair == PreferenceRow([user("2+2?")], [assistant("4")], [assistant("5")])


def test_implicit_prompt_of_conversations_is_their_shared_beginning() -> None:
    shared = [user("Hi"), assistant("Hello"), user("2+2?")]
    row = {"chosen": [*shared, assistant("4")], "rejected": [*shared, assistant("5")]}
    (pair,), _ = to_preference_rows([row])
    assert pair == PreferenceRow(shared, [assistant("4")], [assistant("5")])


def test_implicit_prompt_of_strings_ends_before_a_word() -> None:
    row = {"chosen": "\n\nHuman: hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: hi\n\nAssistant: Help!"}
    (pair,), _ = to_preference_rows([row])
    assert pair == PreferenceRow("\n\nHuman: hi\n\nAssistant:", " Hello!", " Help!", templated=False)


def test_ties_and_answers_of_several_turns_are_left_out_and_counted() -> None:
    rows, report = to_preference_rows(
        [
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
            {"chosen": [user("q"), assistant("a"), user("r"), assistant("s")], "rejected": [user("q"), assistant("b")]},
            {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        ]
    )
    assert len(rows) == 1
    assert report.dropped == {
        "in a tie (chosen equals rejected)": 1,
        "whose answers are not one assistant turn each": 1,
        "without a beginning that both answers share": 1,
    }


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.text("xyz ", max_size=6), st.text("xyz ", max_size=6)), min_size=1)
)
def test_every_row_is_used_or_counted(triples: list[tuple[str, str, str]]) -> None:
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in triples]
    try:
        pairs, report = to_preference_rows(rows)
    except DatasetError:
        assert all(not c.strip() or not r.strip() or c == r for _, c, r in triples)
        return
    assert report.found == len(rows) == report.used + sum(report.dropped.values())
    assert all(pair.chosen != pair.rejected for pair in pairs)


# --- errors


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_unknown_columns_are_listed_beside_the_accepted_shapes(algorithm: str) -> None:
    with pytest.raises(DatasetError) as raised:
        CONVERT[algorithm]([{"foo": 1, "bar": "x"}])
    message = str(raised.value)
    assert message.startswith(f"found the columns 'foo', 'bar'; expected, for {algorithm}, one of these shapes")
    assert all(example in message for _, example in ACCEPTED[algorithm])


@pytest.mark.parametrize(
    ("algorithm", "row"), [("sft", {"prompt": "2+2="}), ("grpo", {"text": "Once"}), ("dpo", {"prompt": "a"})]
)
def test_shape_that_lacks_what_the_algorithm_trains_on_is_refused(algorithm: str, row: dict[str, str]) -> None:
    with pytest.raises(DatasetError, match="expected, for"):
        CONVERT[algorithm]([row])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"prompt": "a", "completion": 4}],
            r"found int \(4\) in column 'completion' of row 0; expected text or a list",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}],
            "column 'prompt' mixes types: text in row 0, a list of messages in row 1; expected one kind",
        ),
        (
            [{"messages": "hello"}],
            "found text .* in column 'messages' of row 0|found str .* expected a list of messages",
        ),
        (
            [{"messages": ["hello"]}],
            r"found str \('hello'\) as message 0 in column 'messages' of row 0; expected a mapping",
        ),
        ([{"messages": [{"content": "hello"}]}], "found no role in message 0 in column 'messages' of row 0"),
        ([{"messages": [{"from": "martian", "value": "x"}]}], "found from='martian' in message 0"),
        ([{"messages": [{"role": "user", "content": 5}]}], "found int as the content of message 0"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "found image in the content of message 0"),
        (
            [{"prompt": "a", "completion": " "}, {"prompt": " ", "completion": "b"}],
            "2 rows of the shape .* but none that",
        ),
        (
            [{"messages": [{"role": "user", "content": "x"}]}],
            "none that can be trained on .1 without an assistant turn.",
        ),
    ],
)
def test_unusable_cells_are_named_with_row_and_column(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        to_text_rows(rows)


def test_answers_of_different_kinds_are_refused() -> None:
    with pytest.raises(DatasetError, match="found text as chosen and messages as rejected in row 0"):
        to_preference_rows([{"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}])
