"""Conversations in the forms in which rows hold them (OpenAI, ShareGPT, Arrow, JSON text), read into one form."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_rl.data.rows import Message
from nemo_rl.errors import DatasetError

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which messages, and templates, keep what the assistant thought before its answer."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
_ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = frozenset({"human", "gpt", "chatgpt", "model", "bot", "function"})
"""Names of ShareGPT, of OpenAI's earlier functions and others for these roles, which are read under "role" too."""
_TRAINED = ("train", "training", "trainable", "loss")
"""Flags of a message (Axolotl, ms-swift) that mean a weight of 1 or 0."""
_CALL_KEYS = ("name", "id", "type", "index", "function", "tool_call_id", "call_id")
_ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs")
"""Names under which tool calls hold their arguments: OpenAI's and Llama's, LangChain's, Anthropic's."""
_KNOWN = frozenset({"role", "content", "from", "value", "name", "id", "tool_call_id", "type", "weight", *REASONING})
_LOOKS_LIKE_ONE = re.compile(r"""\s*\[?\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")


def is_missing(value: Any) -> bool:
    """Whether a cell holds no value: null, or the NaN that pandas writes in its place."""
    return value is None or (isinstance(value, float) and value != value)


def read_cell(value: Any, where: str) -> Any:
    """A cell that may hold a conversation, as a list of messages where it holds one: written as JSON or as Python
    prints it (as tables of chats do), as an array, or as a single message. Anything else is returned as it is.

    Raises `DatasetError` for text that begins like a conversation but cannot be read as one.
    """
    if is_missing(value):
        return None
    if hasattr(value, "tolist") and type(value).__module__.partition(".")[0] == "numpy":
        value = value.tolist()
    if isinstance(value, str) and _LOOKS_LIKE_ONE.match(value):
        value = _parsed(value, where)
    return [value] if _is_message(value) else value


def _parsed(text: str, where: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if _is_message(found) or (isinstance(found, list) and all(map(_is_message, found))):
            return found
        return text  # Some other structure, which the text may well be about.
    if text.lstrip().startswith("["):
        raise DatasetError(
            f"found text that begins like a conversation in {where} ({_short(text)}), but is neither JSON nor a list as "
            "Python prints it; expected a list of messages; write the column with json.dumps(messages)"
        )
    return text


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return ("role" in value and bool(value.keys() & {"content", "tool_calls"})) or {"from", "value"} <= value.keys()


def to_messages(value: Sequence[Any], where: str) -> list[Message]:
    """Messages as {"role", "content", ...}, from either that form or ShareGPT's {"from", "value"}.

    Content given as a list of text parts is joined; null fields are left out, also within tool calls, which get OpenAI's
    form with their arguments as a mapping. The input is not changed.
    Raises `DatasetError` for anything that is not a message, and for content that is not text.
    """
    messages = []
    for position, message in enumerate(value):
        at = f"message {position} in {where}"
        if not isinstance(message, Mapping):
            raise DatasetError(
                f"found {type(message).__name__} ({_short(message)}) as {at}; expected a mapping such as "
                '{"role": "user", "content": "Hello"}; wrap each turn in such a mapping'
            )
        messages.append(_message(message, at))
    return messages


def _message(message: Mapping[str, Any], at: str) -> Message:
    found = {k: v for k, v in message.items() if not is_missing(v)}
    if "from" in found and "role" not in found:
        found = _from_sharegpt(found, at)
    role, content = found.pop("role", None), found.pop("content", None)
    if not isinstance(role, str) or not role:
        raise DatasetError(
            f"found no role in {at} (its fields: {', '.join(map(str, message)) or 'none'}); expected "
            '{"role": "user", "content": "Hello"} or {"from": "human", "value": "Hello"}; add the role'
        )
    if role not in _ROLES and (role.strip().lower() in _OTHER_NAMES or role.strip().lower() in _ROLES):
        role = _SHAREGPT_ROLES[role.strip().lower()]
    content = _as_list(content)
    if isinstance(content, (list, tuple)):
        content = _joined_parts(content, at)
    for flag in _TRAINED:
        if isinstance(found.get(flag), (bool, int)) and found[flag] in (0, 1):
            found.setdefault("weight", int(found.pop(flag)))
    calls = _tool_calls(found.pop("tool_calls", None), found.pop("function_call", None), at)
    if content is None and (calls or role == "assistant"):
        content = _no_content(found, calls, at)
    if not isinstance(content, str):
        kind = "no text" if content is None else type(content).__name__
        raise DatasetError(f"found {kind} as the content of {at}; expected text; {_content_cure(content)}")
    if isinstance(found.get("weight"), bool):
        found["weight"] = int(found["weight"])
    _check_weight(found, at)
    return {"role": role, "content": content, **found, **({"tool_calls": calls} if calls else {})}


def _content_cure(content: Any) -> str:
    if content is None:
        return 'give "" where the turn is meant to be empty, or leave the message out'
    return "write it as JSON text, json.dumps(content)" if isinstance(content, Mapping) else "convert it to a string"


def _from_sharegpt(message: dict[str, Any], at: str) -> dict[str, Any]:
    name = str(message.pop("from"))
    role = _SHAREGPT_ROLES.get(name.lower())
    if role is None:
        raise DatasetError(
            f"found from={name!r} in {at}; expected one of {', '.join(_SHAREGPT_ROLES)}; rename the role"
        )
    value = message.pop("value", None)
    if name.lower() == "function_call" and value is not None:
        return {"role": role, "tool_calls": value, **message}
    return {"role": role, "content": value, **message}


def _no_content(message: Message, calls: list[Any], at: str) -> str:
    """ "" for an assistant's turn without text; `DatasetError` where its text stands under a name that nobody reads."""
    if calls or any(message.get(name) for name in REASONING):
        return ""
    others = [k for k, v in message.items() if k not in _KNOWN and isinstance(v, str) and v.strip()]
    if others:
        raise DatasetError(
            f"found no content in {at}, but text under {', '.join(map(repr, others))}; expected the text under 'content' "
            "(or 'value', with 'from'); rename the field"
        )
    return ""


def _check_weight(message: Message, at: str) -> None:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DatasetError(
            f"found weight {weight!r} in {at}; expected 0 (do not train this turn) or 1; round the weights, or repeat "
            "rows that are to count more"
        )


def is_trained(message: Message) -> bool:
    """Whether a message is an assistant's that is to be trained: not of weight 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def is_empty(message: Message) -> bool:
    """Whether a message says nothing: no text, no thinking, no tool call."""
    return not (message["content"].strip() or message.get("tool_calls") or any(message.get(name) for name in REASONING))


_PARTS = {
    "tool_use": 'write it as "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}] beside '
    "the content",
    "tool_result": 'write it as a message of its own, {"role": "tool", "content": "..."}',
    "thinking": 'write it as "reasoning_content": "..." beside the content',
}


def _joined_parts(parts: Iterable[Any], at: str) -> str:
    texts = []
    for part in parts:
        content = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(content, str):
            found = part.get("type", "an unknown part") if isinstance(part, Mapping) else type(part).__name__
            cure = _PARTS.get(found, "remove such parts")
            raise DatasetError(f"found {found} in the content of {at}; expected text only; {cure}")
        texts.append(content)
    return "".join(texts)


# --- tools and their calls


def _tool_calls(calls: Any, legacy: Any, at: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, arguments as a mapping where their text is one. Nulls that Arrow fills in are left
    out; one within arguments written as text is the author's own, and stays.
    """
    calls, legacy = _as_list(calls), _as_list(legacy)
    if calls and legacy:
        raise DatasetError(
            f"found both tool_calls and function_call in {at}; expected one of them; leave out function_call, whose form is "
            "that of an earlier API"
        )
    if not calls:
        calls = [legacy] if legacy else []
    calls = _from_json(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, (list, tuple)):
        raise DatasetError(
            f"found {type(calls).__name__} ({_short(calls)}) as the tool calls of {at}; expected a list of "
            '{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}; write them so'
        )
    return [_tool_call(_from_json(call), at) for call in calls if not is_missing(call)]


def _tool_call(call: Any, at: str) -> dict[str, Any]:
    call = without_nulls(call)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise DatasetError(
            f"found a tool call without a name ({_short(call)}) in {at}; expected "
            '{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}; add the name of the function'
        )
    given = [key for key in _ARGUMENTS if key in function]
    unread = [str(key) for key in function if key not in (*_CALL_KEYS, *_ARGUMENTS)]
    if len(given) > 1 or (unread and not given):
        raise DatasetError(
            f"found {', '.join(map(repr, given or unread))} in the tool call {name!r} of {at}; expected its arguments under "
            "'arguments' alone; rename the field, and take out what is no argument"
        )
    arguments = function[given[0]] if given else {}
    if isinstance(arguments, str):
        arguments = _arguments(arguments, at) if arguments.strip() not in ("", "null") else {}
    ids = {"id": call["id"]} if "id" in call else {}
    return {**ids, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(text: str, at: str) -> Any:
    """Arguments written as text: JSON, or a mapping as Python prints it; text that begins like neither is the author's own."""
    if text.lstrip()[:1] not in ("{", "["):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise DatasetError(
        f"found arguments of a tool call that are no JSON ({_short(text)}) in {at}; expected a mapping, or its JSON text such "
        'as {"x": 1}; write them with json.dumps'
    )


def to_tools(value: Any, where: str) -> list[Any] | None:
    """The tools that a row offers, a list of JSON schemas, from that or its JSON text; None where there are none.

    Nulls that Arrow fills in are left out. Raises `DatasetError` for what is no list of mappings.
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    tools = _from_json(_as_list(value))
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, (list, tuple)) or not all(isinstance(_from_json(tool), Mapping) for tool in tools):
        raise DatasetError(
            f"found {_short(value)} as {where}; expected a list of tools such as "
            '[{"type": "function", "function": {"name": "f", "parameters": {}}}], or that list as JSON text; '
            "correct the column, or rename it if it is something else"
        )
    found = [without_nulls(_from_json(tool)) for tool in tools]
    for tool in found:
        function = tool.get("function", tool)
        if not (tool.get("type") or (isinstance(function, Mapping) and function.get("name"))):
            raise DatasetError(
                f"found a tool without a name ({_short(tool)}) in {where}; expected a list of tools such as "
                '[{"type": "function", "function": {"name": "f", "parameters": {}}}]; write each so'
            )
    return found or None


def _as_list(value: Any) -> Any:
    """An array of numpy, which pandas makes of Parquet's lists, as a list; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def without_nulls(value: Any) -> Any:
    """A copy without the keys that are null, at any depth: Arrow gives each row the keys of all."""
    value = _as_list(value)
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if not is_missing(v)}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    """What JSON text says, where it is the text of a mapping or a list; else the value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
