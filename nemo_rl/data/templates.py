"""Conversations as text: the tokenizer's chat template, and where in its output the assistant speaks.

Stock templates do not mark the assistant's text, so its place is found in two independent ways, each of which either
proves its answer or gives none: by rendering the conversation up to each turn, and by rendering it with place-holders.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nemo_rl.data import probes
from nemo_rl.data.clock import clock_arguments
from nemo_rl.data.conversations import REASONING, is_trained
from nemo_rl.data.rows import Message
from nemo_rl.data.segments import Passage, Segment
from nemo_rl.data.shown import Shown, answer_of, hidden, hidden_fields, reasoning_of
from nemo_rl.errors import DatasetError

NO_ARGUMENTS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Span:
    """What the assistant writes in one turn: characters start to stop of the rendered text, end token included."""

    start: int
    stop: int
    has_end_token: bool


class Template:
    """A tokenizer's way of writing conversations. Without a chat template, each turn is written as it stands:
    a newline after every other turn, the EOS after an assistant turn.

    `notes` counts what was found on the way and a user would want to know, by what it is.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        """`arguments` go to every rendering (`enable_thinking` and the like); those of a row have precedence."""
        self.tokenizer = tokenizer
        self._arguments = dict(arguments or {})
        self.exists = bool(getattr(tokenizer, "chat_template", None))
        self.notes: Counter[str] = Counter()
        self._unwritten: dict[Any, int | None] = {}
        self._patterns = probes.TokenPatterns.of(tokenizer)

    # --- what it is like

    @cached_property
    def end_text(self) -> str:
        """What the template writes at the end of the assistant's turn, such as <|im_end|>; "" for nothing."""
        return probes.end_of_turn(self._try_apply, self._patterns) if self.exists else ""

    @cached_property
    def end_token(self) -> int | None:
        """The id of the token that ends the assistant's turn; None where the template writes none."""
        return probes.last_token(self.tokenizer, self.end_text)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """Tokens that may end a turn, the longest first."""
        return tuple(sorted({*self._patterns.special, *filter(None, [self.end_text])}, key=len, reverse=True))

    @cached_property
    def _end_of_turn(self) -> re.Pattern[str]:
        return self._patterns.end_of_turn(self._ends)

    @cached_property
    def _call_form(self) -> probes.CallForm:
        return probes.call_form(self._try_apply)

    @cached_property
    def _borders(self) -> tuple[str, str]:
        return probes.beginning_and_end(self._try_apply, self._patterns, self.tokenizer.bos_token)

    def has_written(self, text: str) -> bool:
        """Whether this text has been through the template already: it begins or ends as the template's own do."""
        if not self.exists:
            return False
        first, last = self._borders
        bare = text.strip().removeprefix(self.tokenizer.bos_token or "").lstrip()
        return bool((first and bare.startswith(first)) or (last and bare.endswith(last)))

    # --- passages

    def prompt(self, messages: Sequence[Message], arguments: Mapping[str, Any] = NO_ARGUMENTS) -> Passage:
        """The conversation up to where the assistant is to answer; nothing of it trained."""
        if not self.exists:
            self._without_template(messages, arguments)
            return Passage(tuple(_plain_turns(messages, len(messages))), opens=True)
        text = self.render(messages, answer=True, arguments=arguments)
        self._check(text, messages, arguments, untrained=messages)
        return Passage((Segment(text, False),), opens=False)

    def conversation(
        self, messages: Sequence[Message], first: int, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> list[Passage]:
        """The conversation, trained on the assistant turns from message `first` on that have weight, each with its end
        token. What follows the last trained token is left out.

        Several passages, one for each trained turn, where the template rewrites a turn once others follow it (as those
        do that remove earlier thinking): each turn is then trained as the model will have to write it.
        Raises `DatasetError` if no turn would be trained, or the template hides what the conversation says.
        """
        trained = [index for index in range(first, len(messages)) if is_trained(messages[index])]
        if not trained:
            roles = ", ".join(m["role"] for m in messages) or "no message"
            raise DatasetError(
                f"found nothing to train on in a conversation of {roles}: its loss mask would be all zero; expected an "
                'assistant turn; add one, or rename the roles to "user" and "assistant"'
            )
        messages = messages[: trained[-1] + 1]
        if not self.exists:
            self._without_template(messages, arguments)
            return [Passage(tuple(_plain_turns(messages, first)), opens=True)]
        full = self.render(messages, arguments=arguments)
        spans = self._spans_by_prefix(full, messages, trained, arguments)
        if spans is None:
            spans = self._spans_by_placeholder(full, messages, trained, arguments)
        if spans is not None:
            untrained = [m for index, m in enumerate(messages) if index not in trained]
            self._check(full, messages, arguments, untrained)
            return [Passage(tuple(_segments(full, spans)), opens=False)]
        return [self._turn(messages[: index + 1], arguments) for index in trained]

    def _turn(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> Passage:
        """The conversation with its last turn alone trained."""
        full = self.render(messages, arguments=arguments)
        last = [len(messages) - 1]
        spans = self._spans_by_prefix(full, messages, last, arguments)
        if spans is None:
            spans = self._spans_by_placeholder(full, messages, last, arguments)
        self._check(full, messages, arguments)
        if spans is None:
            raise DatasetError(
                "found a chat template that rewrites or leaves out what the assistant says, so that its words cannot be "
                f"told from the rest of the conversation starting {_shown(messages)} (its turn: "
                f"{_shown(messages[-1:])}); expected each turn to stay as written; give a template that writes it so "
                "(chat_template=...), or take out of the row what the template removes"
            )
        return Passage(tuple(_segments(full, spans)), opens=False)

    def _without_template(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> None:
        if arguments.get("tools") or any(m.get("tool_calls") for m in messages):
            raise DatasetError(
                f"found tools in the conversation starting {_shown(messages)}, but a tokenizer without a chat template; "
                "expected a template, for nothing else says how tools are written; give one with chat_template=..., or "
                "take a model that has one"
            )
        self.notes[
            "a conversation was written as bare lines without roles, for the tokenizer has no chat template; "
            "give one with chat_template=..., or take a model that has one (mostly its -Instruct version)"
        ] += 1

    def _check(
        self,
        text: str,
        messages: Sequence[Message],
        arguments: Mapping[str, Any],
        untrained: Sequence[Message] = (),
    ) -> None:
        """Raises `DatasetError` where the template shows less than the row says; thinking of untrained turns is noted."""
        shown = Shown(text)
        tools = {**self._arguments, **arguments}.get("tools") or ()
        # Short words may stand in the text for another reason, so it is also asked what the template leaves out as such.
        lost = next(hidden(shown, messages, tools), None) or self._left_out(messages, tools, arguments)
        if lost:
            raise DatasetError(
                f"found a chat template that leaves out or rewrites {lost}, of the conversation starting {_shown(messages)}; expected "
                "all that a row says to be written; give a template that writes it (chat_template=...), or take it out "
                "of the row"
            )
        if written := next((m for m in messages if m["role"] == "user" and self.has_written(m["content"])), None):
            raise DatasetError(
                f"found a user's message that holds a conversation as the chat template writes it ({_shown([written])}); "
                "expected the user's words alone; give the turns as messages, or the whole text as the column prompt or text"
            )
        if any(m["role"] == "assistant" and reasoning_of(m) not in shown for m in untrained):
            self.notes["the chat template removes the thinking of earlier turns, which are not trained"] += 1
        if fields := hidden_fields(shown, messages):
            self.notes[f"the chat template does not show these fields of messages: {', '.join(sorted(fields))}"] += 1

    def _left_out(self, messages: Sequence[Message], tools: Sequence[Any], arguments: Mapping[str, Any]) -> str | None:
        """What a template leaves out of conversations of these roles, whatever their words: a phrase, or None for nothing."""
        forms = tuple((m["role"], bool(m["content"].strip()), bool(m.get("tool_calls"))) for m in messages)
        key = (forms, tuple(sorted(arguments)))
        if key not in self._unwritten:
            marks = [f"zq{index}qz" for index in range(len(messages))]
            marked = [
                {**m, "content": mark} if m["content"].strip() else m for m, mark in zip(messages, marks, strict=True)
            ]
            text = self._try_render(marked, arguments=arguments)
            missing = [i for i, mark in enumerate(marks) if forms[i][1] and text is not None and mark not in text]
            self._unwritten[key] = missing[0] if missing else None
        if (position := self._unwritten[key]) is not None:
            role, content = messages[position]["role"], _shown(messages[position : position + 1])
            return f"the text of message {position} ({role}), {content}"
        nested = [isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping) for tool in tools]
        if (True in nested and not self._writes_tools[1]) or (False in nested and not any(self._writes_tools)):
            return "the tools"
        return None

    @cached_property
    def _writes_tools(self) -> tuple[bool, bool]:
        """Whether the template writes tools in the flat form, and in OpenAI's."""
        flat = {"name": "probe_name", "description": "probe", "parameters": {"type": "object", "properties": {}}}

        def written(tool: Mapping[str, Any]) -> bool:
            question = {"role": "user", "content": "zq"}
            texts = [
                self._try_render(messages, arguments={"tools": [tool]})
                for messages in ([question], [{"role": "system", "content": "qz"}, question])
            ]
            return texts == [None, None] or any("probe_name" in text for text in texts if text is not None)

        return written(flat), written({"type": "function", "function": flat})

    # --- rendering

    def render(
        self, messages: Sequence[Message], answer: bool = False, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> str:
        """The text of a conversation; with `answer`, up to where the assistant's next turn begins."""
        return self._apply(self._as_asked(messages), answer, arguments)

    def _apply(
        self, messages: Sequence[Message], answer: bool = False, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=answer,
                **{**clock_arguments(self.tokenizer), **self._arguments, **arguments},
            )
            return text
        except Exception as error:  # A template is a program of its author's, and fails in its own ways.
            raise DatasetError(
                f"found a conversation that the model's chat template refuses: {type(error).__name__}: {error}; it "
                f"starts {_shown(messages)} (roles: {', '.join(m['role'] for m in messages)}); expected roles and "
                "an order that the template knows; change the data or the template"
            ) from error

    def _as_asked(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as templates want them: thinking under each of its names, tool calls in the template's form."""
        found = []
        for message in messages:
            message = {name: value for name, value in message.items() if name != "weight"}
            if thought := next((message[name] for name in REASONING if message.get(name)), None):
                message |= dict.fromkeys(REASONING, thought)
            if message.get("tool_calls") and all("function" in call for call in message["tool_calls"]):
                message["tool_calls"] = [self._call_form.write(call) for call in message["tool_calls"]]
            found.append(message)
        return found

    def _try_render(
        self, messages: Sequence[Message], answer: bool = False, arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> str | None:
        try:
            return self.render(messages, answer, arguments)
        except DatasetError:
            return None

    def _try_apply(self, messages: Sequence[Message], answer: bool = False) -> str | None:
        try:
            return self._apply(messages, answer)
        except DatasetError:
            return None

    # --- first way: what the conversation up to a turn adds to the conversation before it

    def _spans_by_prefix(
        self, full: str, messages: Sequence[Message], trained: Sequence[int], arguments: Mapping[str, Any]
    ) -> list[Span] | None:
        spans = []
        for index in trained:
            before = self._try_render(messages[:index], True, arguments)
            last = index == len(messages) - 1
            upto = full if last else self._try_render(messages[: index + 1], arguments=arguments)
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
        reasoning = reasoning_of(message) if not body.endswith(content) or _field_of_reasoning(message) else ""
        if message.get("tool_calls"):
            # They are written around the content, so that all that the turn adds is the assistant's.
            shown = Shown(body)
            finish = start + self._end_of_calls(turn)
            ends = full[start:finish].endswith(self._ends)
            return Span(start, finish, ends) if reasoning in shown and answer_of(message) in shown else None
        end_token = self._end_of_turn.match(turn, len(body))
        finish = start + (end_token.end() if end_token else len(body))
        if not body.endswith(content):
            content = answer_of(message)
        if not body.endswith(content):
            return None
        lead = body[: len(body) - len(content)]
        if reasoning and reasoning not in lead:
            # The prompt may have opened the thinking already, never have written it.
            return None
        written_lead = not lead.strip() or bool(reasoning)
        return Span(start if written_lead else start + len(lead), finish, end_token is not None)

    def _end_of_calls(self, turn: str) -> int:
        """Where a turn with tool calls ends. The special tokens of a call are no end, so the template's own end counts."""
        last = turn.rfind(self.end_text) if self.end_text else -1
        return last + len(self.end_text) if last >= 0 else len(turn.rstrip())

    def _without_tail(self, turn: str) -> str:
        """A turn without the end tokens and white space at its end."""
        body = turn.rstrip()
        while body.endswith(self._ends):
            token = next(token for token in self._ends if body.endswith(token))
            body = body.removesuffix(token).rstrip()
        return body

    # --- second way: where place-holders come out

    def _spans_by_placeholder(
        self, full: str, messages: Sequence[Message], trained: Sequence[int], arguments: Mapping[str, Any]
    ) -> list[Span] | None:
        """Spans of the contents, proved by putting them in the place of the place-holders and getting `full`."""
        if any(m.get("tool_calls") for m in messages):
            # They are written outside the content, where no place-holder shows them.
            return None
        marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
        answers = [_answer_as_written(message) for message in messages]
        marked = [
            {**m, "content": m["content"][: len(m["content"]) - len(answer)] + mark}
            for m, answer, mark in zip(messages, answers, marks, strict=True)
        ]
        scaffold = self._try_render(marked, arguments=arguments)
        if scaffold is None or any(scaffold.count(mark) != 1 for mark in marks):
            return None
        pieces = re.split("\ue000(\\d+)\ue001", scaffold)
        position, spans = len(pieces[0]), []
        if not full.startswith(pieces[0]):
            return None
        for mark, before, literal in zip(pieces[1::2], pieces[0::2], pieces[2::2], strict=False):
            index = int(mark)
            for form in (answers[index], answers[index].strip()):
                if full.startswith(form + literal, position):
                    break
            else:
                return None
            stop = position + len(form)
            if index in trained:
                start = self._start_of_thinking(full, position, before, messages, index, arguments)
                if start is None:
                    return None
                end_token = self._end_of_turn.match(literal)
                spans.append(Span(start, stop + (end_token.end() if end_token else 0), end_token is not None))
            position = stop + len(literal)
        return sorted(spans, key=lambda span: span.start) if position == len(full) else None

    def _start_of_thinking(
        self,
        full: str,
        position: int,
        before: str,
        messages: Sequence[Message],
        index: int,
        arguments: Mapping[str, Any],
    ) -> int | None:
        """Where the assistant's words of a turn begin whose answer begins at `position`, `before` being what the template
        writes before it; None where its thinking is not there.
        """
        reasoning = reasoning_of(messages[index])
        if not reasoning:
            return position
        opened = self._try_render(messages[:index], True, arguments)
        if reasoning not in before or opened is None or not full.startswith(opened) or len(opened) > position:
            return None
        return len(opened) if reasoning in full[len(opened) : position] else None


def with_template(tokenizer: Any, chat_template: str | None) -> Any:
    """The tokenizer, with this chat template in place of its own where one is given; a given tokenizer is not changed."""
    if chat_template is None or tokenizer.chat_template == chat_template:
        return tokenizer
    if "{" not in chat_template:
        raise DatasetError(
            f"found a chat_template without any Jinja in it ({chat_template[:60]!r}); expected the text of a template; of a "
            "file, give Path(...).read_text()"
        )
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = chat_template
    return changed


def end_tokens_of(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """The token that the chat template ends the assistant's turn with, measured by rendering; [] where there is none."""
    end = Template(tokenizer, chat_template_kwargs).end_token
    return [] if end is None else [end]


def _field_of_reasoning(message: Message) -> bool:
    return any(message.get(name) for name in REASONING)


def _answer_as_written(message: Message) -> str:
    """The content that a place-holder takes the place of: of an assistant's, what follows its thinking if there is any."""
    content: str = message["content"]
    thinks = message["role"] == "assistant" and bool(reasoning_of(message))
    return content.rpartition("</think>")[2].lstrip("\n") if thinks else content


def _plain_turns(messages: Sequence[Message], first: int) -> list[Segment]:
    return [
        Segment(m["content"], trained=index >= first and is_trained(m), closes=True)
        if m["role"] == "assistant"
        else Segment(m["content"] + "\n", trained=False)
        for index, m in enumerate(messages)
    ]


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
