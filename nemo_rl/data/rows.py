"""The rows that the three algorithms train on, whatever shape the data set had, and the count of what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class PromptRow:
    """One GRPO prompt.

    `prompt` is the data set's own string, without template (of a conversation: its last user turn); `messages` is the
    conversation where the data set has one, else None; `columns` are the other columns, by their own names, for
    the reward to read. Where the tokenizer has no chat template, `separator` follows a string prompt.
    `templated` is False for text that must stay outside the chat template.
    """

    prompt: str
    messages: list[Message] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    separator: str = ""
    templated: bool = True


@dataclass(frozen=True)
class TextRow:
    """One SFT example, in exactly one of three forms.

    - `messages`: a conversation; every assistant turn is trained.
    - `prompt` and `completion`, each a string or a list of messages; the completion is trained. Where the
      tokenizer has no chat template, `separator` stands between two strings.
    - `text`: plain text without any template, all of it trained.
    """

    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None
    messages: list[Message] | None = None
    text: str | None = None
    separator: str = ""


@dataclass(frozen=True)
class PreferenceRow:
    """One DPO pair: a prompt (string or messages) and two answers (string, or a list of one assistant message).

    `separator` and `templated` as in `PromptRow`.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    separator: str = ""
    templated: bool = True


@dataclass(frozen=True)
class Report:
    """What became of the rows of a data set. found = used + the sum of dropped."""

    format: str
    found: int
    used: int
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0

    def __str__(self) -> str:
        line = f"{self.used:,} of {self.found:,} rows used ({self.format})"
        if self.dropped:
            line += "; left out: " + ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.dropped.items()))
        if self.truncated:
            line += f"; truncated: {self.truncated:,}"
        return line
