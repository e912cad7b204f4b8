"""What a chat template is like, measured by rendering: what ends the assistant's turn, how it wants tool calls, how its
own text begins. Nothing is read from the template's source or from the model's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl.data.rows import Message

QUESTION, ANSWER = "\ue000question\ue001", "\ue000answer\ue001"
KEY, VALUE = "probe_key", "probe value"

Render = Callable[..., str | None]
"""Renders messages (`answer`: up to the assistant's next turn), or gives None where the template refuses them."""


@dataclass(frozen=True)
class TokenPatterns:
    """Regular expressions for the tokens of a tokenizer that are more than text: special ones, and all added ones."""

    special: tuple[str, ...]
    added: tuple[str, ...]
    eos: str | None

    @classmethod
    def of(cls, tokenizer: Any) -> TokenPatterns:
        decoder = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in decoder if token.special} | set(tokenizer.all_special_tokens)
        added = {token.content for token in decoder} | special
        longest_first = [tuple(sorted(filter(None, found), key=len, reverse=True)) for found in (special, added)]
        return cls(*longest_first, tokenizer.eos_token)

    def end_of_turn(self, tokens: Sequence[str]) -> re.Pattern[str]:
        """What may end a turn: one of these tokens; where several special ones follow each other up to the EOS, as in
        Command R, all of them.
        """
        either = "|".join(map(re.escape, tokens)) or "(?!)"
        to_eos = rf"(?:{either})*?{re.escape(self.eos)}" if self.eos else "(?!)"
        return re.compile(rf"\s*?(?:{to_eos}|{either})")


def end_of_turn(render: Render, patterns: TokenPatterns) -> str:
    """The text of the tokens that the template writes at the end of the assistant's last turn; "" where there are none.

    Any added token counts, for some tokenizers do not call theirs special.
    """
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    for messages in ([question, answer], [{"role": "system", "content": "Be kind."}, question, answer]):
        text = render(messages)
        if text is not None and text.count(ANSWER) == 1:
            found = patterns.end_of_turn(patterns.added).match(text.partition(ANSWER)[2])
            return found.group().strip() if found else ""
    return ""


def last_token(tokenizer: Any, text: str) -> int | None:
    """The id of the last token of an end of turn, which is what a completion ends with; None for no text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return int(ids[-1]) if ids else None


# --- tool calls


@dataclass(frozen=True)
class CallForm:
    """How a template wants tool calls: within {"function": …} or flat, arguments as JSON text or as a mapping."""

    flat: bool
    as_text: bool

    def write(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A tool call of OpenAI's form with a mapping of arguments, in this form."""
        function = dict(call["function"])
        if self.as_text and not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        rest = {name: value for name, value in call.items() if name != "function"}
        return {**rest, **function} if self.flat else {**rest, "function": function}


FORMS = tuple(CallForm(flat, as_text) for flat in (False, True) for as_text in (False, True))


def call_form(render: Render) -> CallForm:
    """The first form in which the template writes a call's name and arguments as they are; OpenAI's where there is none.

    A mapping that comes out as Python prints it, or text that is quoted once more, is not as it is.
    """
    call = {"id": "call00001", "type": "function", "function": {"name": "probe_name", "arguments": {KEY: VALUE}}}
    for form in FORMS:
        asked: list[Message] = [{"role": "user", "content": QUESTION}]
        text = render([*asked, {"role": "assistant", "content": "", "tool_calls": [form.write(call)]}])
        if text is None or not all(part in text for part in ("probe_name", KEY, VALUE)):
            continue
        if f"'{KEY}'" not in text and f'\\"{KEY}' not in text:
            return form
    return FORMS[0]


# --- text that the template has written already


def beginning_and_end(render: Render, patterns: TokenPatterns, bos: str | None) -> tuple[str, str]:
    """The special token that a conversation of the template begins with, after the BOS, and what it writes after the
    user's last turn, where the answer begins; "" for what there is not.
    """
    text = render([{"role": "user", "content": QUESTION}], answer=True)
    if text is None or text.count(QUESTION) != 1:
        return "", ""
    before, _, after = text.partition(QUESTION)
    before = before.lstrip().removeprefix(bos or "").lstrip()
    first = next((token for token in patterns.special if before.startswith(token)), "")
    return first, after.strip()
