"""Other Python versions on this machine, and a captured set of all reward shapes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unit.ship import notebook
from unit.ship.shapes import FILES

Answers = dict[str, dict[str, Any]]


def find_python(version: str) -> str | None:
    """An interpreter of that minor version that starts, from PATH, pyenv or uv."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    candidates = [shutil.which(f"python{version}"), *map(str, pyenv)]
    if shutil.which("uv"):
        asked = subprocess.run(["uv", "python", "find", "--no-project", version], capture_output=True, text=True)
        candidates.append(asked.stdout.strip() if asked.returncode == 0 else None)
    for candidate in filter(None, candidates):
        told = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if told.stdout.strip() == version:
            return candidate
    return None


def play(command: list[str], **environment: str) -> tuple[int, Answers]:
    """Runs a process of notebook.py: (exit status, its answers by name)."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        print(done.stderr)
    return done.returncode, {answer["name"]: answer for answer in answers}


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answers]:
    """Folder with the parts of every shape, and what the client said of each."""
    folder = tmp_path_factory.mktemp("client")
    for name, text in FILES.items():
        path = folder / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    status, answers = play(notebook.command(sys.executable, "client", folder))
    assert status == 0
    (folder / "client.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers.values()))
    return folder, answers


@pytest.fixture(scope="session")
def pods(shipped: tuple[Path, Answers], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Answers]:
    """Answers of a pod with that Python version; skips where there is none."""
    played: dict[str, tuple[int, Answers]] = {}

    def answers(version: str) -> Answers:
        if version not in played:
            python = find_python(version)
            if python is None:
                pytest.skip(f"no Python {version} on this machine")
            libraries = tmp_path_factory.mktemp("libraries")
            import cloudpickle

            shutil.copytree(Path(cloudpickle.__file__).parent, libraries / "cloudpickle")
            target = tmp_path_factory.mktemp("pod")
            command = notebook.command(python, "pod", shipped[0], target)
            played[version] = play(command, PYTHONPATH=str(libraries))
        status, found = played[version]
        assert status == 0, f"the interpreter ended with {status}"
        return found

    return answers
