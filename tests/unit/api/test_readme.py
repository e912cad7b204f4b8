"""README.md is true: its tables come from the code, its examples are calls that the API takes, its job is valid."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from nemo_rl import backends
from nemo_rl.backends import Run, local
from nemo_rl.job.manifest import parse_manifest

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTED = {
    "Minimal GRPO": ("grpo", "nvidia/HelpSteer2"),
    "SFT": ("sft", "nvidia/OpenMathInstruct-2"),
    "DPO": ("dpo", "nvidia/HelpSteer2"),
    "Your own prompts": ("grpo", None),
    "Callbacks": ("grpo", "nvidia/HelpSteer2"),
    "Full configuration": ("grpo", "nvidia/HelpSteer2"),
}


def _block(heading: str, language: str) -> str:
    section = re.split(r"^#+ ", TEXT.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found, heading
    return found[1]


def _tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "docs" / "tables.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_code_says():
    assert _tables().with_tables(TEXT) == TEXT, "run python docs/tables.py"


class ReachedError(Exception):
    """The backend was called: everything before it went well."""


@pytest.mark.parametrize("heading", DOCUMENTED)
def test_each_example_reaches_the_backend_with_what_it_says(heading: str, monkeypatch: pytest.MonkeyPatch):
    runs: list[Run] = []

    def run(run: Run) -> None:
        runs.append(run)
        raise ReachedError

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(backends, "cluster_context", lambda: None)
    monkeypatch.delenv("NEMO_RL_BACKEND", raising=False)
    with pytest.raises(ReachedError):
        exec(compile(_block(heading, "python"), f"README.md: {heading}", "exec"), {"__name__": "__main__"})
    algorithm, dataset = DOCUMENTED[heading]
    assert (runs[0].spec.algorithm, runs[0].spec.dataset.name) == (algorithm, dataset)


def test_the_job_of_the_readme_is_valid():
    job = parse_manifest(_block("YAML", "yaml"))
    assert (job.name, job.spec.algorithm) == ("sums", "grpo")


def test_the_commands_of_the_readme_exist():
    from nemo_rl.cli.main import app

    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"^nemo-rl (\w+)", TEXT, re.MULTILINE)) <= commands


def test_no_heading_is_linked_that_is_not_there():
    anchors = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= anchors
    for path in re.findall(r"\]\((?!#|http)([^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path
