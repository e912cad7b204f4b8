"""Reading single cells of a row: text, conversations, and the columns that a reward may see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

from nemo_rl.data.conversations import is_missing, to_messages, to_tools
from nemo_rl.data.rows import Message, Row
from nemo_rl.errors import DatasetError

# A reward receives these by position or meaning (the prompt, the sampled response, the conversation), so a column of
# the same name cannot be passed beside them.
RESERVED = frozenset({"prompt", "prompts", "response", "responses", "messages"})


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Columns that hold a value in at least one row, in order of first appearance.

    A column that is null everywhere is none: Arrow tables invent such columns when rows of several shapes are merged.
    """
    seen: dict[str, None] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DatasetError(
                f"found {type(row).__name__} ({_short(row)}) as row {index}; expected a mapping of column to value such "
                f'as {{"prompt": "2+2=", "answer": "4"}}; {_cure_of_row(row)}'
            )
        for column, value in row.items():
            if column not in seen and not is_missing(value):
                seen[column] = None
    return list(seen)


_FILES = (".jsonl", ".json", ".parquet", ".csv", ".gz")


def _cure_of_row(row: Any) -> str:
    if isinstance(row, str) and row.lower().endswith(_FILES):
        return "a list is a list of rows, not of files: give one file, or read the files into one list of dicts"
    if isinstance(row, list | tuple) and row and isinstance(row[0], Mapping) and "role" not in row[0]:
        return "for training and validation rows together, give the second list as validation_dataset"
    return "wrap each row in a dict"


def kind(value: Any) -> str:
    """text, messages, or the type's name."""
    if isinstance(value, str):
        return "text"
    return "messages" if isinstance(value, (list, tuple)) else type(value).__name__


def check_kinds(rows: Sequence[Row], column: str, *allowed: str) -> None:
    """Raise `DatasetError` unless all cells of a column that are not null are of one allowed kind."""
    first: tuple[int, str] | None = None
    for index, row in enumerate(rows):
        value = row.get(column)
        if is_missing(value):
            continue
        found = kind(value)
        if found not in allowed:
            raise DatasetError(
                f"found {found} ({_short(value)}) in column {column!r} of row {index}; expected "
                f"{' or '.join(_KIND_WORDS[k] for k in allowed)}; {_cure(value, allowed)}"
            )
        if first is None:
            first = (index, found)
        elif found != first[1]:
            raise DatasetError(
                f"column {column!r} mixes types: {_KIND_WORDS[first[1]]} in row {first[0]}, {_KIND_WORDS[found]} in "
                f"row {index}; expected one kind throughout; convert the rows to one shape"
            )


def _cure(value: Any, allowed: Sequence[str]) -> str:
    if (isinstance(value, Number) or hasattr(value, "isoformat")) and "text" in allowed:
        return "convert the column, for example with str()"
    if isinstance(value, bytes) and "text" in allowed:
        return 'decode the column, for example with .decode("utf-8")'
    if isinstance(value, str):
        return 'give each cell as [{"role": "user", "content": "Hello"}, ...]'
    if isinstance(value, (list, tuple, Mapping)) and "text" in allowed:
        return (
            "put the one text that is meant into the column, or name it as one that may hold messages: prompt, messages"
        )
    return "convert the column, or leave out the rows without a value"


_KIND_WORDS = {"text": "text", "messages": "a list of messages"}


def text(row: Row, column: str) -> str | None:
    """The text of a cell as it stands, or None where it is missing or blank."""
    value = row.get(column)
    return value if isinstance(value, str) and value.strip() else None


def text_or_messages(row: Row, index: int, column: str) -> str | list[Message] | None:
    """The text or the conversation of a cell, or None where it is missing, blank or empty."""
    value = row.get(column)
    if isinstance(value, (list, tuple)):
        return to_messages(value, f"column {column!r} of row {index}") or None
    return text(row, column)


def template_arguments(row: Row, index: int) -> dict[str, Any]:
    """What a row tells the chat template beside its messages: `tools`, and the column `chat_template_kwargs`."""
    found: dict[str, Any] = {}
    if "chat_template_kwargs" in row and not is_missing(row["chat_template_kwargs"]):
        given = row["chat_template_kwargs"]
        if not isinstance(given, Mapping):
            raise DatasetError(
                f"found {type(given).__name__} ({_short(given)}) as chat_template_kwargs of row {index}; expected a mapping "
                'such as {"enable_thinking": False}; write it so'
            )
        found |= {name: value for name, value in given.items() if value is not None}
    if "tools" in row and (tools := to_tools(row["tools"], f"tools of row {index}")):
        found["tools"] = tools
    return found


def last_user_turn(messages: Sequence[Message]) -> str | None:
    """Content of the last user message, or None where there is none."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), None)


def reward_columns(row: Row, columns: Sequence[str], consumed: Iterable[str] = ()) -> dict[str, Any]:
    """The columns that a reward may name, the same keys for every row: all but the consumed and the reserved ones.

    A reference answer in a column called `response` is given as `completion`, for `response` is what the model wrote.
    """
    hidden = RESERVED | set(consumed)
    kept = {column: row.get(column) for column in columns if column not in hidden}
    if "response" in columns and "response" not in consumed and "completion" not in columns:
        kept["completion"] = row.get("response")
    return kept


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
