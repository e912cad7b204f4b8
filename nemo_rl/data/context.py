"""What rows keep beside a prompt and belongs before it: a system prompt and earlier turns, in columns of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_rl.data.columns import text
from nemo_rl.data.conversations import is_missing, read_cell
from nemo_rl.data.rows import Message, Row
from nemo_rl.data.spool import like
from nemo_rl.errors import DatasetError

SYSTEM = ("system", "system_prompt", "system_message")
CONTEXT_COLUMNS = (*SYSTEM, "history", "tools", "chat_template_kwargs")
"""Columns that the prompt of a row is written with, whatever its shape."""

_PROMPTS = ("prompt", "messages", "conversations")
_ANSWERS = ("completion", "chosen", "rejected")


def read_rows(rows: Sequence[Row], columns: Sequence[str], rewarded: bool) -> Sequence[Row]:
    """The rows with conversations read from whatever form their cells have, and the system prompt and the earlier turns
    of other columns put before them. A row that has nothing of that is itself.

    `rewarded`: a completion is for a reward to read, so that it stays as it is.
    """
    cells = [c for c in (*_PROMPTS, *_ANSWERS) if c in columns and not (rewarded and c == "completion")]
    around = [column for column in (*SYSTEM, "history") if column in columns]
    if not cells:
        return rows
    found = like(rows)
    found.extend(_read(row, index, cells, bool(around)) for index, row in enumerate(rows))
    return found


def _read(row: Row, index: int, cells: Sequence[str], has_context: bool) -> Row:
    changed: dict[str, Any] = {}
    for column in cells:
        value = row.get(column)
        read = read_cell(value, f"column {column!r} of row {index}")
        if read is not value:
            changed[column] = read
    before = earlier_turns(row, index) if has_context else []
    if before:
        current = {**row, **changed}
        holders = [c for c in _PROMPTS if c in cells and current.get(c)]
        # Without a prompt, both conversations of a pair begin with it.
        for column in holders[:1] or [c for c in ("chosen", "rejected") if isinstance(current.get(c), list)]:
            changed[column] = _with_earlier(before, current[column], f"column {column!r} of row {index}")
    return {**row, **changed} if changed else row


def _with_earlier(before: list[Message], prompt: Any, where: str) -> Any:
    if isinstance(prompt, str):
        return [*before, {"role": "user", "content": prompt}]
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return prompt
    first = prompt[0]
    role = first.get("role") or first.get("from") if isinstance(first, dict) else None
    if role == "system" and before[0]["role"] == "system":
        own = first.get("content") if first.get("content") is not None else first.get("value")
        if own != before[0]["content"]:
            raise DatasetError(
                f"found a system turn in {where} and another text in the system column of the same row; expected one of "
                "them; remove or rename the column"
            )
        return [first, *before[1:], *prompt[1:]]
    if role == "system":
        return [first, *before, *prompt[1:]]
    return [*before, *prompt]


def earlier_turns(row: Row, index: int) -> list[Message]:
    """The system prompt and the earlier turns that a row keeps in columns of their own (Alpaca's `history` of question
    and answer). Raises `DatasetError` for a history of another form.
    """
    system = next((found for column in SYSTEM if (found := text(row, column)) is not None), None)
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    history = row.get("history")
    if is_missing(history):
        return turns
    history = read_cell(history.tolist() if hasattr(history, "tolist") else history, f"history of row {index}")
    for turn in history if isinstance(history, (list, tuple)) else [history]:
        pair = turn.tolist() if hasattr(turn, "tolist") else turn
        if isinstance(pair, dict):
            turns.append(pair)
        elif isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        elif pair:
            raise DatasetError(
                f"found {repr(pair)[:60]} in the history of row {index}; expected pairs of question and answer, or "
                'messages; write it as [["2+2?", "4"], ...], or rename the column if it is something else'
            )
    return turns
