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


def encode_prompt(tokenizer: Any, row: PromptRow, template: Template | None = None) -> list[int]:
    """Token ids of a GRPO prompt, up to where the completion begins.

    With a chat template a plain string becomes one user message, unless the template has written it already; without
    one it stays as it is.
    """
    return encode_prompts(tokenizer, [row], template)[0]


def encode_text(
    tokenizer: Any, row: TextRow, train_on_prompt: bool = False, template: Template | None = None
) -> Encoded:
    """Token ids and loss mask of an SFT row that is one example; mask[i] is True where token i is to be predicted.

    Trained are completions, or every assistant turn of weight, with their end tokens; with `train_on_prompt` all tokens
    but the first. Raises `DatasetError` if nothing would be trained, ValueError for a conversation that has to be trained
    turn by turn.
    """
    encoded, _ = encode_texts(tokenizer, [row], train_on_prompt, template)
    if len(encoded) > 1:
        raise ValueError(f"found a conversation that makes {len(encoded)} examples; expected one; see encode_texts")
    ids, mask = encoded[0]
    if not any(mask):
        raise DatasetError(
            "found an example whose loss mask is all zero, so that nothing would be learnt from it; expected a "
            "completion or an assistant turn with text; correct the row"
        )
    return ids, mask


def encode_pair(
    tokenizer: Any, row: PreferenceRow, template: Template | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the prompt and of both answers of a DPO pair, each answer with its end token."""
    return encode_pairs(tokenizer, [row], template)[0]


def encode_prompts(tokenizer: Any, rows: Sequence[PromptRow], template: Template | None = None) -> list[list[int]]:
    """`encode_prompt` of many rows."""
    template = template or Template(tokenizer)
    return [ids for ids, _ in encode_passages(tokenizer, [_prompt(template, row) for row in rows])]


def encode_texts(
    tokenizer: Any, rows: Sequence[TextRow], train_on_prompt: bool = False, template: Template | None = None
) -> tuple[list[Encoded], list[int]]:
    """The examples of many rows as in `encode_text`, and how many each row makes: several for a conversation of which the
    template hides earlier thinking, one for each turn. An example of which nothing would be trained has an all-zero mask.
    """
    template = template or Template(tokenizer)
    passages = [_text(template, row) for row in rows]
    encoded = encode_passages(tokenizer, [passage for found in passages for passage in found])
    if train_on_prompt:
        encoded = [(ids, [position > 0 for position in range(len(ids))]) for ids, _ in encoded]
    return encoded, [len(found) for found in passages]


def encode_pairs(
    tokenizer: Any, rows: Sequence[PreferenceRow], template: Template | None = None
) -> list[tuple[list[int], list[int], list[int]]]:
    """`encode_pair` of many rows."""
    template = template or Template(tokenizer)
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
        return template.prompt(row.messages, row.template_arguments)
    if row.templated and _is_to_be_written(template, row.prompt):
        return template.prompt([_user(row.prompt)], row.template_arguments)
    return Passage((Segment(row.prompt + row.separator, trained=False),), opens=True)


def _text(template: Template, row: TextRow) -> list[Passage]:
    if row.messages is not None:
        return template.conversation(row.messages, 0, row.template_arguments)
    if row.text is not None:
        end = template.end_token if template.has_written(row.text) else None
        text = row.text if end is None else _up_to_end(row.text, template.end_text)
        return [Passage((Segment(text, trained=True, closes=True, end=end),), opens=True)]
    assert row.prompt is not None, "a TextRow holds messages, text, or prompt and completion"
    assert row.completion is not None, "a TextRow holds messages, text, or prompt and completion"
    return _answered(template, row.prompt, row.completion, row)


def _pair(template: Template, row: PreferenceRow) -> tuple[Passage, Passage]:
    (chosen,), (rejected,) = (_answered(template, row.prompt, answer, row) for answer in (row.chosen, row.rejected))
    before, after = chosen.segments[:-1], rejected.segments[:-1]
    if before == after or not (chosen.segments and rejected.segments):
        return chosen, rejected
    # One of them shows thinking that the other's template leaves empty: whatever differs belongs to the answers.
    shared = _common_text("".join(s.text for s in before), "".join(s.text for s in after))
    return _from(chosen, shared), _from(rejected, shared)


def _answered(
    template: Template, prompt: str | list[Message], answer: str | list[Message], row: TextRow | PreferenceRow
) -> list[Passage]:
    if isinstance(prompt, str) and isinstance(answer, str):
        templated = row.templated if isinstance(row, PreferenceRow) else True
        if not (templated and _is_to_be_written(template, prompt)):
            end = template.end_token if templated and template.exists else None
            answer = answer if end is None else _up_to_end(answer, template.end_text)
            closed = Segment(answer, True, closes=True, end=end)
            return [Passage((Segment(f"{prompt}{row.separator if end is None else ''}", False), closed), opens=True)]
    if isinstance(prompt, str) and template.has_written(prompt):
        if isinstance(answer, list) and len(answer) == 1 and answer[0].keys() <= {"role", "content"}:
            return _answered(template, prompt, answer[0]["content"], row)
        raise DatasetError(
            f"found a prompt that the chat template has written already ({prompt[:60]!r}) with an answer in messages; "
            "expected both as text or both as messages; give the prompt as messages"
        )
    before = [_user(prompt)] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return template.conversation([*before, *after], len(before), row.template_arguments)


def _is_to_be_written(template: Template, prompt: str) -> bool:
    """Whether a plain prompt is to go through the chat template: not where it has been through it already."""
    if not template.has_written(prompt):
        return template.exists
    template.notes[
        "a prompt holds the chat template's own marks, so it was taken as written by the template already; give the bare "
        "question, or messages, to have it written"
    ] += 1
    return False


def _up_to_end(text: str, end: str) -> str:
    """A text that the template has written, without what follows the end of its last turn."""
    bare = text.rstrip()
    return bare if end and bare.endswith(end) else text


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
