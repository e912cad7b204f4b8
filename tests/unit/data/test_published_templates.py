"""Masks under the chat templates of published models, as TRL ships them.

TRL's training variants mark the assistant's text by hand, so they are an oracle that knows nothing of our method.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from nemo_rl.data.chat import encode_pair, encode_prompt, encode_text
from nemo_rl.data.rows import PreferenceRow, PromptRow, TextRow
from unit.data.conftest import build_tokenizer

_trl = importlib.util.find_spec("trl")
FOLDER = Path(_trl.origin).parent / "chat_templates" if _trl and _trl.origin else None
# They take content as a list of parts only, for images.
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")
ALL = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.startswith(PARTS_ONLY)) if FOLDER else []
ANSWERS = ["four", "the answer"]
CONVERSATION = [
    {"role": "user", "content": "q one"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": ANSWERS[1]},
]
SPECIAL = re.compile(r"<[|｜][^<>\s{}'\"]*[|｜]>|<(?:end|start)_of_turn>|<turn\|>|<\|turn>|</s>")


def tokenizer_for(name: str) -> Any:
    assert FOLDER is not None
    template = (FOLDER / f"{name}.jinja").read_text()
    core = Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str())
    special = sorted(set(SPECIAL.findall(template)))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def runs(tokenizer: Any, ids: list[int], mask: list[Any]) -> list[str]:
    found: list[list[int]] = []
    for position, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        if trained and not mask[position - 1]:
            found.append([])
        if trained:
            found[-1].append(token)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in found]


def test_there_are_templates_to_test() -> None:
    if _trl is None:
        pytest.skip("TRL is not installed")
    assert len(ALL) > 40


@pytest.mark.parametrize("name", ALL)
def test_trained_text_is_the_assistants(name: str) -> None:
    tokenizer = tokenizer_for(name)
    trained = runs(tokenizer, *encode_text(tokenizer, TextRow(messages=CONVERSATION)))
    assert [SPECIAL.sub("", run).strip() for run in trained] == ANSWERS
    assert SPECIAL.search(trained[-1]), "the last turn must end with a special token"
    prompt, chosen, rejected = encode_pair(tokenizer, PreferenceRow("q one", "four", "five"))
    assert [SPECIAL.sub("", tokenizer.decode(ids)).strip() for ids in (chosen, rejected)] == ["four", "five"]
    start = encode_prompt(tokenizer, PromptRow("q one"))
    shared = next((i for i, (a, b) in enumerate(zip(start, prompt, strict=False)) if a != b), len(start))
    assert "q one" in tokenizer.decode(start[:shared])


@pytest.mark.parametrize("name", [name for name in ALL if name.endswith("_training")])
def test_trained_text_lies_within_what_the_template_itself_marks(name: str) -> None:
    tokenizer = tokenizer_for(name)
    marked = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    expected = runs(tokenizer, marked["input_ids"], marked["assistant_masks"])
    trained = runs(tokenizer, *encode_text(tokenizer, TextRow(messages=CONVERSATION)))
    assert len(trained) == len(expected) == 2
    for ours, theirs in zip(trained, expected, strict=True):
        assert ours in theirs
