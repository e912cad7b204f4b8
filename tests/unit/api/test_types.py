"""Editors and type checkers know the keywords, the results, the jobs: wrong scripts are found, right ones left in peace."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from generated import load

SCRIPTS = Path(__file__).parent / "typed_scripts"
ROOT = Path(__file__).resolve().parents[3]
MISTAKES = {n for n, line in enumerate((SCRIPTS / "wrong.py").read_text().splitlines(), start=1) if "# mistake" in line}
_LIBRARIES = ("torch", "transformers", "datasets", "matplotlib", "kubernetes", "peft", "numpy")


def by_pyright(folder: Path) -> dict[str, dict[int, str]]:
    """Lines with an error in each script, by pyright's checks of level standard, from the package that bundles it."""
    config = {
        "include": ["."],
        "typeCheckingMode": "standard",
        "venvPath": str(Path(sys.prefix).parent),
        "venv": Path(sys.prefix).name,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [str(Path(sys.executable).with_name("basedpyright")), "--outputjson", "--project", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2, done.stdout + done.stderr
    found: dict[str, dict[int, str]] = {"right.py": {}, "wrong.py": {}}
    for item in report["generalDiagnostics"]:
        if item["severity"] == "error":
            found[Path(item["file"]).name][item["range"]["start"]["line"] + 1] = item["message"]
    return found


def by_mypy(folder: Path) -> dict[str, dict[int, str]]:
    """Lines with an error in each script, by mypy; what is not ours is not looked into, which would take minutes."""
    config = ["[mypy]", "check_untyped_defs = true", f"mypy_path = {ROOT}"]
    config += [f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true" for name in _LIBRARIES]
    config += ["[mypy-nemo_rl.*]\nignore_errors = true"]
    (folder / "mypy.ini").write_text("\n".join(config))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, dict[int, str]] = {"right.py": {}, "wrong.py": {}}
    for file, line, message in re.findall(r"^(\w+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        found[file][int(line)] = message
    return found


@pytest.fixture(scope="module", params=[by_pyright, by_mypy], ids=["pyright", "mypy"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    folder = tmp_path_factory.mktemp("scripts")
    for name in ("right.py", "wrong.py"):
        (folder / name).write_text((SCRIPTS / name).read_text())
    return request.param(folder)


def test_there_are_28_mistakes() -> None:
    assert len(MISTAKES) == 28


def test_a_right_script_is_left_in_peace(found: dict[str, dict[int, str]]) -> None:
    assert found["right.py"] == {}


def test_at_least_25_of_28_mistakes_are_found_and_nothing_else(found: dict[str, dict[int, str]]) -> None:
    lines = set(found["wrong.py"])
    missed = sorted(MISTAKES - lines)
    assert len(lines & MISTAKES) >= 25, f"not found: lines {missed}"
    assert lines <= MISTAKES, {line: found["wrong.py"][line] for line in lines - MISTAKES}


def test_the_types_of_keywords_are_those_of_the_specification() -> None:
    module = load(ROOT / "docs/typed.py")
    assert module.FILE.read_text(encoding="utf-8") == module.text(), "run python docs/typed.py"


def test_every_keyword_is_typed_and_described() -> None:
    from nemo_rl.api.keywords import keywords
    from nemo_rl.api.training import CALL_KEYWORDS
    from nemo_rl.api.typed import TrainerKeywords, TrainKeywords

    arguments = {"max_steps", "max_epochs", "learning_rate", "batch_size", "num_generations_per_prompt"}
    assert set(TrainKeywords.__annotations__) == ({*keywords(), *CALL_KEYWORDS, "gpus_per_node"} - arguments) - {"wait"}
    assert set(TrainerKeywords.__annotations__) == {*keywords(), "gpus_per_node"}
