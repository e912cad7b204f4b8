"""A wheel has all that the page needs: whoever installs it needs no npm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from charts import ROOT
from nemo_rl.ui.libraries import LIBRARIES

pytestmark = pytest.mark.timeout(900)


def wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds the wheel of a copy of this checkout."""
    source = folder / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "vendor")
    for name in ("nemo_rl", "operator"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def test_a_wheel_holds_the_libraries_and_finds_them_without_npm(tmp_path: Path) -> None:
    built = wheel(tmp_path, NEMO_RL_UI_LIBRARIES="required")
    assert built.returncode == 0, built.stderr
    [file] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    wanted = {f"nemo_rl/ui/vendor/{name}" for library in LIBRARIES for name, _ in library.files.values()}
    assert wanted <= set(names)
    assert len(names) == len(set(names))
    assert {"nemo_rl/ui/page/index.html", "nemo_rl/ui/page/main.js", "nemo_rl/ui/page/style.css"} <= set(names)
    assert "nemo_rl/ui/build_hook.py" not in names
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path / "installed"), "XDG_CACHE_HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-m", "nemo_rl.ui.libraries"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.stdout.strip() == str(tmp_path / "installed/nemo_rl/ui/vendor"), found.stderr


def test_a_wheel_can_be_built_where_there_is_no_registry(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "npm").write_text("#!/bin/sh\necho no network >&2; exit 1\n")
    (programs / "npm").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    refused = wheel(tmp_path / "a", PATH=path, NEMO_RL_UI_LIBRARIES="required")
    assert refused.returncode != 0
    assert "no network" in refused.stderr
    built = wheel(tmp_path / "b", PATH=path)
    assert built.returncode == 0, built.stderr
    [file] = (tmp_path / "b").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        assert not [name for name in archive.namelist() if "/vendor/" in name]
