"""Whether a rendered text shows all that a conversation says: what a template leaves out must not vanish in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_rl.data.conversations import REASONING
from nemo_rl.data.rows import Message

UNSEEN = frozenset({"role", "content", "weight", "tool_calls", "tool_call_id", "id", "type", *REASONING})
"""Fields of a message that are looked for by their own rules, or are no words of the conversation."""


class Shown:
    """A rendered text, asked whether it shows other texts: as they stand, as JSON writes them, but for white space."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._compact: str | None = None

    def __contains__(self, part: str) -> bool:
        part = part.strip()
        if part in self._text:
            return True
        if self._compact is None:
            self._compact = "".join(self._text.split())
        forms = (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1])
        return any("".join(form.split()) in self._compact for form in forms)


def reasoning_of(message: Message) -> str:
    """What the assistant thought before its answer: in a field of its own, or in the content before </think>."""
    for name in REASONING:
        if isinstance(message.get(name), str) and message[name].strip():
            return str(message[name]).strip()
    before, closing, _ = message["content"].rpartition("</think>")
    return before.replace("<think>", "", 1).strip() if closing else ""


def answer_of(message: Message) -> str:
    """The content of a message, of an assistant's without the thinking in it."""
    content: str = message["content"]
    return (content.rpartition("</think>")[2] if message["role"] == "assistant" else content).strip()


def hidden(text: Shown, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Iterator[str]:
    """What of these messages and tools the text does not show, but for thinking: one phrase for each."""
    for position, message in enumerate(messages):
        at = f"message {position} ({message['role']})"
        if answer_of(message) not in text:
            yield f"the text of {at}, {_short(answer_of(message))}"
        for call in message.get("tool_calls") or ():
            if missing := [leaf for leaf in _leaves(call["function"]) if leaf not in text]:
                yield f"the tool call of {at}, or its {_short(missing[0])}"
    for tool in tools:
        if isinstance(tool, Mapping):
            function = tool.get("function", tool)
            name = str((isinstance(function, Mapping) and function.get("name")) or tool.get("type") or "")
            if name and name not in text:
                yield f"the tool {name!r}"


def hidden_fields(text: Shown, messages: Sequence[Message]) -> set[str]:
    """Names of further fields that some message has and the text does not show."""
    return {
        str(name)
        for message in messages
        for name, value in message.items()
        if name not in UNSEEN and (isinstance(value, bool) or not all(leaf in text for leaf in _leaves(value)))
    }


def _leaves(value: Any) -> Iterator[str]:
    """The words of a nested value: names of its keys and its plain values, as JSON writes them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("name", "arguments"):
                yield str(key)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
