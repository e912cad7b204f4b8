"""Whether two answers are the same mathematics, by math-verify where it is installed (the extra `math`)."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

_LONGEST = 500
"""Characters of an answer that is looked at: simplifying a longer one may take minutes."""


@cache
def is_available() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def same_mathematics(found: str, reference: str) -> bool:
    """True where both can be read as mathematics and are equal; False also where math-verify is not installed.

    Surds, expressions, sets, intervals and tuples count by what they are: \\sqrt{12} is 2\\sqrt{3}. No time limit of its
    own: that of the reward holds.
    """
    if not is_available() or max(len(found), len(reference)) > _LONGEST:
        return False
    from math_verify import verify

    answers, truths = _read(found), _read(reference)
    return bool(answers and truths and verify(truths, answers, timeout_seconds=None))


def _read(text: str) -> list[Any]:
    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns that it sets no alarm, which a thread could not have
    from math_verify import parse

    written = text if text.strip().startswith(("$", "\\(", "\\[")) else f"${text}$"
    found: list[Any] = parse(written, parsing_timeout=None)
    return found
