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
    `templated` is False for text that must stay outside the chat template; `template_arguments` are what the row tells
    the template beside its messages, such as its tools.
    """

    prompt: str
    messages: list[Message] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    separator: str = ""
    templated: bool = True
    template_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextRow:
    """One SFT example, in exactly one of three forms.

    - `messages`: a conversation; every assistant turn is trained but those of weight 0.
    - `prompt` and `completion`, each a string or a list of messages; the completion is trained. Where the
      tokenizer has no chat template, `separator` stands between two strings.
    - `text`: plain text without any template, all of it trained.

    `template_arguments` as in `PromptRow`.
    """

    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None
    messages: list[Message] | None = None
    text: str | None = None
    separator: str = ""
    template_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferenceRow:
    """One DPO pair: a prompt (string or messages) and two answers (string, or a list of one assistant message).

    `separator`, `templated` and `template_arguments` as in `PromptRow`.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    separator: str = ""
    templated: bool = True
    template_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What became of the rows of a data set. found + split = used + the sum of dropped.

    `split` counts the examples beyond one a row: of a conversation that has to be trained turn by turn. `unused` are
    columns that nothing reads; `notes` count what else a user would want to know, by what it is.
    """

    format: str
    found: int
    used: int
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    split: int = 0
    unused: tuple[str, ...] = ()
    notes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        what = f"examples of {self.found:,} rows" if self.split else f"of {self.found:,} rows used"
        line = f"{self.used:,} {what} ({self.format})"
        if self.dropped:
            line += "; left out: " + ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.dropped.items()))
        if self.truncated:
            line += f"; truncated: {self.truncated:,}"
        if self.unused:
            line += f"; columns not used: {', '.join(str(name).strip() or '(without a name)' for name in self.unused)}"
        for note, count in sorted(self.notes.items()):
            line += f"\nnote, {count:,} time{'s' if count > 1 else ''}: {note}"
        return line
