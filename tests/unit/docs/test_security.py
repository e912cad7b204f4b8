"""The page on security promises nothing that no test shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
TABLE = PAGE.split("## Who can do what")[1].split("\n## ")[0]
ROWS = [line for line in TABLE.splitlines() if line.startswith("|")][2:]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_each_row_names_its_test() -> None:
    assert len(ROWS) >= 15
    for row in ROWS:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4 and all(cells), row
        assert re.fullmatch(r"`tests/[\w/]+\.py::test_\w+`", cells[3]), row


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_test_is_there_and_is_run(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == name]
    assert found, f"docs/security.md names {file}::{name}, which is not there"
    marks = [ast.unparse(mark) for mark in found[0].decorator_list]
    assert not any("skip" in mark or "xfail" in mark for mark in marks)
    assert any(isinstance(n, ast.Assert | ast.With | ast.Expr) for n in ast.walk(found[0])), "it checks something"
