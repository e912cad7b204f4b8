"""Conversations as text: the tokenizer's chat template, and where in its output the assistant speaks.

Stock templates do not mark the assistant's text, so its place is found in two independent ways, each of which either
proves its answer or gives none: by rendering the conversation up to each turn, and by rendering it with place-holders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl.data.clock import clock_arguments
from nemo_rl.data.rows import Message
from nemo_rl.data.segments import Passage, Segment
from nemo_rl.errors import DatasetError


@dataclass(frozen=True)
class Span:
    """What the assistant writes in one turn: characters start to stop of the rendered text, end token included."""

    start: int
    stop: int
    has_end_token: bool


class Template:
    """A tokenizer's way of writing conversations. Without a chat template, each turn is written as it stands:
    a newline after every other turn, the EOS after an assistant turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.exists = bool(getattr(tokenizer, "chat_template", None))
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        ordered = sorted(filter(None, special), key=len, reverse=True)
        self._special = tuple(ordered)
        any_special = "|".join(map(re.escape, ordered)) or "(?!)"
        # Where several special tokens end a turn, as in Command R, those up to the EOS belong to it.
        to_eos = rf"(?:{any_special})*?{re.escape(tokenizer.eos_token)}" if tokenizer.eos_token else "(?!)"
        self._end_token = re.compile(rf"\s*?(?:{to_eos}|{any_special})")

    # --- passages

    def prompt(self, messages: Sequence[Message]) -> Passage:
        """The conversation up to where the assistant is to answer; nothing of it trained."""
        if not self.exists:
            return Passage(tuple(_plain_turns(messages, len(messages))), opens=True)
        return Passage((Segment(self.render(messages, answer=True), False),), opens=False)

    def conversation(self, messages: Sequence[Message], first: int) -> Passage:
        """The conversation, trained on the assistant turns from message `first` on, each with its end token.

        What follows the last trained token is left out.
        Raises `DatasetError` if no turn would be trained, or the template hides where the assistant speaks.
        """
        if not any(m["role"] == "assistant" for m in messages[first:]):
            roles = ", ".join(m["role"] for m in messages) or "no message"
            raise DatasetError(
                f"found nothing to train on in a conversation of {roles}: its loss mask would be all zero; expected an "
                'assistant turn; add one, or rename the roles to "user" and "assistant"'
            )
        if not self.exists:
            return Passage(tuple(_until_last_trained(_plain_turns(messages, first))), opens=True)
        full = self.render(messages)
        spans = self._spans_by_prefix(full, messages, first)
        if spans is None:
            spans = self._spans_by_placeholder(full, messages, first)
        if spans is None:
            raise DatasetError(
                "found a chat template that rewrites or leaves out text of the conversation (for example thinking), so "
                "that the assistant's words cannot be told from the rest of the conversation starting "
                f"{_shown(messages)}; expected each turn to stay as written; leave out what the template removes, "
                "or split the conversation so that it ends with the one turn to train"
            )
        return Passage(tuple(_segments(full, spans)), opens=False)

    def render(self, messages: Sequence[Message], answer: bool = False) -> str:
        """The text of a conversation; with `answer`, up to where the assistant's next turn begins."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer, **clock_arguments(self._tokenizer)
            )
            return text
        except Exception as error:  # A template is a program of its author's, and fails in its own ways.
            raise DatasetError(
                f"found a conversation that the model's chat template refuses: {type(error).__name__}: {error}; it "
                f"starts {_shown(messages)} (roles: {', '.join(m['role'] for m in messages)}); expected roles and "
                "an order that the template knows; change the data or the template"
            ) from error

    def _try_render(self, messages: Sequence[Message], answer: bool = False) -> str | None:
        try:
            return self.render(messages, answer)
        except DatasetError:
            return None

    # --- first way: what the conversation up to a turn adds to the conversation before it

    def _spans_by_prefix(self, full: str, messages: Sequence[Message], first: int) -> list[Span] | None:
        spans = []
        for index in range(first, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            before = self._try_render(messages[:index], answer=True)
            upto = full if index == len(messages) - 1 else self._try_render(messages[: index + 1])
            if before is None or upto is None or not upto.startswith(before) or not full.startswith(upto):
                return None
            span = self._written(full, len(before), len(upto), messages[index])
            if span is None:
                return None
            spans.append(span)
        return spans

    def _written(self, full: str, start: int, stop: int, message: Message) -> Span | None:
        """The part of full[start:stop] that the assistant writes: without scaffold of the template's before it
        (such as an empty thinking block), up to the end token.
        """
        turn = full[start:stop]
        body, content = self._without_tail(turn), message["content"].strip()
        end_token = self._end_token.match(turn, len(body))
        finish = start + (end_token.end() if end_token else len(body))
        answer = content.rpartition("</think>")[2].strip()
        reasoning = str(message.get("reasoning_content") or message.get("thinking") or "").strip()
        if answer != content and not body.endswith(content):
            reasoning = content.rpartition("</think>")[0].replace("<think>", "", 1).strip()
            content = answer
        if not body.endswith(content):
            return None
        lead = body[: len(body) - len(content)]
        if reasoning and reasoning not in lead:
            return None
        written = not lead.strip() or bool(reasoning) or bool(message.get("tool_calls"))
        return Span(start if written else start + len(lead), finish, end_token is not None)

    def _without_tail(self, turn: str) -> str:
        """A turn without the special tokens and white space at its end."""
        body = turn.rstrip()
        while body.endswith(self._special):
            token = next(token for token in self._special if body.endswith(token))
            body = body.removesuffix(token).rstrip()
        return body

    # --- second way: where place-holders come out

    def _spans_by_placeholder(self, full: str, messages: Sequence[Message], first: int) -> list[Span] | None:
        """Spans of the contents, proved by putting them in the place of the place-holders and getting `full`."""
        marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
        scaffold = self._try_render([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
        if scaffold is None or any(scaffold.count(mark) != 1 for mark in marks):
            return None
        if any(m.get("tool_calls") or m.get("reasoning_content") for m in messages):
            # They are written outside the content, where no place-holder shows them.
            return None
        pieces = re.split("\ue000(\\d+)\ue001", scaffold)
        position, spans = len(pieces[0]), []
        if not full.startswith(pieces[0]):
            return None
        for mark, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            index = int(mark)
            content = messages[index]["content"]
            for form in (content, content.strip()):
                if full.startswith(form + literal, position):
                    break
            else:
                return None
            stop = position + len(form)
            if messages[index]["role"] == "assistant" and index >= first:
                end_token = self._end_token.match(literal)
                spans.append(Span(position, stop + (end_token.end() if end_token else 0), end_token is not None))
            position = stop + len(literal)
        return sorted(spans, key=lambda span: span.start) if position == len(full) else None


def _plain_turns(messages: Sequence[Message], first: int) -> list[Segment]:
    return [
        Segment(m["content"], trained=index >= first, closes=True)
        if m["role"] == "assistant"
        else Segment(m["content"] + "\n", trained=False)
        for index, m in enumerate(messages)
    ]


def _until_last_trained(segments: list[Segment]) -> list[Segment]:
    last = max(index for index, segment in enumerate(segments) if segment.trained)
    return segments[: last + 1]


def _segments(full: str, spans: Sequence[Span]) -> list[Segment]:
    segments, position = [], 0
    for number, span in enumerate(spans):
        # A template without end tokens would never teach the model to stop, so the EOS closes the last turn.
        closes = number == len(spans) - 1 and not span.has_end_token
        segments.append(Segment(full[position : span.start], trained=False))
        segments.append(Segment(full[span.start : span.stop], trained=True, closes=closes))
        position = span.stop
    return segments


def _shown(messages: Sequence[Message]) -> str:
    content = messages[0]["content"] if messages else ""
    return repr(content if len(content) <= 60 else content[:57] + "...")
