"""Finds the final answer in a worked solution, and tells whether two written answers have the same value."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?|\.\d+)"
    r"(?:\s*/\s*-?\d+(?:\.\d+)?)?(?:\\?%)?"
)
_PLAIN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|operatorname|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\(?:(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|[,;:! ])")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)")
_MIXED = re.compile(r"(-?)(\d+)\s+(\d+)\s*/\s*(\d+)")
_POWER = re.compile(r"(?:\*|\\times|\\cdot|×)?10\^\{?([-+]?\d{1,3})\}?$")
_ASSIGNMENT = re.compile(r"[a-zA-Z]\w*\s*=\s*([^=a-zA-Z]*\d[^=a-zA-Z]*)")
_UNIT = re.compile(
    r"(.*[\d.%)])(\s*)([a-zA-Zµ]+(?:\s*\^?\s*\{?[23]\}?)?(?:\s*/\s*[a-zA-Z]+)?)((?:\s+[a-zA-Z]+)*)", re.DOTALL
)
_SHORT_UNITS = frozenset(
    {
        "m",
        "g",
        "s",
        "h",
        "l",
        "L",
        "N",
        "V",
        "W",
        "J",
        "A",
        "K",
        "C",
        "F",
        "cm",
        "mm",
        "km",
        "nm",
        "kg",
        "mg",
        "ml",
        "mL",
    }
    | {"ft", "in", "yd", "mi", "lb", "lbs", "oz", "mph", "kmh", "hr", "hrs", "min", "sec", "ms", "kW", "kWh", "Hz"}
    | {"am", "pm", "st", "nd", "rd", "th"}
)
"""What may follow a number without a space."""
_NO_UNITS = frozenset(["pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "or", "and"])
_LONGEST = 10_000


def final_answer(text: str) -> str | None:
    r"""The last \boxed{...} of a text, else what follows the last "####", else its last number; None without any."""
    text = text[-_LONGEST:]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    _, marker, rest = text.rpartition("####")
    if marker and rest.strip():
        return rest.strip().splitlines()[0]
    numbers = _NUMBER.findall(_flat_fractions(text))
    return numbers[-1] if numbers else None


def same_answer(found: str, reference: str) -> bool:
    """Whether two written answers are equal: as exact numbers where both are numbers, else as normalised text.

    A percent sign may be part of the value or its unit: 50% is equal to 0.5 and to 50.
    """
    if "\\boxed" in reference or "####" in reference:
        reference = final_answer(reference) or reference
    here, there = _values(found), _values(reference)
    if here or there:
        return bool(here & there)
    return normalised(found) == normalised(reference)


def number_of(text: str) -> Fraction | None:
    r"""The exact value of a written number: integers, decimals, a/b, \frac, mixed numbers, percent, powers of ten."""
    text = _without_unit(_cleaned(text))
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    if not text.startswith(("(", "[")):  # there a comma separates coordinates
        text = re.sub(r"(?<=\d),\s?(?=\d{3}(?!\d))", "", text)
    if mixed := _MIXED.fullmatch(text):
        sign, whole, top, bottom = mixed.groups()
        part = _ratio(top, bottom)
        value = None if part is None else (int(whole) + part) * (-1 if sign else 1)
    else:
        value = _value(re.sub(r"\s+", "", text))
    return value / 100 if value is not None and percent else value


def normalised(text: str) -> str:
    """A written answer without what carries no meaning: case, spaces, dollar signs, text macros, a final full stop."""
    plain = re.sub(r"\s+", "", _cleaned(text)).rstrip(".").casefold()
    choice = re.fullmatch(r"\(([a-z])\)", plain)
    return choice[1] if choice else plain


def _values(text: str) -> set[Fraction]:
    value = number_of(text)
    if value is None:
        return set()
    return {value, value * 100} if "%" in text else {value}


def _cleaned(text: str) -> str:
    text = text[:_LONGEST].replace("−", "-").replace("\\%", "%").replace("{,}", ",")
    text = re.sub(r"\\?[$€£]", "", text)
    text = _SPACING.sub(" ", _TEXT.sub(r" \1", text))
    text = _flat_fractions(_DEGREES.sub("", text)).strip()
    text = text.removesuffix(".").strip()
    assigned = _ASSIGNMENT.fullmatch(text)
    return assigned[1].strip() if assigned else text


def _without_unit(text: str) -> str:
    """5 apples, 5cm and 5 km/h without their unit; 5x, 2pi and 3i are no numbers and stay."""
    match = _UNIT.fullmatch(text)
    if match is None:
        return text
    number, space, unit, _more = match.groups()
    word = re.match(r"[a-zA-Zµ]+", unit)
    assert word is not None
    known = word[0] in _SHORT_UNITS
    spelled = bool(space) and len(word[0]) > 1 and word[0].casefold() not in _NO_UNITS
    return number.strip() if known or spelled else text


def _value(text: str) -> Fraction | None:
    text = _unwrapped(text)
    sign = -1 if text.startswith("-") else 1
    text = _unwrapped(text[1:]) if text.startswith(("-", "+")) else text
    top, slash, bottom = text.partition("/")
    if slash:
        value = _ratio(top, bottom)
    elif power := _POWER.search(text):
        base = _plain(text[: power.start()] or "1")
        value = None if base is None else base * Fraction(10) ** int(power[1])
    else:
        value = _plain(text)
    return None if value is None else sign * value


def _unwrapped(text: str) -> str:
    while len(text) > 2 and (text[0], text[-1]) in (("(", ")"), ("{", "}")):
        text = text[1:-1]
    return text


def _plain(text: str) -> Fraction | None:
    text = text.casefold()
    if len(text) > 300 or not _PLAIN.fullmatch(text):
        return None
    return Fraction(text.replace(".e", ".0e") + ("0" if text.endswith(".") else ""))


def _ratio(top: str, bottom: str) -> Fraction | None:
    numerator, denominator = (_plain(_unwrapped(part)) for part in (top, bottom))
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def _flat_fractions(text: str) -> str:
    r"""The text with every innermost \frac written a/b, a whole number before it kept apart."""

    def flat(match: re.Match[str]) -> str:
        top, bottom = match[1] or match[2] or "", match[3] or match[4] or ""
        whole = match.string[: match.start()].rstrip()[-1:].isdigit()
        return (" " if whole else "") + f"{top.strip()}/{bottom.strip()}"

    return _FRACTION.sub(flat, text)


def _last_boxed(text: str) -> str | None:
    r"""Contents of the last \boxed{...} whose braces are balanced."""
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        after = text[start + len("\\boxed") :]
        inside = after.lstrip()
        if inside.startswith("{"):
            depth = 0
            for i, character in enumerate(inside):
                depth += (character == "{") - (character == "}")
                if depth == 0:
                    return inside[1:i].strip()
        elif spaced := re.match(r"\s+([^\s$]+)", after):
            return spaced[1].rstrip(".,")
        end = start
    return None
