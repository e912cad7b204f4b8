"""Environments of their own, beside the packages of this one, for tests whose packages are not the project's."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def extra(name: str) -> list[str]:
    """The requirements of one of the project's extras."""
    found: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][name]
    return found


def interpreter(name: str, wanted: Sequence[str]) -> Path:
    """The interpreter of the environment `name`, below the cache, that has what is wanted first, then what is installed here.

    The environment is made where it is missing, or another one is wanted.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nemo-rl" / name
    ready, python = folder / "ready", folder / "bin" / "python"
    here = sysconfig.get_path("purelib")
    about = "\n".join([here, *wanted])
    if not ready.exists() or ready.read_text() != about:
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        packages = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        (Path(packages.strip()) / "beside.pth").write_text(here + "\n")
        ready.write_text(about)
    return python


def become(name: str, wanted: Sequence[str]) -> None:
    """Runs that interpreter in the place of this process, with its arguments."""
    program = str(interpreter(name, wanted))
    os.execv(program, [program, *sys.argv[1:]])
