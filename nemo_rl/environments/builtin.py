"""Rewards that ship with nemo-rl: exact match, math answers, format, length, and DAPO's penalty of overlong answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from nemo_rl.environments.environment import requires_one_of
from nemo_rl.environments.math_symbols import same_mathematics
from nemo_rl.environments.math_text import final_answer, same_answer

ANSWER_COLUMNS = ("answer", "expected_answer", "ground_truth")
THINK_PATTERN = r"\s*<think>.*?</think>\s*\S.*"
LENGTH_TARGET = 100


@requires_one_of(*ANSWER_COLUMNS)
def exact_match(
    prompt: str, response: str, answer: Any = None, expected_answer: Any = None, ground_truth: Any = None
) -> float:
    """1 if the response is the reference answer but for white space at the ends and between words, else 0."""
    reference = _reference(answer, expected_answer, ground_truth)
    return float(" ".join(response.split()) == " ".join(reference.split()))


@requires_one_of(*ANSWER_COLUMNS)
def math_answer(
    prompt: str, response: str, answer: Any = None, expected_answer: Any = None, ground_truth: Any = None
) -> float:
    r"""1 if the response's final answer has the value of the reference, else 0.

    The final answer is the last \boxed{...}, else what follows the last "####", else the last number, else the whole
    response. Fractions, decimals, percent signs, thousands separators, currency, units and spacing do not matter: 1/2, 0.5, 50\% and \frac{1}{2} are equal.
    With math-verify (the extra `math`), surds, expressions, sets and intervals are compared by what they are too; without
    it what is no number is compared as text. A reference may itself be a worked solution; then its final answer counts.
    """
    found = final_answer(response) or response
    reference = _reference(answer, expected_answer, ground_truth)
    if same_answer(found, reference):
        return 1.0
    if "\\boxed" in reference or "####" in reference:
        reference = final_answer(reference) or reference
    return float(same_mathematics(found, reference))


def format_reward(pattern: str = THINK_PATTERN) -> Callable[[str, str], float]:
    """A reward of 1 where the whole response matches the regular expression (dots match line ends), else 0.

    The default asks for <think>…</think> and then an answer. ValueError if the pattern is no regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"found the pattern {pattern!r}, which is no regular expression: {error}") from None

    def format(prompt: str, response: str) -> float:
        return float(compiled.fullmatch(response) is not None)

    return format


def length_reward(target: int = LENGTH_TARGET) -> Callable[[str, str], float]:
    """A reward that is 1 at `target` words and falls linearly to 0 at none and at twice as many."""
    if target < 1:
        raise ValueError(f"found target={target}; expected a number of words, at least 1")

    def length(prompt: str, response: str) -> float:
        return max(0.0, 1.0 - abs(_words(response) - target) / target)

    return length


def overlong_penalty(
    max_length: int, buffer: int, penalty: float = 1.0, measure: Callable[[str], int] | None = None
) -> Callable[[str, str], float]:
    """A reward of 0 up to max_length - buffer, then falling by `penalty` over each `buffer` (DAPO, arXiv 2503.14476).

    With n the length: min(-(n - (max_length - buffer)) / buffer * penalty, 0). Add it to another reward.
    `measure` gives the length of a response, for example lambda text: len(tokenizer(text).input_ids); default its words.
    """
    if buffer < 1 or max_length < buffer:
        raise ValueError(f"found max_length={max_length}, buffer={buffer}; expected 1 <= buffer <= max_length")
    length_of = measure or _words

    def overlong(prompt: str, response: str) -> float:
        excess = length_of(response) - (max_length - buffer)
        return min(-excess / buffer * penalty, 0.0)

    return overlong


def _words(text: str) -> int:
    return len(text.split())


def _reference(*columns: Any) -> str:
    for value in columns:
        if value is not None:
            return str(value)
    raise ValueError(f"this row has no reference answer; expected one in {', '.join(ANSWER_COLUMNS)}")


BUILTINS: dict[str, Callable[..., float]] = {
    "exact_match": exact_match,
    "math_answer": math_answer,
    "format": format_reward(),
    "length": length_reward(),
}
"""The rewards that a specification can name."""
