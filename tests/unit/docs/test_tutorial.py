"""The tutorial's script runs in its short form, makes its curves, and says what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from charts import ROOT
from generated import load

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


@pytest.mark.timeout(900)  # two trainings, on a machine that may be busy
def test_the_tutorial_trains_answers_and_draws_its_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = load(ROOT / "docs" / "pictures.py").of_the_run(tmp_path, short=True)
    said = capsys.readouterr().out
    assert re.search(r"right answers to unseen problems before GRPO: \d+%", said)
    assert re.search(r"right answers to unseen problems after GRPO:  \d+%", said)
    history = [
        json.loads(line) for line in (tmp_path / "outputs/arithmetic/grpo/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in history] == [0, 1, 2, 3, 4]
    assert {"reward", "reward_std", "entropy"} <= set(history[-1])
    curve = (tmp_path / "arithmetic.svg").read_text()
    for text in ("GRPO on word problems", "reward std", "validation reward", "entropy"):
        assert f">{text}</text>" in curve, text
    assert Path(result.checkpoint_path).is_dir()
    # the picture of the terminal is of the midst of a step: what is done now, metrics, a sample
    terminal = (tmp_path / "terminal.svg").read_text().replace("&#160;", " ")
    for text in ("rollout: ", "3/4", "reward ", "Answer :"):
        assert text in terminal, text
    assert "font-face" not in terminal
    assert str(tmp_path) not in terminal


def test_problems_are_right_different_and_never_those_of_the_test() -> None:
    example = load(ROOT / "examples" / "arithmetic.py")
    test = example.make_problems(200, seed=1)
    rows = example.make_problems(2000, seed=0, without=frozenset(row["prompt"] for row in test))
    assert len({row["prompt"] for row in rows}) == 2000
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in test}
    for row in rows + test:
        first, second = (int(found) for found in re.findall(r"\d+", row["prompt"]))
        more = any(word in row["prompt"] for word in ("buys", "finds"))
        assert int(row["answer"]) == (first + second if more else first - second) >= 0
        assert row["counting"].split()[-1] == row["answer"]
        assert len(row["counting"].split()) == second <= 6
        assert set(row["prompt"].split()) <= {*map(str, range(example.NUMBERS)), *example.WORDS}
    assert example.correct("", "13 14 15", "15") == 1.0
    assert example.correct("", "13 14 15 16", "15") == example.correct("", "", "15") == 0.0


def test_the_kept_curves_are_of_the_whole_run_and_light() -> None:
    curve = (ROOT / "docs" / "assets" / "arithmetic.svg").read_text(encoding="utf-8")
    assert ">GRPO on word problems</text>" in curve
    assert ">100</text>" in curve  # the axis of steps goes to the end
    assert len(curve) < 120_000


def test_numbers_of_the_page_are_those_of_the_script() -> None:
    script = (ROOT / "examples" / "arithmetic.py").read_text(encoding="utf-8")
    for name in (
        "batch_size",
        "num_generations_per_prompt",
        "max_new_tokens",
        "max_epochs",
        "eval_every",
        "learning_rate",
    ):
        for value in re.findall(rf"^    {name}=([\d.e-]+),", PAGE, re.MULTILINE):
            assert re.search(rf"^        {name}=(?:.* else )?{re.escape(value)},", script, re.MULTILINE), (name, value)
    for value in re.findall(r"^    max_steps=(\d+),", PAGE, re.MULTILINE):
        assert re.search(rf"max_steps=4 if options.short else {value},", script)
