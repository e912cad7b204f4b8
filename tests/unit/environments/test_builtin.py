"""The rewards that ship with the package: golden values, and equal answers however they are written."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.environments import BUILTINS, exact_match, format_reward, length_reward, math_answer, overlong_penalty
from nemo_rl.environments.math_text import final_answer, same_answer
from nemo_rl.job.spec import RewardSpec


def test_every_built_in_of_the_specification_exists():
    from typing import get_args

    named = get_args(get_args(RewardSpec.model_fields["builtin"].annotation)[0])
    assert set(BUILTINS) == set(named)
    assert BUILTINS["format"]("p", "<think>a</think> b") == 1.0
    assert BUILTINS["length"]("p", "w " * 100) == 1.0


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [(" Paris ", "Paris", 1), ("a  b", "a b", 1), ("paris", "Paris", 0), ("", "x", 0), ("7", 7, 1)],
)
def test_exact_match(response, answer, score):
    assert exact_match("p", response, answer=answer) == score
    assert exact_match("p", response, ground_truth=answer) == score


def test_a_row_without_a_reference_is_an_error():
    with pytest.raises(ValueError, match="no reference answer"):
        exact_match("p", "r", answer=None)


EQUAL = [
    *[("1/2", "0.5"), ("1/2", r"\frac{1}{2}"), ("50%", "0.5"), (r"50\%", "50"), ("1,234", "1234"), ("$5", "5 dollars")],
    *[
        ("5cm", "5"),
        ("5 km/h", "5"),
        (r"45^\circ", "45"),
        ("3 1/2", r"3\frac12"),
        ("x = 5", "5"),
        ("-.5", r"-\frac{1}{2}"),
    ],
    *[("2e3", "2000"), (r"2\times10^{3}", "2000"), ("7.", "7"), (r"\text{(C)}", "C"), (r"12\text{ cm}^2", "12")],
    *[
        ("1{,}000", "1000"),
        ("(1,2)", "(1, 2)"),
        ("+3", "3"),
        (r"\dfrac{-1}{3}", "-1/3"),
        ("007", "7"),
        (r"x=\frac{3}{4}", "0.75"),
    ],
    *[(r"\left(2, 3\right)", "(2,3)"), ("−4", "-4"), (r"2\sqrt{3}", r"2 \sqrt{3}"), ("42 apples", "42")],
]
DIFFERENT = [
    *[("2x", "2"), ("2pi", "2"), ("1/2", "2"), ("3i", "3"), ("(1,234)", "1234"), ("", "0"), ("1/0", "0"), ("x", "y")],
    *[
        ("2 pi", "2"),
        (r"2\pi", "2"),
        (r"2\sqrt{3}", "2"),
        ("1e999999999", "1"),
        ("12", "1"),
        ("nan", "0"),
        ("(1,2)", "(2,1)"),
    ],
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_answers(one, other):
    assert same_answer(one, other)
    assert same_answer(other, one)
    assert math_answer("p", rf"So the answer is $\boxed{{{one}}}$.", answer=other) == 1.0


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers(one, other):
    assert not same_answer(one, other)
    assert not same_answer(other, one)


SAME_MATHEMATICS = [
    *[
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\{1,2,3\}", r"\{3,2,1\}"),
        (r"2\pi/4", r"\frac{\pi}{2}"),
    ],
    *[(r"\frac{1}{\sqrt 2}", r"\frac{\sqrt 2}{2}"), (r"2^{10}", "1024"), (r"\log_{2} 8", "3")],
]
OTHER_MATHEMATICS = [
    *[(r"3\pi", "9.42"), ("(0,1)", "[0,1]"), (r"\sqrt{7}", r"\sqrt{8}"), ("x+1", "x-1"), (r"\{1,2\}", r"\{1,2,3\}")],
    *[("a" * 30, "b" * 30), (r"\frac{1}{0}", "x"), (r"\begin{pmatrix}1", "1")],
]


@pytest.mark.parametrize(("one", "other"), SAME_MATHEMATICS)
def test_math_verify_judges_what_is_no_number(one, other):
    assert not same_answer(one, other), "it is math-verify that is asked"
    for found, reference in ((one, other), (other, one)):
        assert math_answer("p", rf"so $\boxed{{{found}}}$", answer=reference) == 1.0


@pytest.mark.parametrize(("one", "other"), OTHER_MATHEMATICS)
def test_math_verify_tells_different_things_apart(one, other):
    for found, reference in ((one, other), (other, one)):
        assert math_answer("p", rf"so $\boxed{{{found}}}$", answer=reference) == 0.0


def test_without_math_verify_what_is_no_number_is_text(monkeypatch):
    monkeypatch.setattr("nemo_rl.environments.math_symbols.is_available", lambda: False)
    assert math_answer("p", r"\boxed{2\sqrt{2}}", answer=r"\sqrt{8}") == 0.0
    assert math_answer("p", r"\boxed{2 \sqrt{2}}", answer=r"2\sqrt{2}") == 1.0
    assert math_answer("p", r"\boxed{1/2}", answer="0.5") == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} ok", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{unbalanced and \boxed{7}", "7"),
        (r"\boxed 5$", "5"),
        ("a 7 #### 42\nfoo 9", "42"),
        ("10-5 is 5", "5"),
        ("it is -3", "-3"),
        ("total $1,234.50.", "1,234.50"),
        ("about 3/4 of it", "3/4"),
        (r"hence \frac{3}{4}.", "3/4"),
        ("50%", "50%"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert final_answer(text) == answer


def test_a_worked_solution_may_be_the_reference():
    assert math_answer("p", "The answer is 18.", answer="16 - 3 - 4 = 9 eggs. 9 * 2 = 18\n#### 18") == 1.0
    assert math_answer("p", "I get 17", answer=r"so \boxed{18}") == 0.0


numbers = st.fractions(min_value=-10_000, max_value=10_000, max_denominator=1000)


@given(numbers)
def test_a_fraction_may_be_written_in_any_way(value: Fraction):
    top, bottom = value.numerator, value.denominator
    sign = "-" if top < 0 else ""
    forms = [
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"{sign}\dfrac{{{abs(top)}}}{{{bottom}}}",
        f"$ {top} / {bottom} $",
    ]
    forms += [f"{3 * top}/{3 * bottom}", f"x = {top}/{bottom}", f"({top}/{bottom})"]
    for form in forms:
        assert same_answer(form, f"{top}/{bottom}"), form
        assert not same_answer(form, f"{top + bottom}/{bottom}"), form


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=3, allow_nan=False, allow_infinity=False))
def test_a_decimal_may_be_written_in_any_way(value):
    exact = Fraction(value)
    for form in (
        f"{value:,}",
        f"{value}00",
        f"${value}",
        f"{value} m",
        f"{value} metres",
        rf"\text{{{value}}}",
        f" {value}.",
    ):
        assert same_answer(form, f"{exact.numerator}/{exact.denominator}"), form


@given(st.text(max_size=200), st.text(max_size=50))
def test_any_text_gets_a_score(response, answer):
    assert math_answer("p", response, answer=answer) in (0.0, 1.0)
    assert math_answer("p", rf"\boxed{{{answer.replace('{', '').replace('}', '')}}}", answer=answer) in (0.0, 1.0)


def test_format():
    default = format_reward()
    assert default("p", "<think>\na\nb</think>\n42") == 1.0
    assert default("p", "<think>a</think>") == 0.0
    assert default("p", "42") == 0.0
    assert format_reward(r"\d+")("p", "123") == 1.0
    assert format_reward(r"\d+")("p", "123 ") == 0.0
    with pytest.raises(ValueError, match="no regular expression"):
        format_reward("(")


def test_length_peaks_at_its_target():
    reward = length_reward(4)
    assert [reward("p", "w " * n) for n in (0, 2, 4, 6, 8, 20)] == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="at least 1"):
        length_reward(0)


def test_overlong_penalty_has_the_values_of_dapo():
    penalty = overlong_penalty(max_length=25, buffer=5, penalty=0.5)
    lengths, rewards = [10, 22, 25, 30], [1.0, 0.8, 0.6, 0.4]
    shaped = [reward + penalty("p", "w " * n) for reward, n in zip(rewards, lengths, strict=True)]
    assert shaped == pytest.approx([1.0, 0.6, 0.1, -0.6])
    assert overlong_penalty(25, 5, measure=len)("p", "x" * 25) == -1.0
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(5, 10)
