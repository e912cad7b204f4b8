"""An environment with nemo-rl and the packages of some extras alone, made of links to those that are installed here.

Nothing is downloaded: what a package declares decides what is linked, so that an import which nothing declares fails.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(extras: tuple[str, ...]) -> set[str]:
    """Names of the distributions that nemo-rl with these extras declares, directly or not."""
    found: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [("nemo-rl", frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        for line in lines:
            requirement = Requirement(line)
            markers = [{"extra": extra} for extra in wanted or {""}]
            if requirement.marker is None or any(requirement.marker.evaluate(m) for m in markers):
                waiting.append((_plain(requirement.name), frozenset(requirement.extras)))
    return found


def make(folder: Path, *extras: str) -> Path:
    """Makes the environment and returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    for name in closure(extras):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not top.endswith(".pth"):
                target = packages / top
                target.exists() or target.symlink_to(source)
    (packages / "nemo-rl-under-test.pth").write_text(f"{ROOT}\n{ROOT / 'operator'}\n")
    assert subprocess.run([python, "-c", "import nemo_rl"], cwd=folder, check=False).returncode == 0
    assert sys.prefix != str(folder)
    return python
