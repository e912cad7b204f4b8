"""Reading single cells of a row: text, conversations, and the columns that a reward may see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nemo_rl.data.rows import Message, Row
from nemo_rl.errors import DatasetError

# A reward receives these by position or meaning (the prompt, the sampled response, the conversation), so a column of
# the same name cannot be passed beside them.
RESERVED = frozenset({"prompt", "prompts", "response", "responses", "messages"})

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Columns that hold a value in at least one row, in order of first appearance.

    A column that is null everywhere is none: Arrow tables invent such columns when rows of several shapes are merged.
    """
    seen: dict[str, None] = {}
    for row in rows:
        for column, value in row.items():
            if value is not None and column not in seen:
                seen[column] = None
    return list(seen)


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
        if value is None:
            continue
        found = kind(value)
        if found not in allowed:
            raise DatasetError(
                f"found {found} ({_short(value)}) in column {column!r} of row {index}; expected "
                f"{' or '.join(_KIND_WORDS[k] for k in allowed)}; convert the column, for example with str()"
            )
        if first is None:
            first = (index, found)
        elif found != first[1]:
            raise DatasetError(
                f"column {column!r} mixes types: {_KIND_WORDS[first[1]]} in row {first[0]}, {_KIND_WORDS[found]} in "
                f"row {index}; expected one kind throughout; convert the rows to one shape"
            )


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


def to_messages(value: Sequence[Any], where: str) -> list[Message]:
    """Messages as {"role", "content", ...}, from either that form or ShareGPT's {"from", "value"}.

    Content given as a list of text parts is joined; null fields are left out. The input is not changed.
    Raises `DatasetError` for anything that is not a message, and for content that is not text.
    """
    messages = []
    for position, message in enumerate(value):
        at = f"message {position} in {where}"
        if not isinstance(message, dict):
            raise DatasetError(
                f"found {type(message).__name__} ({_short(message)}) as {at}; expected a mapping such as "
                '{"role": "user", "content": "Hello"}; wrap each turn in such a mapping'
            )
        messages.append(_message(message, at))
    return messages


def _message(message: Message, at: str) -> Message:
    if "from" in message and "role" not in message:
        role = _SHAREGPT_ROLES.get(str(message["from"]).lower())
        if role is None:
            raise DatasetError(
                f"found from={message['from']!r} in {at}; expected one of {', '.join(_SHAREGPT_ROLES)}; rename the role"
            )
        message = {"role": role, "content": message.get("value")}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise DatasetError(
            f"found no role in {at} (its fields: {', '.join(map(str, message)) or 'none'}); expected "
            '{"role": "user", "content": "Hello"} or {"from": "human", "value": "Hello"}; add the role'
        )
    if isinstance(content, (list, tuple)):
        content = _joined_parts(content, at)
    if content is None and (message.get("tool_calls") or role == "assistant"):
        content = ""
    if not isinstance(content, str):
        raise DatasetError(f"found {kind(content)} as the content of {at}; expected text; convert it to a string")
    extras = {k: v for k, v in message.items() if v is not None and k not in ("role", "content")}
    return {"role": role, "content": content, **extras}


def _joined_parts(parts: Iterable[Any], at: str) -> str:
    texts = []
    for part in parts:
        content = part.get("text") if isinstance(part, dict) else part
        if not isinstance(content, str):
            found = part.get("type", "an unknown part") if isinstance(part, dict) else type(part).__name__
            raise DatasetError(f"found {found} in the content of {at}; expected text only; remove such parts")
        texts.append(content)
    return "".join(texts)


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
