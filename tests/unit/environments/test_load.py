"""The reward of a specification, from each of its four sources."""

from __future__ import annotations

import sys

import pytest

from nemo_rl.environments import Environment, RewardCall, RewardRunner, bind_rewards
from nemo_rl.environments.load import load_reward
from nemo_rl.errors import RewardError
from nemo_rl.job.spec import RewardSpec


def score(reward, response: str = "r", **columns) -> float | None:
    with RewardRunner(bind_rewards(reward), timeout_seconds=30, on_error="raise") as runner:
        return runner.score([RewardCall("p", response, None, columns)])[0].value


ODD = r'''
r"""Text with 'quotes', "double", `backticks`, $HOME ${x} $(y), \back\slash, %s {brace} and snow ☃ é 漢."""
import re
WORDS = ["it's", '"', "`ls`", "$1", "\\n", "\t", "☃", r"\d+", """triple""", "%d"]
def reward(prompt: str, response: str) -> float:
    return float(len(WORDS)) + float(bool(re.fullmatch(WORDS[7], response)))
'''


def test_inline_source_means_what_it_says_whatever_characters_it_has():
    reward = load_reward(RewardSpec(source=ODD), {})
    assert reward("p", "12") == 11.0
    assert score(reward, "12") == 11.0
    assert reward.__globals__["WORDS"][:8] == ["it's", '"', "`ls`", "$1", "\\n", "\t", "☃", r"\d+"]


def test_inline_source_may_define_classes_dataclasses_and_lists():
    source = """
from __future__ import annotations
from dataclasses import dataclass
from nemo_rl import Environment
@dataclass
class Weights:
    gain: float = 2.0
class Judge(Environment):
    def setup(self):
        self.weights = Weights()
    def score(self, prompt, response):
        return self.weights.gain
def short(prompt, response):
    return 1.0
rewards = [Judge, short]
"""
    assert score(load_reward(RewardSpec(source=source, entrypoint="rewards"), {})) == 3.0
    judge = load_reward(RewardSpec(source=source, entrypoint="Judge"), {})
    assert issubclass(judge, Environment)
    assert score(judge) == 2.0


def test_a_traceback_through_inline_source_shows_its_lines():
    source = "def helper(text):\n    return 1 / len(text)  # the culprit\n\ndef reward(prompt, response):\n    return helper(response)\n"
    with pytest.raises(RewardError) as caught:
        score(load_reward(RewardSpec(source=source), {}), "")
    assert "return 1 / len(text)  # the culprit" in caught.value.traceback
    assert "line 2, in helper" in caught.value.traceback
    assert "nemo_rl/environments" not in caught.value.traceback


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("def rewards(prompt, response): return 1", ValueError, "defines no 'reward'"),
        ("def rewards(prompt, response): return 1", ValueError, "did you mean 'rewards'?"),
        ("def reward(prompt, response) return 1", RewardError, "SyntaxError"),
        ("import no_such_module_anywhere", RewardError, "No module named 'no_such_module_anywhere'"),
        ("raise SystemExit(3)", RewardError, "SystemExit"),
        ("x = '\ud800'", RewardError, "could not be loaded"),
    ],
)
def test_inline_source_that_does_not_work_says_why(source, error, said):
    with pytest.raises((ValueError, RewardError)) as caught:
        load_reward(RewardSpec.model_construct(source=source), {})
    assert type(caught.value) is error
    assert said in str(caught.value)


def test_a_function_is_found_by_its_name(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rewards_of_mine.py").write_text(
        "class Bag:\n    @staticmethod\n    def inner(prompt, response):\n        return 4.0\n"
    )
    (tmp_path / "broken_of_mine.py").write_text("import no_such_module_either\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    reward = load_reward(RewardSpec.model_construct(function="rewards_of_mine:Bag.inner"), {})
    assert score(reward) == 4.0
    with pytest.raises(ValueError, match="found no module 'nowhere_at_all'"):
        load_reward(RewardSpec(function="nowhere_at_all:reward"), {})
    with pytest.raises(ValueError, match="defines no 'inner'"):
        load_reward(RewardSpec(function="rewards_of_mine:inner"), {})
    with pytest.raises(RewardError, match="no_such_module_either"):
        load_reward(RewardSpec(function="broken_of_mine:reward"), {})


def test_a_built_in_is_found_by_its_name():
    assert score(load_reward(RewardSpec(builtin="math_answer"), {}), "it is 4", answer="4.0") == 1.0


def test_a_bundle_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"bundle 'code', found no bundles"):
        load_reward(RewardSpec(bundle="code"), {})
