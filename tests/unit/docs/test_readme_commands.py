"""Each command of README.md is run by a test: by `make test-readme`, or by the one that is named for it."""

from __future__ import annotations

import ast

import pytest

from readme.commands import HERE, ROOT, RUN, commands, job, snippets


def test_no_command_of_the_readme_is_run_by_nobody() -> None:
    found = commands()
    assert len(found) > 15
    assert [line for line in found if line not in RUN] == [], "say in tests/readme/commands.py who runs it"
    assert [line for line in RUN if line not in found] == [], "the README has no such command any more"


@pytest.mark.parametrize("where", sorted({where for where in RUN.values() if where != HERE}))
def test_who_is_said_to_run_a_command_is_there(where: str) -> None:
    path, _, function = where.partition("::")
    assert (ROOT / path).exists()
    if function:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_a_newcomer_needs_three_commands() -> None:
    """The block that stands first: clone, folder, and one that trains."""
    assert commands()[:3] == ["git clone <address of this repository> nemo-rl", "cd nemo-rl", "make demo"]


def test_snippets_and_job_are_found() -> None:
    assert len(snippets()) == 8
    assert "kind: RLTrainingJob" in job()
