"""Nothing of a row is dropped in silence: what templates write, hide or refuse, and what the report says of the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nemo_rl.data.prepare import describe_example, prepare
from nemo_rl.errors import DatasetError
from nemo_rl.job.spec import DPOSpec, GRPOSpec, SFTSpec, TrainingSpec

MakeTokenizer = Callable[..., Any]
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}",
)
# What the templates of published models ask for: text (DeepSeek), a flat mapping (Hermes), either (Qwen).
ARGUMENTS_AS_TEXT = CALLS.replace(
    "{{ c['function'] | tojson }}", "{{ c['function']['name'] + ' ' + c['function']['arguments'] }}"
)
FLAT_CALLS = CALLS.replace("{{ c['function'] | tojson }}", "{{ c.name + ' ' + (c.arguments | tojson) }}")
SETTINGS: dict[str, Any] = {"grpo": GRPOSpec(max_new_tokens=8), "sft": SFTSpec(), "dpo": DPOSpec()}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return assistant(None, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


def look(tokenizer: Any, rows: Any, algorithm: str = "sft", **training: Any) -> tuple[list[str], str]:
    """The examples as the model sees them, the trained parts in brackets, and the report."""
    found = prepare(algorithm, rows, tokenizer, TrainingSpec(**training), SETTINGS[algorithm])
    return [describe_example(tokenizer, e).partition(": ")[2] for e in found.examples], str(found.report)


# --- conversations in other notations


@pytest.mark.parametrize("write", [json.dumps, repr, lambda m: np.array(m, dtype=object), list])
def test_conversation_is_read_from_every_form_that_a_cell_takes(
    make_tokenizer: MakeTokenizer, write: Callable[[Any], Any]
) -> None:
    messages = [user("2+2?"), assistant("it's 4")]
    for row in ({"messages": write(messages)}, {"prompt": write(messages[:1]), "completion": write(messages[1:])}):
        (shown,), _ = look(make_tokenizer(CHATML), [row])
        assert shown == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦it's 4<|im_end|>⟧"


def test_single_message_is_a_conversation(make_tokenizer: MakeTokenizer) -> None:
    (shown,), _ = look(make_tokenizer(CHATML), [{"prompt": user("2+2?"), "completion": "4"}])
    assert shown.startswith("<|im_start|>user\n2+2?<|im_end|>")


def test_text_that_only_begins_like_a_conversation_is_refused_with_the_cure(make_tokenizer: MakeTokenizer) -> None:
    broken = "[{'role': 'user', 'content': 'hi'} {'role': 'assistant', 'content': 'yo'}]"  # as numpy prints it
    with pytest.raises(DatasetError, match=r"found text that begins like a conversation .* json\.dumps"):
        look(make_tokenizer(CHATML), [{"prompt": broken, "completion": "4"}])


@pytest.mark.parametrize("text", ['{"answer": 4}', "[1, 2]", "[user] hi", '{"role": "king"} is JSON'])
def test_text_that_is_no_conversation_stays_text(make_tokenizer: MakeTokenizer, text: str) -> None:
    (shown,), _ = look(make_tokenizer(CHATML), [{"prompt": text, "completion": "4"}])
    assert f"user\n{text}<|im_end|>" in shown


def test_row_of_which_pandas_wrote_nan_is_left_out_and_counted(make_tokenizer: MakeTokenizer) -> None:
    rows = [{"prompt": "a", "completion": math.nan}, {"prompt": "b", "completion": "c"}]
    shown, report = look(make_tokenizer(CHATML), rows)
    assert len(shown) == 1
    assert "1 without a completion" in report


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_list_of_texts_is_refused_in_words(make_tokenizer: MakeTokenizer, algorithm: str) -> None:
    with pytest.raises(DatasetError, match=r"found str .* expected a mapping|expected a mapping of column to value"):
        look(make_tokenizer(CHATML), ["one", "two"], algorithm)


# --- columns around the prompt


@pytest.mark.parametrize(
    "row",
    [
        {"system": "PIRATE", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "arr"}]},
        {"system_prompt": "PIRATE", "question": "hi", "response": "arr"},
        {"system": "PIRATE", "prompt": "hi", "completion": "arr"},
        {"system": "PIRATE", "prompt": [user("hi")], "completion": [assistant("arr")]},
        {"system": "PIRATE", "instruction": "hi", "output": "arr", "history": []},
    ],
)
def test_system_column_becomes_the_system_turn(make_tokenizer: MakeTokenizer, row: dict[str, Any]) -> None:
    (shown,), _ = look(make_tokenizer(CHATML), [row])
    assert shown.startswith("<|im_start|>system\nPIRATE<|im_end|>\n<|im_start|>user\nhi<|im_end|>")
    assert shown.endswith("⟦arr<|im_end|>⟧")


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_system_column_counts_for_every_algorithm(make_tokenizer: MakeTokenizer, algorithm: str) -> None:
    row = {"system": "PIRATE", "prompt": "hi", "chosen": "arr", "rejected": "hm"}
    (shown,), _ = look(make_tokenizer(CHATML), [row], algorithm)
    assert "<|im_start|>system\nPIRATE<|im_end|>\n<|im_start|>user\nhi<|im_end|>" in shown


def test_two_different_system_prompts_are_refused(make_tokenizer: MakeTokenizer) -> None:
    messages = [{"role": "system", "content": "NINJA"}, user("hi"), assistant("arr")]
    with pytest.raises(DatasetError, match=r"found a system turn .* another text in the system column"):
        look(make_tokenizer(CHATML), [{"system": "PIRATE", "messages": messages}])
    (shown,), _ = look(make_tokenizer(CHATML), [{"system": "NINJA", "messages": messages}])
    assert shown.count("NINJA") == 1


def test_history_comes_before_the_instruction_untrained(make_tokenizer: MakeTokenizer) -> None:
    row = {"instruction": "and 3?", "input": "", "output": "5", "history": [["2+2?", "4"]]}
    (shown,), _ = look(make_tokenizer(CHATML), [row])
    assert "user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nand 3?" in shown
    assert shown.count("⟦") == 1


@pytest.mark.parametrize("write", [list, json.dumps])
@pytest.mark.parametrize("algorithm", ["sft", "grpo", "dpo"])
def test_tools_reach_the_template(make_tokenizer: MakeTokenizer, algorithm: str, write: Callable[[Any], Any]) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"x": {"type": "int", "enum": None}}}}]
    row = {"prompt": "hi", "completion": "a", "chosen": "a", "rejected": "b", "tools": write(tools)}
    (shown,), _ = look(make_tokenizer(CHATML), [row], algorithm)
    assert '"name": "weather"' in shown
    assert "null" not in shown or write is json.dumps


def test_tools_that_the_template_leaves_out_are_refused(make_tokenizer: MakeTokenizer) -> None:
    template = CHATML.partition("{% endif %}")[2]
    with pytest.raises(DatasetError, match="leaves out or rewrites the tool 'weather'"):
        look(
            make_tokenizer(template), [{"prompt": "a", "completion": "b", "tools": [{"function": {"name": "weather"}}]}]
        )


def test_tools_that_are_something_else_are_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(DatasetError, match=r"found 'hammer, saw' as tools of row 0; expected a list .* rename"):
        look(make_tokenizer(CHATML), [{"prompt": "a", "completion": "b", "tools": "hammer, saw"}])


def test_arguments_of_a_row_reach_the_template_before_those_of_the_run(make_tokenizer: MakeTokenizer) -> None:
    template = CHATML + "{% if add_generation_prompt and quiet %}(quiet {{ quiet }}){% endif %}"
    rows = [{"prompt": "a"}, {"prompt": "b", "chat_template_kwargs": {"quiet": "row"}}]
    shown, _ = look(make_tokenizer(template), rows, "grpo", chat_template_kwargs={"quiet": "run"})
    assert ["(quiet run)" in shown[0], "(quiet row)" in shown[1]] == [True, True]


def test_columns_that_nothing_reads_are_named(make_tokenizer: MakeTokenizer) -> None:
    row = {"prompt": "a", "completion": "b", "source": "web", "score": 4, "nothing": None}
    assert look(make_tokenizer(CHATML), [row])[1].endswith("columns not used: source, score")
    assert "not used" not in look(make_tokenizer(CHATML), [row], "grpo")[1], "a reward may read them"


# --- turns


def test_turns_of_weight_0_are_not_trained(make_tokenizer: MakeTokenizer) -> None:
    messages = [user("a"), assistant("bad", weight=0), user("b"), assistant("good", weight=1)]
    (shown,), _ = look(make_tokenizer(CHATML), [{"messages": messages}])
    assert "assistant\nbad<|im_end|>" in shown
    assert shown.endswith("⟦good<|im_end|>⟧")
    assert shown.count("⟦") == 1
    with pytest.raises(DatasetError, match="1 with assistant turns of weight 0 only"):
        look(make_tokenizer(CHATML), [{"messages": messages[:2]}])
    with pytest.raises(DatasetError, match=r"found weight 0\.5 .* expected 0 .* or 1"):
        look(make_tokenizer(CHATML), [{"messages": [user("a"), assistant("b", weight=0.5)]}])


@pytest.mark.parametrize("empty", [None, "", "  \n"])
@pytest.mark.parametrize("place", [1, 3])
def test_empty_answers_are_left_out_and_counted(make_tokenizer: MakeTokenizer, empty: Any, place: int) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    messages[place] = assistant(empty)
    shown, report = look(make_tokenizer(CHATML), [{"messages": messages}, {"messages": [user("a"), assistant("b")]}])
    assert len(shown) == 1
    assert "1 with an empty assistant turn" in report


@pytest.mark.parametrize("values", [(False, True), (0, 1)])
@pytest.mark.parametrize("flag", ["train", "training", "trainable", "loss", "weight"])
def test_flags_of_other_tools_are_weights(make_tokenizer: MakeTokenizer, flag: str, values: tuple[int, int]) -> None:
    messages = [user("a"), {**assistant("b"), flag: values[0]}, user("c"), {**assistant("d"), flag: values[1]}]
    (shown,), report = look(make_tokenizer(CHATML), [{"messages": messages}])
    assert shown.count("⟦") == 1
    assert "⟦d<|im_end|>⟧" in shown
    assert "note" not in report


@pytest.mark.parametrize("names", [("human", "gpt"), ("User", "Assistant"), ("Human", "bot"), ("USER", "model")])
def test_roles_under_other_names_are_the_same_roles(make_tokenizer: MakeTokenizer, names: tuple[str, str]) -> None:
    messages = [{"role": names[0], "content": "a"}, {"role": names[1], "content": "b"}]
    (shown,), _ = look(make_tokenizer(CHATML), [{"messages": messages}])
    assert shown == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧"


def test_arguments_as_python_prints_them_are_a_mapping_and_broken_ones_are_refused(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(CALLS)
    (shown,), _ = look(tokenizer, [{"messages": [user("a"), call("f", "{'x': True}")]}])
    assert '{"x": true}' in shown
    for broken in ("{'x': tru", '{"x": 1', "[1, 2"):
        with pytest.raises(DatasetError, match=r"no JSON .* in message 1 in column 'messages' of row 0.*json.dumps"):
            look(tokenizer, [{"messages": [user("a"), call("f", broken)]}])


@pytest.mark.parametrize(
    "tools", [{"f": {"description": "d"}}, [{"parameters": {}}], [{"function": {"parameters": {}}}]]
)
def test_tools_without_a_name_are_refused(make_tokenizer: MakeTokenizer, tools: Any) -> None:
    with pytest.raises(DatasetError, match=r"a tool without a name .* in tools of row 0"):
        look(make_tokenizer(CHATML), [{"messages": [user("a"), assistant("b")], "tools": tools}])


def test_text_under_a_name_that_nobody_reads_is_refused(make_tokenizer: MakeTokenizer) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "text": "yo"}]
    with pytest.raises(DatasetError, match=r"found no content in message 1 .*text under 'text'.*rename the field"):
        look(make_tokenizer(CHATML), [{"conversations": turns}])


def test_fields_of_messages_that_the_template_does_not_show_are_noted(make_tokenizer: MakeTokenizer) -> None:
    _, report = look(make_tokenizer(CHATML), [{"messages": [{**user("hi"), "name": "Ada"}, assistant("yo")]}])
    assert "note, 1 time: the chat template does not show these fields of messages: name" in report


def test_flags_that_nothing_reads_are_noted(make_tokenizer: MakeTokenizer) -> None:
    _, report = look(make_tokenizer(CHATML), [{"messages": [user("hi"), {**assistant("yo"), "masked": True}]}])
    assert "note, 1 time: the chat template does not show these fields of messages: masked" in report


def test_turn_that_the_template_leaves_out_is_refused_also_if_its_words_stand_elsewhere(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'ipython' %}")
    messages = [user("2+2?"), assistant("run"), {"role": "ipython", "content": "4"}, assistant("4")]
    with pytest.raises(DatasetError, match=r"leaves out or rewrites the text of message 2 \(ipython\), '4'"):
        look(make_tokenizer(template), [{"messages": messages}])


def test_tools_that_the_template_leaves_out_are_refused_also_if_their_names_stand_elsewhere(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = CHATML.partition("{% endif %}")[2]
    row = {"messages": [user("user"), assistant("b")], "tools": [{"type": "function", "function": {"name": "user"}}]}
    with pytest.raises(DatasetError, match=r"leaves out or rewrites the tools"):
        look(make_tokenizer(template), [row])


def test_system_turn_that_the_template_leaves_out_is_refused(make_tokenizer: MakeTokenizer) -> None:
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    messages = [{"role": "system", "content": "Be kind."}, user("hi"), assistant("yo")]
    for row, algorithm in (({"messages": messages}, "sft"), ({"prompt": messages[:2]}, "grpo")):
        with pytest.raises(DatasetError, match=r"leaves out or rewrites the text of message 0 \(system\), 'Be kind\.'"):
            look(make_tokenizer(template), [row], algorithm)


# --- tool calls


@pytest.mark.parametrize("template", [CALLS, ARGUMENTS_AS_TEXT, FLAT_CALLS])
@pytest.mark.parametrize(
    "message",
    [
        call("weather", {"city": "Oslo", "days": None}),
        call("weather", '{"city": "Oslo"}'),
        assistant(None, tool_calls=[{"name": "weather", "arguments": {"city": "Oslo"}}]),
        assistant(None, tool_calls=json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}])),
        assistant(None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'}),
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        assistant("", tool_calls=[{"name": "weather", "args": {"city": "Oslo"}, "id": "1", "type": "tool_call"}]),
        assistant("", tool_calls=[{"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}}]),
        assistant("", tool_calls=np.array([{"name": "weather", "arguments": {"city": "Oslo"}}], dtype=object)),
    ],
)
def test_tool_calls_of_every_form_come_out_in_the_form_of_the_template(
    make_tokenizer: MakeTokenizer, template: str, message: dict[str, Any]
) -> None:
    rows = [{"messages": [user("w?"), message, {"role": "tool", "content": "3"}, assistant("3 degrees")]}]
    (shown,), _ = look(make_tokenizer(template), rows)
    body = shown[shown.index("<call>") : shown.index("</call>")]
    assert '{"city": "Oslo"}' in body
    assert body.count('"city"') == 1
    assert "\\" not in body
    assert "null" not in body
    assert "⟦<call>" in shown
    assert "</call><|im_end|>⟧" in shown
    assert shown.endswith("⟦3 degrees<|im_end|>⟧")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            assistant("", tool_calls=[{"name": "f", "argument": {"x": 1}}]),
            "'argument' in the tool call 'f'.*'arguments'",
        ),
        (assistant("", tool_calls=[{"name": "f", "arguments": {}, "input": {"x": 1}}]), "'arguments', 'input' in the"),
        ({**call("f", {}), "function_call": {"name": "g", "arguments": "{}"}}, "both tool_calls and function_call"),
        ({"role": "tool", "content": {"t": 3}}, "found dict as the content.*json.dumps"),
        ({"role": "tool", "content": None}, 'found no text as the content.*give ""'),
        (assistant([{"type": "tool_use", "name": "f", "input": {}}]), "found tool_use in the content.*tool_calls"),
    ],
)
def test_tool_calls_and_answers_that_would_lose_something_are_refused_with_the_cure(
    make_tokenizer: MakeTokenizer, message: dict[str, Any], words: str
) -> None:
    with pytest.raises(DatasetError, match=words):
        look(make_tokenizer(CALLS), [{"messages": [user("a"), message, assistant("b")]}])


@pytest.mark.parametrize("nothing", ["null", " ", None, "{}"])
def test_a_call_without_arguments_has_an_empty_mapping(make_tokenizer: MakeTokenizer, nothing: Any) -> None:
    (shown,), _ = look(make_tokenizer(CALLS), [{"messages": [user("a"), call("f", nothing)]}])
    assert '"arguments": {}' in shown


def test_the_answer_of_openais_earlier_functions_is_a_tools(make_tokenizer: MakeTokenizer) -> None:
    turns = [user("a"), assistant(None, function_call={"name": "f", "arguments": "{}"})]
    (shown,), _ = look(
        make_tokenizer(CALLS), [{"messages": [*turns, {"role": "function", "content": "3"}, assistant("3")]}]
    )
    assert "<|im_start|>tool\n3<|im_end|>" in shown


def test_nulls_that_arrow_fills_in_are_not_trained(make_tokenizer: MakeTokenizer) -> None:
    from datasets import Dataset

    rows = [
        {
            "messages": [user("a"), call("weather", {"city": "Oslo"})],
            "tools": [{"function": {"name": "weather", "x": 1}}],
        },
        {"messages": [user("b"), call("add", {"a": 1, "b": 2})], "tools": [{"function": {"name": "add", "y": 2}}]},
    ]
    shown, _ = look(make_tokenizer(CALLS), Dataset.from_list(rows))
    assert len(shown) == 2
    assert not any("null" in text or "None" in text for text in shown)


@pytest.mark.parametrize("message", [call("weather", {"city": "Oslo"}), call("weather", {})])
def test_tool_calls_that_the_template_leaves_out_are_refused(
    make_tokenizer: MakeTokenizer, message: dict[str, Any]
) -> None:
    rows = [{"messages": [user("w?"), message, {"role": "tool", "content": "3"}, assistant("3")]}]
    with pytest.raises(DatasetError, match=r"leaves out or rewrites the tool call of message 1 .*chat_template="):
        look(make_tokenizer(CHATML), rows)


def test_special_tokens_within_a_call_do_not_end_the_turn(make_tokenizer: MakeTokenizer) -> None:
    template = CALLS.replace("<call>", "<s>").replace("</call>", "</s>")
    (shown,), _ = look(make_tokenizer(template), [{"messages": [user("w?"), call("weather", {"city": "Oslo"})]}])
    assert shown.endswith("</s><|im_end|>⟧")


# --- the template


@pytest.mark.parametrize("bos", ["", "<s>"])
@pytest.mark.parametrize("name", ["chatml", "llama", "mistral"])
def test_text_that_the_template_has_written_is_not_written_again(
    make_tokenizer: MakeTokenizer, templates: dict[str, str], name: str, bos: str
) -> None:
    tokenizer = make_tokenizer(templates[name], adds_bos=True)
    written = tokenizer.apply_chat_template([user("hi")], tokenize=False, add_generation_prompt=True)
    written = bos + written.removeprefix("<s>")
    (shown,), report = look(tokenizer, [{"prompt": written}], "grpo")
    assert shown == "<s>" + written.removeprefix("<s>") + "⟦completion⟧"
    assert "note, 1 time: a prompt holds the chat template's own marks" in report
    end = {"chatml": "<|im_end|>", "llama": "<|eot_id|>", "mistral": "</s>"}[name]
    for answer in ("yo", f"yo{end}", f"yo{end}\n"):
        (shown,), _ = look(tokenizer, [{"prompt": written, "completion": answer}])
        assert shown.endswith(f"⟦yo{end}⟧")


def test_users_message_that_holds_a_written_conversation_is_refused(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    with pytest.raises(DatasetError, match="a user's message that holds a conversation as the chat template writes it"):
        look(make_tokenizer(templates["chatml"]), [{"prompt": [user("<|im_start|>user\nhi<|im_end|>\n")]}], "grpo")


def test_special_tokens_in_the_middle_of_a_prompt_do_not_make_it_written(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    (shown,), _ = look(make_tokenizer(templates["chatml"]), [{"prompt": "What does <|im_start|> mean?"}], "grpo")
    assert "user\nWhat does <|im_start|> mean?<|im_end|>" in shown


def test_conversation_without_a_template_is_said_with_a_cure(make_tokenizer: MakeTokenizer) -> None:
    rows = [{"messages": [{"role": "system", "content": "Be kind"}, user("hi"), assistant("yo")]}] * 3
    _, report = look(make_tokenizer(), rows)
    assert "note, 3 times: a conversation was written as bare lines without roles" in report
    assert "chat_template=" in report
    with pytest.raises(DatasetError, match=r"found tools .* without a chat template"):
        look(make_tokenizer(), [{"messages": [user("w?"), call("f", {})]}])


def test_own_template_takes_the_place_of_the_tokenizers(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML)
    shown, _ = look(
        tokenizer,
        [{"prompt": "a", "completion": "b"}],
        chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}",
    )
    assert shown == ["[a]⟦[b]</s>⟧"] or shown == ["[a][⟦b</s>⟧"]
    assert tokenizer.chat_template == CHATML
