"""Recognising the shape of a data set from its columns, and turning its rows into those of an algorithm.

Shapes are tried in one fixed order, the most explicit first; an algorithm takes the first one that it can train on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nemo_rl.data import helpsteer, openmath
from nemo_rl.data.columns import (
    check_kinds,
    columns_of,
    kind,
    last_user_turn,
    reward_columns,
    template_arguments,
    text,
    text_or_messages,
)
from nemo_rl.data.context import CONTEXT_COLUMNS, earlier_turns, read_rows
from nemo_rl.data.conversations import is_empty, is_trained
from nemo_rl.data.rows import Message, PreferenceRow, PromptRow, Report, Row, TextRow
from nemo_rl.data.shapes import unknown_shape
from nemo_rl.data.spool import Spool, like
from nemo_rl.errors import DatasetError

T = TypeVar("T")
Rows = Sequence[Row]
# Called with the rows, the columns that hold values, and the count of rows left out by reason, to be added to.
Made = list[T] | Spool[T]
Converter = Callable[[Rows, Sequence[str], Counter[str]], Made[T]]

QUESTIONS = ("question", "problem", "instruction", "input")
ANSWERS = ("answer", "solution", "output", "response")


@dataclass(frozen=True)
class Format:
    """A shape: the columns by which it is known, those that are trained on, and what each algorithm makes of it (None:
    nothing).
    """

    name: str
    matches: Callable[[frozenset[str]], bool]
    reads: Callable[[Sequence[str]], set[str]]
    prompts: Converter[PromptRow] | None = None
    texts: Converter[TextRow] | None = None
    preferences: Converter[PreferenceRow] | None = None


def to_prompt_rows(rows: Rows) -> tuple[Sequence[PromptRow], Report]:
    """GRPO prompts. Raises `DatasetError` for columns of no accepted shape, wrong types, or no usable row."""
    return _convert("grpo", rows, lambda shape: shape.prompts)


def to_text_rows(rows: Rows) -> tuple[Sequence[TextRow], Report]:
    """SFT examples. Raises as `to_prompt_rows`."""
    return _convert("sft", rows, lambda shape: shape.texts)


def to_preference_rows(rows: Rows) -> tuple[Sequence[PreferenceRow], Report]:
    """DPO pairs. Raises as `to_prompt_rows`."""
    return _convert("dpo", rows, lambda shape: shape.preferences)


def _convert(
    algorithm: str, rows: Rows, converter_of: Callable[[Format], Converter[T] | None]
) -> tuple[Sequence[T], Report]:
    columns = columns_of(rows)
    known = frozenset(columns)
    rows = read_rows(rows, columns, rewarded=algorithm == "grpo")
    for shape in FORMATS:
        converter = converter_of(shape)
        if converter is None or not shape.matches(known):
            continue
        dropped: Counter[str] = Counter()
        converted = converter(rows, columns, dropped)
        # Of prompts the other columns are the reward's to read.
        unused = () if algorithm == "grpo" else tuple(c for c in columns if c not in shape.reads(columns))
        report = Report(shape.name, len(rows), len(converted), {k: n for k, n in dropped.items() if n}, unused=unused)
        if not converted:
            raise no_rows_left(report)
        return converted, report
    named = dict.fromkeys(column for row in rows for column in row)
    raise unknown_shape(algorithm, columns, [column for column in named if column not in known])


def no_rows_left(report: Report) -> DatasetError:
    """The error for a data set of which every row was left out."""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in report.dropped.items()) or "no rows"
    cure = "correct the data"
    if any("max_sequence_length" in reason for reason in report.dropped):
        cure = "raise max_sequence_length, or set overlong_rows to truncate"
    return DatasetError(
        f"found {report.found:,} rows of the shape {report.format!r}, but none that can be trained on ({reasons}); "
        f"expected at least one; {cure}"
    )


# --- conversations


def _conversation_column(columns: Sequence[str]) -> str:
    return "messages" if "messages" in columns else "conversations"


def _message_prompts(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[PromptRow]:
    """The conversation up to its last assistant turn; that turn, if it ends the conversation, is the reward's."""
    column = _conversation_column(columns)
    check_kinds(rows, column, "messages")
    found = like(rows)
    for index, row in enumerate(rows):
        messages = text_or_messages(row, index, column) or []
        assert isinstance(messages, list)
        visible = reward_columns(row, columns, {column})
        answer = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
        if "completion" not in columns:
            visible["completion"] = answer
        _add_conversation(found, messages, visible, template_arguments(row, index), dropped)
    if all(row.columns.get("completion") is None for row in found):
        bare = like(rows)
        bare.extend(replace(r, columns={k: v for k, v in r.columns.items() if k != "completion"}) for r in found)
        return bare
    return found


def _add_conversation(
    found: Made[PromptRow],
    messages: list[Message],
    columns: dict[str, Any],
    arguments: dict[str, Any],
    dropped: Counter[str],
) -> None:
    question = last_user_turn(messages)
    if question is None:
        dropped["without a user turn"] += 1
    elif messages[-1]["role"] == "assistant":
        dropped["ending with an assistant turn in the prompt"] += 1
    else:
        found.append(PromptRow(question, messages, columns, template_arguments=arguments))


def _message_texts(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[TextRow]:
    column = _conversation_column(columns)
    check_kinds(rows, column, "messages")
    found = like(rows)
    for index, row in enumerate(rows):
        messages = text_or_messages(row, index, column) or []
        assert isinstance(messages, list)
        if reason := _untrainable(messages):
            dropped[reason] += 1
        else:
            found.append(TextRow(messages=messages, template_arguments=template_arguments(row, index)))
    return found


def _untrainable(messages: Sequence[Message]) -> str | None:
    """Why nothing can be learnt from these messages, or only that an answer may be empty; None where something can."""
    if not any(m["role"] == "assistant" for m in messages):
        return "without an assistant turn"
    if not any(map(is_trained, messages)):
        return "with assistant turns of weight 0 only"
    return "with an empty assistant turn" if any(is_trained(m) and is_empty(m) for m in messages) else None


# --- prompts, alone or with a completion


def _prompts(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[PromptRow]:
    check_kinds(rows, "prompt", "text", "messages")
    found = like(rows)
    for index, row in enumerate(rows):
        prompt = text_or_messages(row, index, "prompt")
        visible = reward_columns(row, columns)
        if prompt is None:
            dropped["without a prompt"] += 1
        elif isinstance(prompt, str):
            found.append(PromptRow(prompt, columns=visible, template_arguments=template_arguments(row, index)))
        else:
            _add_conversation(found, prompt, visible, template_arguments(row, index), dropped)
    return found


def _completions(completion: str) -> Converter[TextRow]:
    """Converter of `prompt` and one column that holds the answer, each text or messages."""

    def convert(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[TextRow]:
        for column in ("prompt", completion):
            check_kinds(rows, column, "text", "messages")
        found = like(rows)
        for index, row in enumerate(rows):
            prompt, answer = text_or_messages(row, index, "prompt"), text_or_messages(row, index, completion)
            if prompt is None:
                dropped["without a prompt"] += 1
            elif answer is None:
                dropped[f"without a {completion}"] += 1
            elif isinstance(answer, list) and (reason := _untrainable(answer)):
                dropped[reason] += 1
            else:
                found.append(TextRow(prompt, answer, template_arguments=template_arguments(row, index)))
        return found

    return convert


# --- preferences


def _pairs(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[tuple[PreferenceRow, Row]]:
    """Pairs with the rows they came from. Without a prompt column, the prompt is what both answers begin with:
    of conversations their equal first messages, of strings their common text up to its last space.
    """
    explicit = "prompt" in columns
    if explicit:
        check_kinds(rows, "prompt", "text", "messages")
    for column in ("chosen", "rejected"):
        check_kinds(rows, column, "text", "messages")
    found = like(rows)
    for index, row in enumerate(rows):
        prompt = text_or_messages(row, index, "prompt") if explicit else None
        chosen, rejected = text_or_messages(row, index, "chosen"), text_or_messages(row, index, "rejected")
        if explicit and prompt is None:
            dropped["without a prompt"] += 1
        elif chosen is None or rejected is None:
            dropped["without a chosen or a rejected answer"] += 1
        elif kind(chosen) != kind(rejected):
            raise DatasetError(
                f"found {kind(chosen)} as chosen and {kind(rejected)} as rejected in row {index}; expected both "
                "as text or both as messages; convert one of them"
            )
        elif chosen == rejected:
            dropped["in a tie (chosen equals rejected)"] += 1
        elif isinstance(chosen, str) and isinstance(rejected, str):
            pair = PreferenceRow(prompt, chosen, rejected) if prompt else _split_strings(chosen, rejected)
            _keep(found, pair, row, index, "without a beginning that both answers share", dropped)
        else:
            assert isinstance(chosen, list)
            assert isinstance(rejected, list)
            if prompt is None and chosen[0] != rejected[0]:
                dropped["without a beginning that both answers share"] += 1
                continue
            pair = _split_conversations(prompt, chosen, rejected)
            _keep(found, pair, row, index, "whose answers are not one assistant turn each", dropped)
    return found


def _keep(
    found: Made[tuple[PreferenceRow, Row]],
    pair: PreferenceRow | None,
    row: Row,
    index: int,
    otherwise: str,
    dropped: Counter[str],
) -> None:
    if pair is None:
        dropped[otherwise] += 1
    elif any(isinstance(answer, list) and is_empty(answer[0]) for answer in (pair.chosen, pair.rejected)):
        dropped["without a chosen or a rejected answer"] += 1
    else:
        found.append((replace(pair, template_arguments=template_arguments(row, index)), row))


def _split_strings(chosen: str, rejected: str) -> PreferenceRow | None:
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    # Cut before a space, for tokenizers join a space to the word that follows it, never to the one before.
    cut = max((i for i in range(shared) if chosen[i].isspace()), default=0)
    if not chosen[:cut].strip() or not chosen[cut:].strip() or not rejected[cut:].strip():
        return None
    return PreferenceRow(chosen[:cut], chosen[cut:], rejected[cut:], templated=False)


def _split_conversations(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> PreferenceRow | None:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    before, answers = chosen[:shared], (chosen[shared:], rejected[shared:])
    if any(len(answer) != 1 or answer[0]["role"] != "assistant" for answer in answers):
        # Training a longer rest would train the user's turns too.
        return None
    if isinstance(prompt, list) and before[: len(prompt)] != prompt:
        before = prompt + before
    elif isinstance(prompt, str) and not any(m["role"] == "user" for m in before):
        before = [*before, {"role": "user", "content": prompt}]
    return PreferenceRow(before, *answers)


def _preferences(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[PreferenceRow]:
    found = like(rows)
    found.extend(pair for pair, _ in _pairs(rows, columns, dropped))
    return found


def _chosen_texts(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[TextRow]:
    found = like(rows)
    for pair, _ in _pairs(rows, columns, dropped):
        if pair.templated:
            found.append(TextRow(pair.prompt, pair.chosen, template_arguments=pair.template_arguments))
        else:
            found.append(TextRow(text=f"{pair.prompt}{pair.chosen}"))
    return found


def _preference_prompts(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[PromptRow]:
    found = like(rows)
    for pair, row in _pairs(rows, columns, dropped):
        visible = reward_columns(row, columns)
        arguments = pair.template_arguments
        if isinstance(pair.prompt, str):
            found.append(
                PromptRow(pair.prompt, columns=visible, templated=pair.templated, template_arguments=arguments)
            )
        else:
            _add_conversation(found, pair.prompt, visible, arguments, dropped)
    return found


# --- questions and answers, plain text


def _question(row: Row, columns: Sequence[str]) -> str | None:
    """The question; of instruction + input (Alpaca) both, with a blank line between."""
    parts = [text(row, column) for column in QUESTIONS if column in columns]
    if "instruction" in columns and "input" in columns:
        both = [part for part in (text(row, "instruction"), text(row, "input")) if part]
        return "\n\n".join(both) or None
    return parts[0]


def _check_question(rows: Rows, columns: Sequence[str]) -> None:
    for column in QUESTIONS:
        if column in columns:
            check_kinds(rows, column, "text")


def _question_prompts(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[PromptRow]:
    _check_question(rows, columns)
    found = like(rows)
    for index, row in enumerate(rows):
        question, arguments = _question(row, columns), template_arguments(row, index)
        if question is None:
            dropped["without a question"] += 1
            continue
        visible, before = reward_columns(row, columns), earlier_turns(row, index)
        messages = [*before, {"role": "user", "content": question}] if before else None
        found.append(PromptRow(question, messages, visible, template_arguments=arguments))
    return found


def _answer_texts(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[TextRow]:
    answer_column = next(column for column in ANSWERS if column in columns)
    if "prompt" in columns:
        return _completions(answer_column)(rows, columns, dropped)
    _check_question(rows, columns)
    check_kinds(rows, answer_column, "text")
    found = like(rows)
    for index, row in enumerate(rows):
        question, answer = _question(row, columns), text(row, answer_column)
        if question is None:
            dropped["without a question"] += 1
        elif answer is None:
            dropped[
                f"without an {answer_column}" if answer_column in ("answer", "output") else f"without a {answer_column}"
            ] += 1
        else:
            before = earlier_turns(row, index)
            prompt = [*before, {"role": "user", "content": question}] if before else question
            found.append(TextRow(prompt, answer, template_arguments=template_arguments(row, index)))
    return found


def _plain_texts(rows: Rows, columns: Sequence[str], dropped: Counter[str]) -> Made[TextRow]:
    check_kinds(rows, "text", "text")
    found = like(rows)
    found.extend(TextRow(text=string) for row in rows if (string := text(row, "text")) is not None)
    dropped["without text"] += len(rows) - len(found)
    return found


def _has(*columns: str) -> Callable[[frozenset[str]], bool]:
    return lambda known: known.issuperset(columns)


def _reads(*names: str) -> Callable[[Sequence[str]], set[str]]:
    """What a shape of these columns reads; those around a conversation too."""
    return lambda columns: {*names, *CONTEXT_COLUMNS}


def _reads_question(columns: Sequence[str]) -> set[str]:
    questions = [column for column in QUESTIONS if column in columns]
    both = {"instruction", "input"} if {"instruction", "input"} <= set(questions) else set(questions[:1])
    if "prompt" in columns:
        both = {"prompt"}
    return {*both, *[column for column in ANSWERS if column in columns][:1], *CONTEXT_COLUMNS}


FORMATS: tuple[Format, ...] = (
    Format(
        "messages",
        lambda known: bool(known & {"messages", "conversations"}),
        lambda columns: {_conversation_column(columns), *CONTEXT_COLUMNS},
        _message_prompts,
        _message_texts,
    ),
    Format(
        "prompt + chosen + rejected",
        _has("prompt", "chosen", "rejected"),
        _reads("prompt", "chosen", "rejected"),
        _prompts,
        _chosen_texts,
        _preferences,
    ),
    Format(
        "chosen + rejected",
        _has("chosen", "rejected"),
        _reads("chosen", "rejected"),
        _preference_prompts,
        _chosen_texts,
        _preferences,
    ),
    Format(
        "prompt + completion",
        _has("prompt", "completion"),
        _reads("prompt", "completion"),
        _prompts,
        _completions("completion"),
    ),
    Format(
        "HelpSteer2",
        _has(*helpsteer.SCORED_COLUMNS),
        lambda columns: set(helpsteer.SCORED_COLUMNS),
        helpsteer.prompts,
        helpsteer.scored_texts,
        helpsteer.scored_preferences,
    ),
    Format(
        "HelpSteer2 preference",
        _has(*helpsteer.PREFERENCE_COLUMNS),
        lambda columns: {"split", *helpsteer.PREFERENCE_COLUMNS},
        helpsteer.preference_prompts,
        helpsteer.preference_texts,
        helpsteer.preferences,
    ),
    Format(
        "OpenMathInstruct-2",
        _has(*openmath.COLUMNS),
        lambda columns: set(openmath.COLUMNS),
        openmath.prompts,
        openmath.texts,
    ),
    Format("prompt", _has("prompt"), _reads("prompt"), _prompts),
    Format("question", lambda known: bool(known & set(QUESTIONS)), _reads_question, _question_prompts),
    Format(
        "question + answer",
        lambda known: bool(known & {"prompt", *QUESTIONS}) and bool(known & set(ANSWERS)),
        _reads_question,
        None,
        _answer_texts,
    ),
    Format("text", _has("text"), lambda columns: {"text"}, None, _plain_texts),
)
