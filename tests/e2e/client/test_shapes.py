"""Rewards of every shape score in a pod as they do here, whatever Python the client has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from e2e.client.conftest import Rows
from e2e.client.desk import ROOT, Desk
from e2e.scene import SECONDS
from unit.ship.conftest import find_python
from unit.ship.shapes import NINE

CLIENT = Path(__file__).with_name("shapes_client.py")
HERE = "{}.{}".format(*sys.version_info)
OTHERS = [version for version in ("3.13", "3.12") if version != HERE]


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of another minor version with the client alone: no torch, no engine."""
    found = next(((v, python) for v in OTHERS if (python := find_python(v))), (OTHERS[0], None))
    version, python = found
    folder = tmp_path_factory.mktemp("other")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", python or version, folder / "venv"], check=True)
    interpreter = folder / "venv" / "bin" / "python"
    install = ["pip", "install", "--quiet", "--python", interpreter, "-c", ROOT / "constraints.txt"]
    subprocess.run([*uv, *install, f"{ROOT}[kubernetes]"], check=True)
    return Path(interpreter)


def ship(desk: Desk, tiny: Path, rows: Rows, python: Path, prefix: str) -> dict[str, dict[str, Any]]:
    """What the client of that Python says of each shape."""
    (desk.folder / "rows.json").write_text(json.dumps([{"prompt": row["prompt"]} for row in rows[:2]]))
    program = desk.start(str(CLIENT), str(tiny), "rows.json", prefix, python=python)
    code = program.end(3 * SECONDS)
    answers = [json.loads(line) for line in program.lines if line.startswith("{")]
    assert code == 0, program.text[-8000:]
    return {answer["name"]: answer for answer in answers}


def test_nine_shapes_of_reward_score_alike_here_and_in_a_pod(desk: Desk, tiny: Path, rows: Rows) -> None:
    answers = ship(desk, tiny, rows, Path(sys.executable), "same")
    assert set(answers) == {shape.name for shape in NINE}
    for answer in answers.values():
        assert "refused" not in answer, answer
        assert len(answer["there"]) == 8
        assert answer["here"] == answer["there"], answer


@pytest.mark.long
def test_from_another_python_seven_of_nine_score_alike_and_none_wrongly(
    desk: Desk, tiny: Path, rows: Rows, other_python: Path
) -> None:
    answers = ship(desk, tiny, rows, other_python, "other")
    assert set(answers) == {shape.name for shape in NINE}
    equal = [name for name, answer in answers.items() if "refused" not in answer]
    print(f"{len(equal)} of {len(answers)} travel from another Python")
    assert len(equal) >= 7, answers
    for name in equal:
        assert len(answers[name]["there"]) == 8
        assert answers[name]["here"] == answers[name]["there"], answers[name]
