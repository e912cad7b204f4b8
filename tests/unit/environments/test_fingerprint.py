"""What makes a reward another one: its code, helpers, constants, attributes and files; not its comments, lines or process."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.environments import bind_rewards
from nemo_rl.environments.fingerprint import fingerprint

SOURCE = """
import re
from dataclasses import dataclass, field
import nemo_rl

LIMIT = 10
WORDS = {"good", "fine"}
PATTERN = re.compile("a+")

def normalised(text):
    return text.strip().lower()

def helper(text):
    return len(normalised(text)) / LIMIT

class Base:
    bonus = 0.5
    def extra(self, text):
        return self.bonus

@dataclass
class Options:
    scale: float = 1.0
    names: list = field(default_factory=list)

class Judge(Base):
    def __init__(self, options):
        self.options = options
    def __call__(self, prompt, response):
        return self.extra(response) * self.options.scale

def reward(prompt, response, threshold=3):
    if response in WORDS or PATTERN.match(response):
        return 1.0
    return helper(response)

judge = Judge(Options(2.0))

def make(factor):
    return lambda prompt, response: factor * helper(response)

made = make(3)
"""


def module_of(folder: Path, source: str, name: str = "rewards_of_mine") -> Any:
    """The source as a module that was loaded by its path."""
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prints(folder: Path, source: str, name: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return fingerprint(getattr(module_of(folder, source), name))


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("reward", "return helper(response)", "return -helper(response)", "reward()"),
        ("reward", "threshold=3", "threshold=4", "defaults of reward()"),
        ("reward", "LIMIT = 10", "LIMIT = 20", "LIMIT"),
        ("reward", '"good", "fine"', '"good", "poor"', "WORDS"),
        ("reward", 're.compile("a+")', 're.compile("b+")', "PATTERN"),
        ("reward", "text.strip().lower()", "text.strip().upper()", "normalised()"),
        ("judge", "Options(2.0)", "Options(-2.0)", "Options.scale"),
        ("judge", "bonus = 0.5", "bonus = 5", "Base.bonus"),
        ("judge", "return self.bonus", "return -self.bonus", "Base.extra()"),
        ("made", "make(3)", "make(4)", "factor"),
        ("made", "factor * helper", "-factor * helper", "lambda"),
    ],
)
def test_each_change_is_another_reward_and_is_named(tmp_path, name, old, new, said):
    assert SOURCE.count(old) == 1
    before = prints(tmp_path / "a", SOURCE, name)
    after = prints(tmp_path / "b", SOURCE.replace(old, new), name)
    assert {part for part in before | after if before.get(part) != after.get(part)} == {said}


@pytest.mark.parametrize("name", ["reward", "judge", "made"])
def test_comments_lines_docstrings_and_annotations_change_nothing(tmp_path, name):
    other = "# a comment\n\n\n" + SOURCE.replace(
        "def helper(text):", 'def helper(text: str) -> float:\n    """What it is for."""\n    # why'
    ).replace("len(normalised(text)) / LIMIT", "(\n        len(normalised(text))\n        / LIMIT\n    )")
    assert prints(tmp_path / "a", SOURCE, name) == prints(tmp_path / "b", other, name)


def test_it_is_equal_in_another_process_with_another_seed_of_hashes(tmp_path):
    here = prints(tmp_path, SOURCE, "reward")
    script = f"""
        import importlib.util, json
        spec = importlib.util.spec_from_file_location("rewards_of_mine", {str(tmp_path / "rewards_of_mine.py")!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        from nemo_rl.environments.fingerprint import fingerprint
        print(json.dumps(fingerprint(module.reward)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."}
    )
    assert json.loads(printed.stdout) == here


def test_helpers_of_other_modules_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def written(scale: float) -> dict[str, Any]:
        (tmp_path / "nemo_scales.py").write_text(f"SCALE = {scale}\ndef scaled(x): return x * SCALE\n")
        sys.modules.pop("nemo_scales", None)
        importlib.invalidate_caches()
        source = "import nemo_scales as s\ndef reward(prompt, response): return s.scaled(len(response))\n"
        return prints(tmp_path / str(scale), source, "reward")

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    first, second = written(1.0), written(2.0)
    assert (first["SCALE"], second["SCALE"]) == (1.0, 2.0)
    assert written(1.0) == first


def test_a_module_that_the_reward_imports_when_it_is_called_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "def reward(prompt, response):\n    import nemo_late\n    return nemo_late.value(response)\n"
    (tmp_path / "nemo_late.py").write_text("def value(text): return 1.0\n")
    first = prints(tmp_path / "a", source, "reward")
    (tmp_path / "nemo_late.py").write_text("def value(text): return 2.0\n")
    assert prints(tmp_path / "b", source, "reward") != first


def test_a_file_that_is_read_counts_and_a_log_that_is_written_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reads = "import json\ndef reward(prompt, response):\n    return json.load(open('answers.json'))[prompt]\n"
    writes = "def reward(prompt, response):\n    open('seen.txt', 'a').write(response)\n    return 1.0\n"
    found = {}
    for content in ("1", "22"):
        (tmp_path / "answers.json").write_text(content)
        (tmp_path / "seen.txt").write_text(content)
        for name, source in (("reads", reads), ("writes", writes)):
            found[name, content] = prints(tmp_path / name, source, "reward")
    assert found["reads", "1"] != found["reads", "22"]
    assert found["writes", "1"] == found["writes", "22"]


def test_arguments_of_partial_and_arrays_count():
    import numpy as np

    def scaled(prompt, response, table):
        return float(table.sum())

    of = [fingerprint(functools.partial(scaled, table=np.full(1000, value))) for value in (1.0, 2.0, 1.0)]
    assert of[0] == of[2] != of[1]


def test_what_exists_in_this_process_only_counts_by_its_type():
    import threading

    def made() -> Any:
        lock = threading.Lock()
        return lambda prompt, response: float(lock.locked())

    assert fingerprint(made()) == fingerprint(made())


def test_code_without_source_is_told_apart_by_what_it_does():
    def made(body: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(f"def reward(prompt, response): return {body}", names)
        return fingerprint(names["reward"])

    assert made("1.0") == made("1.0") != made("2.0")


def test_two_lambdas_of_a_line_differ():
    rewards = {"a": lambda prompt, response: 1.0, "b": lambda prompt, response: 2.0}  # in one line, as people write
    identity = bind_rewards(rewards).identity
    assert identity["a"] != identity["b"]
    assert all(re.match("sha256:", part["lambda"]) for part in identity.values())


def test_built_ins_differ_by_their_arguments_alone():
    from nemo_rl.environments import format_reward, math_answer

    assert fingerprint(format_reward("a")) == fingerprint(format_reward("a")) != fingerprint(format_reward("b"))
    assert fingerprint(math_answer) == fingerprint(math_answer)
