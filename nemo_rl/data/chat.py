"""From rows to token ids and loss masks, with or without a chat template.

The plural functions encode many rows with one call of the tokenizer; the singular ones are the same for one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemo_rl.data.rows import Message, PreferenceRow, PromptRow, TextRow
from nemo_rl.data.segments import Encoded, Passage, Segment, encode_passages
from nemo_rl.data.templates import Template
from nemo_rl.errors import DatasetError


def encode_prompt(tokenizer: Any, row: PromptRow) -> list[int]:
    """Token ids of a GRPO prompt, up to where the completion begins.

    With a chat template a plain string becomes one user message; without one it stays as it is.
    """
    return encode_prompts(tokenizer, [row])[0]


def encode_text(tokenizer: Any, row: TextRow, train_on_prompt: bool = False) -> Encoded:
    """Token ids and loss mask of an SFT example; mask[i] is True where token i is to be predicted.

    Trained are completions, or every assistant turn, with their end tokens; with `train_on_prompt` all tokens but the
    first. Raises `DatasetError` if nothing would be trained.
    """
    ids, mask = encode_texts(tokenizer, [row], train_on_prompt)[0]
    if not any(mask):
        raise DatasetError(
            "found an example whose loss mask is all zero, so that nothing would be learnt from it; expected a "
            "completion or an assistant turn with text; correct the row"
        )
    return ids, mask


def encode_pair(tokenizer: Any, row: PreferenceRow) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt and of both answers of a DPO pair, each answer with its end token."""
    return encode_pairs(tokenizer, [row])[0]


def encode_prompts(tokenizer: Any, rows: Sequence[PromptRow]) -> list[list[int]]:
    """`encode_prompt` of many rows."""
    template = Template(tokenizer)
    return [ids for ids, _ in encode_passages(tokenizer, [_prompt(template, row) for row in rows])]


def encode_texts(tokenizer: Any, rows: Sequence[TextRow], train_on_prompt: bool = False) -> list[Encoded]:
    """`encode_text` of many rows; an example of which nothing would be trained comes back with an all-zero mask."""
    template = Template(tokenizer)
    encoded = encode_passages(tokenizer, [_text(template, row) for row in rows])
    if train_on_prompt:
        return [(ids, [position > 0 for position in range(len(ids))]) for ids, _ in encoded]
    return encoded


def encode_pairs(tokenizer: Any, rows: Sequence[PreferenceRow]) -> list[tuple[list[int], list[int], list[int]]]:
    """`encode_pair` of many rows."""
    template = Template(tokenizer)
    passages = [passage for row in rows for passage in _pair(template, row)]
    halves = [_halves(*encoded) for encoded in encode_passages(tokenizer, passages)]
    pairs = []
    for row, (prompt, chosen), (other_prompt, rejected) in zip(rows, halves[::2], halves[1::2], strict=True):
        if prompt != other_prompt:
            raise DatasetError(
                "found a chat template or tokenizer that writes one prompt in two ways, depending on the answer; "
                f"expected the same tokens before both answers (chosen starts {str(row.chosen)[:60]!r}); "
                "give both answers in the same form, for example both without thinking"
            )
        pairs.append((prompt, chosen, rejected))
    return pairs


def _prompt(template: Template, row: PromptRow) -> Passage:
    if row.messages is not None:
        return template.prompt(row.messages)
    if template.exists and row.templated:
        return template.prompt([_user(row.prompt)])
    return Passage((Segment(row.prompt + row.separator, trained=False),), opens=True)


def _text(template: Template, row: TextRow) -> Passage:
    if row.messages is not None:
        return template.conversation(row.messages, first=0)
    if row.text is not None:
        return Passage((Segment(row.text, trained=True, closes=True),), opens=True)
    assert row.prompt is not None, "a TextRow holds messages, text, or prompt and completion"
    assert row.completion is not None, "a TextRow holds messages, text, or prompt and completion"
    return _answered(template, row.prompt, row.completion, row.separator, templated=True)


def _pair(template: Template, row: PreferenceRow) -> tuple[Passage, Passage]:
    chosen, rejected = (
        _answered(template, row.prompt, answer, row.separator, row.templated) for answer in (row.chosen, row.rejected)
    )
    before, after = chosen.segments[:-1], rejected.segments[:-1]
    if before == after or not (chosen.segments and rejected.segments):
        return chosen, rejected
    # One of them shows thinking that the other's template leaves empty: whatever differs belongs to the answers.
    shared = _common_text("".join(s.text for s in before), "".join(s.text for s in after))
    return _from(chosen, shared), _from(rejected, shared)


def _answered(
    template: Template, prompt: str | list[Message], answer: str | list[Message], separator: str, templated: bool
) -> Passage:
    plain = isinstance(prompt, str) and isinstance(answer, str)
    if plain and not (template.exists and templated):
        return Passage((Segment(f"{prompt}{separator}", False), Segment(str(answer), True, closes=True)), opens=True)
    before = [_user(prompt)] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return template.conversation([*before, *after], first=len(before))


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _common_text(first: str, second: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if length is None else length]


def _from(passage: Passage, prompt: str) -> Passage:
    text = "".join(segment.text for segment in passage.segments)
    answer = replace(passage.segments[-1], text=text[len(prompt) :])
    return Passage((Segment(prompt, trained=False), answer), passage.opens)


def _halves(ids: list[int], mask: list[bool]) -> tuple[list[int], list[int]]:
    cut = mask.index(True) if True in mask else len(mask)
    return ids[:cut], ids[cut:]
