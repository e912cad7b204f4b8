"""An environment of its own with Starlette, uvicorn and Playwright, beside the packages of this one: made once, below the cache.

`python tests/ui/environment.py ARGUMENTS` runs its interpreter with these arguments. The browser is that of the system.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLAYWRIGHT = "playwright>=1.60"


def interpreter() -> Path:
    """The interpreter that has what the page needs; makes the environment where it is missing or another one is wanted."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [*extras["ui"], PLAYWRIGHT]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nemo-rl" / "ui-tests"
    ready, python = folder / "ready", folder / "bin" / "python"
    here = sysconfig.get_path("purelib")
    about = "\n".join([here, *wanted])
    if not ready.exists() or ready.read_text() != about:
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        packages = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        # what was installed for the page comes first, then what is installed here
        (Path(packages.strip()) / "beside.pth").write_text(here + "\n")
        ready.write_text(about)
    return python


if __name__ == "__main__":
    program = str(interpreter())
    os.execv(program, [program, *sys.argv[1:]])
