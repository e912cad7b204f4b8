from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_rl.data.chat import encode_pair, encode_prompt, encode_text, encode_texts
from nemo_rl.data.rows import PreferenceRow, PromptRow, TextRow
from nemo_rl.errors import DatasetError

MakeTokenizer = Callable[..., Any]
NAMES = ["chatml", "llama", "mistral", "thinking", "phi"]
END: dict[str | None, str] = {
    "chatml": "<|im_end|>",
    "llama": "<|eot_id|>",
    "mistral": "</s>",
    "thinking": "<|im_end|>",
    "phi": "<|im_end|>",
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **extra}


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def trained_runs(tokenizer: Any, ids: list[int], mask: list[bool]) -> list[str]:
    """The texts of the maximal stretches of trained tokens."""
    assert len(ids) == len(mask)
    runs: list[list[int]] = []
    for position, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        if trained and (position == 0 or not mask[position - 1]):
            runs.append([])
        if trained:
            runs[-1].append(token)
    return [decode(tokenizer, run) for run in runs]


# --- prompts


def test_string_prompt_becomes_one_user_message_where_there_is_a_template(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(templates["chatml"])
    expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"
    assert decode(tokenizer, encode_prompt(tokenizer, PromptRow("2+2="))) == expected


def test_string_prompt_stays_as_it_is_without_a_template(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    assert decode(tokenizer, encode_prompt(tokenizer, PromptRow("2+2="))) == "2+2="
    assert decode(tokenizer, encode_prompt(tokenizer, PromptRow("2+2=", separator="\n"))) == "2+2=\n"


def test_raw_text_stays_outside_the_template(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["chatml"])
    assert decode(tokenizer, encode_prompt(tokenizer, PromptRow("Human: hi", templated=False))) == "Human: hi"


def test_conversation_without_a_template_is_one_turn_per_line(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    row = PromptRow("c", [user("a"), assistant("b"), user("c")])
    assert decode(tokenizer, encode_prompt(tokenizer, row)) == "a\nb</s>c\n"


@pytest.mark.parametrize("text", ["2+2=", "<s>2+2="])
def test_bos_stands_once_without_a_template(make_tokenizer: MakeTokenizer, text: str) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    assert decode(tokenizer, encode_prompt(tokenizer, PromptRow(text))) == "<s>2+2="
    ids, mask = encode_text(tokenizer, TextRow("2+2=", "4"))
    assert decode(tokenizer, ids) == "<s>2+2=4</s>"
    assert mask[0] is False


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_bos_of_a_template_is_not_doubled(make_tokenizer: MakeTokenizer, templates: dict[str, str], name: str) -> None:
    tokenizer = make_tokenizer(templates[name], adds_bos=True)
    assert encode_prompt(tokenizer, PromptRow("hi")).count(tokenizer.bos_token_id) == 1
    ids, _ = encode_text(tokenizer, TextRow("hi", "ho"))
    assert ids.count(tokenizer.bos_token_id) == 1


def test_refusal_of_a_template_is_explained(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["mistral"])
    with pytest.raises(
        DatasetError, match=r"template refuses: TemplateError: roles must alternate; .*roles: user, user"
    ):
        encode_prompt(tokenizer, PromptRow("b", [user("a"), user("b")]))


# --- SFT


def test_completion_and_eos_are_trained_with_nothing_between(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    ids, mask = encode_text(tokenizer, TextRow("2+2=", "4"))
    assert decode(tokenizer, ids) == "2+2=4</s>"
    assert trained_runs(tokenizer, ids, mask) == ["4</s>"]


def test_known_sets_put_one_newline_between(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    ids, mask = encode_text(tokenizer, TextRow("2+2=", "4", separator="\n"))
    assert decode(tokenizer, ids) == "2+2=\n4</s>"
    assert trained_runs(tokenizer, ids, mask) == ["4</s>"]


def test_eos_that_the_text_ends_with_is_not_doubled(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    ids, _ = encode_text(tokenizer, TextRow("2+2=", "4</s>"))
    assert decode(tokenizer, ids) == "2+2=4</s>"


def test_plain_text_is_trained_whole_but_for_its_first_token(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(templates["chatml"])
    ids, mask = encode_text(tokenizer, TextRow(text="Two and two."))
    assert decode(tokenizer, ids) == "Two and two.</s>"
    assert mask == [False] + [True] * (len(ids) - 1)


def test_train_on_prompt_trains_all_but_the_first_token(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(templates["chatml"])
    ids, mask = encode_text(tokenizer, TextRow("2+2=", "4"), train_on_prompt=True)
    assert mask == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_assistant_turn_is_trained_with_its_end_token(
    make_tokenizer: MakeTokenizer, templates: dict[str, str], name: str
) -> None:
    tokenizer = make_tokenizer(templates[name])
    messages = [user("What is 2+2?"), assistant("four"), user("And 3?"), assistant("the answer is 42.")]
    before = copy.deepcopy(messages)
    ids, mask = encode_text(tokenizer, TextRow(messages=messages))
    space = " " if name == "mistral" else ""
    assert trained_runs(tokenizer, ids, mask) == [f"{space}four{END[name]}", f"{space}the answer is 42.{END[name]}"]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.startswith(decode(tokenizer, ids))
    assert messages == before


def test_only_the_completion_is_trained_where_the_prompt_is_a_conversation(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    row = TextRow([user("a"), assistant("b"), user("c")], [assistant("d")])
    for template, end in ((templates["chatml"], "<|im_end|>"), (None, "</s>")):
        tokenizer = make_tokenizer(template)
        ids, mask = encode_text(tokenizer, row)
        assert trained_runs(tokenizer, ids, mask) == ["d" + end]


def test_empty_thinking_block_of_the_template_is_not_trained(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(templates["thinking"])
    ids, mask = encode_text(tokenizer, TextRow("2+2?", "think"))
    assert decode(tokenizer, ids).endswith("assistant\n<think>\n\n</think>\n\nthink<|im_end|>")
    assert trained_runs(tokenizer, ids, mask) == ["think<|im_end|>"]


@pytest.mark.parametrize(
    "message", [assistant("<think>\nhm\n</think>\n\nfour"), assistant("four", reasoning_content="hm")]
)
def test_thinking_of_the_data_is_trained(
    make_tokenizer: MakeTokenizer, templates: dict[str, str], message: dict[str, Any]
) -> None:
    tokenizer = make_tokenizer(templates["thinking"])
    ids, mask = encode_text(tokenizer, TextRow(messages=[user("2+2?"), message]))
    assert trained_runs(tokenizer, ids, mask) == ["<think>\nhm\n</think>\n\nfour<|im_end|>"]


@pytest.mark.parametrize(
    "message", [assistant("<think>\nhm\n</think>\n\nfour"), assistant("four", reasoning_content="hm")]
)
def test_turns_whose_thinking_the_template_removes_later_are_trained_one_by_one(
    make_tokenizer: MakeTokenizer, templates: dict[str, str], message: dict[str, Any]
) -> None:
    tokenizer = make_tokenizer(templates["thinking"])
    last = assistant("<think>\nso\n</think>\n\nthree")
    found, counts = encode_texts(tokenizer, [TextRow(messages=[user("2+2?"), message, user("3?"), last])])
    assert counts == [2]
    assert [trained_runs(tokenizer, ids, mask) for ids, mask in found] == [
        ["<think>\nhm\n</think>\n\nfour<|im_end|>"],
        ["<think>\nso\n</think>\n\nthree<|im_end|>"],
    ]
    # Each is what a rollout would see: what comes before the trained turn is the prompt that the template writes.
    for (ids, mask), before in zip(found, ([user("2+2?")], [user("2+2?"), message, user("3?")]), strict=True):
        prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        assert decode(tokenizer, ids[: mask.index(True)]) == prompt


@pytest.mark.parametrize(
    "last", [assistant("<think>\nso\n</think>\n\nthree"), assistant("three", reasoning_content="so")]
)
def test_plain_turns_before_a_thinking_one_stay_in_one_example(
    make_tokenizer: MakeTokenizer, templates: dict[str, str], last: dict[str, Any]
) -> None:
    tokenizer = make_tokenizer(templates["thinking"])
    ids, mask = encode_text(tokenizer, TextRow(messages=[user("2+2?"), assistant("four"), user("3?"), last]))
    assert trained_runs(tokenizer, ids, mask) == ["four<|im_end|>", "<think>\nso\n</think>\n\nthree<|im_end|>"]


def test_template_that_changes_the_assistants_text_is_an_error(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] | upper }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DatasetError, match=r"found a chat template that leaves out or rewrites the text of message 1"):
        encode_text(tokenizer, TextRow(messages=[user("A"), assistant("b")]))


def test_template_without_end_tokens_gets_the_eos_at_the_end(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(templates["no end token"])
    ids, mask = encode_text(tokenizer, TextRow(messages=[user("a"), assistant("b"), user("c"), assistant("d")]))
    assert decode(tokenizer, ids) == "user: a\nassistant: b\nuser: c\nassistant: d</s>"
    assert trained_runs(tokenizer, ids, mask) == ["b", "d</s>"]


def test_several_end_tokens_are_trained_up_to_the_eos(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}<|eot_id|></s><s>{% endfor %}")
    ids, mask = encode_text(tokenizer, TextRow(messages=[user("a"), assistant("b"), user("c"), assistant("d")]))
    assert trained_runs(tokenizer, ids, mask) == ["b<|eot_id|></s>", "d<|eot_id|></s>"]


def test_conversation_that_the_assistant_opens(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["llama"])
    ids, mask = encode_text(tokenizer, TextRow(messages=[assistant("hello"), user("hi"), assistant("ho")]))
    assert trained_runs(tokenizer, ids, mask) == ["hello<|eot_id|>", "ho<|eot_id|>"]


def test_conversation_without_an_assistant_turn_explains_its_empty_mask(
    make_tokenizer: MakeTokenizer, templates: dict[str, str]
) -> None:
    with pytest.raises(DatasetError, match=r"conversation of user, bot: its loss mask would be all zero; .*rename"):
        encode_text(make_tokenizer(templates["chatml"]), TextRow(messages=[user("a"), {"role": "bot", "content": "b"}]))


def test_example_of_one_token_explains_its_empty_mask(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(DatasetError, match="loss mask is all zero"):
        encode_text(make_tokenizer(), TextRow(text="</s>"))


def test_missing_eos_is_explained(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(DatasetError, match=r"found a tokenizer without an EOS token .*; set tokenizer.eos_token"):
        encode_text(make_tokenizer(eos=None), TextRow("a", "b"))


@pytest.mark.parametrize("name", [*NAMES, None])
def test_tokenizer_that_puts_a_space_before_every_text(
    make_tokenizer: MakeTokenizer, templates: dict[str, str], name: str | None
) -> None:
    tokenizer = make_tokenizer(templates[name] if name else None, sentence_piece=True)
    messages = [user("what is the answer"), assistant("four"), user("and the fox"), assistant("jumps over")]
    ids, mask = encode_text(tokenizer, TextRow(messages=messages))
    end = END[name] if name else "</s>"
    assert [run.strip() for run in trained_runs(tokenizer, ids, mask)] == [f"four{end}", f"jumps over{end}"]


def test_word_cut_by_the_border_of_prompt_and_completion(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(sentence_piece=True)
    whole = tokenizer("brown", add_special_tokens=False)["input_ids"]
    assert len(whole) == 1, "the border must lie within a token for this test to mean anything"
    ids, mask = encode_text(tokenizer, TextRow("bro", "wn"))
    assert [run.strip() for run in trained_runs(tokenizer, ids, mask)] == ["wn</s>"]


TURN = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), min_size=1, max_size=12).filter(str.strip)
TRICKY = st.sampled_from(
    ["a", "n", "assistant", "\n", "user\n", " x ", "[INST]", "</think>", "im_end", "4\n\n", "é", "😀"]
)


@pytest.mark.parametrize("name", ["chatml", "llama", "mistral", "phi", "no end token", None])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_masked_tokens_decode_to_what_the_assistant_says(
    make_tokenizer: MakeTokenizer, templates: dict[str, str], name: str | None, data: st.DataObject
) -> None:
    tokenizer = make_tokenizer(templates[name] if name else None)
    text = (TURN | TRICKY).filter(str.strip)
    turns = data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=3))
    messages = [m for question, answer in turns for m in (user(question), assistant(answer))]
    ids, mask = encode_text(tokenizer, TextRow(messages=messages))
    runs = trained_runs(tokenizer, ids, mask)
    end = END.get(name, "</s>")
    assert [run.removesuffix(end).strip() for run in runs] == [answer.strip() for _, answer in turns]
    assert runs[-1].endswith(end)
    if name != "no end token":
        assert all(run.endswith(end) for run in runs)
    # The tokens before the last answer are those that a rollout would start from.
    if len(turns) == 1:
        assert ids[: mask.index(True)] == encode_prompt(tokenizer, PromptRow(turns[0][0], messages[:1]))


# --- DPO


@pytest.mark.parametrize("name", [*NAMES, "no end token", None])
@pytest.mark.parametrize("sentence_piece", [False, True])
def test_pair_shares_its_prompt_and_ends_with_end_tokens(
    make_tokenizer: MakeTokenizer, templates: dict[str, str], name: str | None, sentence_piece: bool
) -> None:
    tokenizer = make_tokenizer(templates[name] if name else None, sentence_piece=sentence_piece)
    prompt, chosen, rejected = encode_pair(tokenizer, PreferenceRow("the fox", "jumps", "is lazy"))
    end = END.get(name, "</s>")
    assert decode(tokenizer, chosen).strip() == f"jumps{end}"
    assert decode(tokenizer, rejected).strip() == f"is lazy{end}"
    if name != "thinking":  # Its empty thinking block belongs to the prompt.
        assert prompt == encode_prompt(tokenizer, PromptRow("the fox"))


def test_pair_of_conversations(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    row = PreferenceRow([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")])
    for template, end in ((templates["llama"], "<|eot_id|>"), (None, "</s>")):
        tokenizer = make_tokenizer(template)
        prompt, chosen, rejected = encode_pair(tokenizer, row)
        assert prompt == encode_prompt(tokenizer, PromptRow("c", list(row.prompt)))
        assert (decode(tokenizer, chosen), decode(tokenizer, rejected)) == ("d" + end, "e" + end)


def test_pair_of_which_one_answer_thinks(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["thinking"])
    row = PreferenceRow("2+2?", [assistant("4", reasoning_content="hm")], [assistant("5")])
    prompt, chosen, rejected = encode_pair(tokenizer, row)
    assert decode(tokenizer, prompt + chosen).endswith("assistant\n<think>\nhm\n</think>\n\n4<|im_end|>")
    assert decode(tokenizer, prompt + rejected).endswith("assistant\n<think>\n\n</think>\n\n5<|im_end|>")


def test_raw_pair_stays_outside_the_template(make_tokenizer: MakeTokenizer, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["chatml"])
    prompt, chosen, rejected = encode_pair(tokenizer, PreferenceRow("Q: hi A:", " yes", " no", templated=False))
    assert [decode(tokenizer, ids) for ids in (prompt, chosen, rejected)] == ["Q: hi A:", " yes</s>", " no</s>"]
