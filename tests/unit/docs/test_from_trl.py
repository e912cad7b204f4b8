"""The page "From TRL": its names are TRL's and ours, and an error says the same as the page."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re

import pytest
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from nemo_rl.api.keywords import keywords
from nemo_rl.api.training import CALL_KEYWORDS, train
from nemo_rl.job.foreign import foreign_names
from unit.docs.blocks import DOCS

PAGE = (DOCS / "howto" / "from-trl.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE, re.MULTILINE)
THEIRS = {field.name for config in (GRPOConfig, SFTConfig, DPOConfig) for field in dataclasses.fields(config)}
THEIRS |= {name for trainer in (GRPOTrainer, SFTTrainer, DPOTrainer) for name in inspect.signature(trainer).parameters}
OURS = {*keywords(), *CALL_KEYWORDS, *inspect.signature(train).parameters, "reward_weights"}


def test_the_table_is_read() -> None:
    assert len(ROWS) > 35


@pytest.mark.parametrize(("theirs", "ours"), ROWS)
def test_names_of_the_table_are_those_of_both_libraries(theirs: str, ours: str) -> None:
    assert theirs in THEIRS
    assert ours in OURS
    if theirs in foreign_names() and theirs not in OURS:
        assert ours in foreign_names()[theirs]


def test_the_script_of_trl_uses_what_trl_has() -> None:
    program = re.findall(r"```python\n(from datasets.*?)```", PAGE, re.DOTALL)[0]
    calls = {
        node.func.id: node
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    given = {keyword.arg for keyword in calls["GRPOConfig"].keywords}
    assert given <= {field.name for field in dataclasses.fields(GRPOConfig)}
    inspect.signature(GRPOTrainer).bind("model", "reward", **{k.arg: None for k in calls["GRPOTrainer"].keywords})


def test_defaults_on_the_page_of_hyperparameters_are_those_of_the_code() -> None:
    from nemo_rl.job.spec import LEARNING_RATES, GRPOSpec, TrainingSpec

    page = (DOCS / "howto" / "hyperparameters.md").read_text(encoding="utf-8")
    for algorithm, (whole, adapters) in LEARNING_RATES.items():
        assert f"| {algorithm.upper()} | {whole:.0e} | {adapters:.0e} |".replace("e-0", "e-") in page
    for name, value in re.findall(r"^\| `(\w+)` \((\S+)\) \|", page, re.MULTILINE):
        home = GRPOSpec if name in GRPOSpec.model_fields else TrainingSpec
        assert float(home.model_fields[name].default) == float(value), name
