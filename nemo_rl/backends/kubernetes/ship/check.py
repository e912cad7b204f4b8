"""Loads a bundle in a fresh interpreter, away from the user's folders, and describes what it finds there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl.backends.kubernetes.ship.errors import MissingModule, NotSource

TIMEOUT_SECONDS = 300
_PROGRAM = """
import sys
sys.path.append(sys.argv[1])
from nemo_rl.backends.kubernetes.ship.check import answer
answer(*sys.argv[2:])
"""


@dataclass(frozen=True)
class Loaded:
    """What a fresh process found: the description of the object, and the user's modules it got from elsewhere."""

    description: Any
    strays: list[str]


def load_anew(files: Mapping[str, bytes], entrypoint: str, *, compare: bool) -> Loaded:
    """Writes the files of a bundle into a folder and loads the entry there by another process of this Python.

    `compare` asks for the description. NotSource with the error's text if it does not load, MissingModule
    where that is for want of a module.
    """
    with tempfile.TemporaryDirectory(prefix="nemo-rl-check-") as folder:
        bundle = Path(folder, "bundle")
        write_files(files, bundle)
        answer_file = Path(folder, "answer.json")
        root = str(Path(__file__).parents[4])
        command = [sys.executable, "-P", *["-O"] * sys.flags.optimize, "-c", _PROGRAM, root]
        try:
            done = subprocess.run(
                [*command, str(bundle), entrypoint, str(answer_file), "compare" if compare else ""],
                cwd=folder,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotSource(f"loading it anew took more than {TIMEOUT_SECONDS} s") from None
        if not answer_file.exists():
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise NotSource(f"loading it anew ended the process with {done.returncode} ({' '.join(last)})")
        found = json.loads(answer_file.read_text(encoding="utf-8"))
    if found.get("missing"):
        raise MissingModule(found["missing"], found["error"])
    if "error" in found:
        raise NotSource(f"loading it anew fails with {found['error']}")
    return Loaded(found["description"], found["strays"])


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes the files of a bundle below a folder, as unpacking it would."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def answer(folder: str, entrypoint: str, answer_file: str, compare: str) -> None:
    """The other process: loads, describes, and writes its answer. Only JSON goes back."""
    from nemo_rl.backends.kubernetes.ship.describe import describe
    from nemo_rl.backends.kubernetes.ship.modules import local_modules
    from nemo_rl.worker import bundles

    try:
        obj = bundles.load_entry(Path(folder), entrypoint)
        shipped = bundles.shipped_modules()
        found: dict[str, Any] = {
            "description": describe(obj) if compare else None,
            "strays": sorted(m.__name__ for m in local_modules() if m.__name__ not in shipped),
        }
    except Exception as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        found = {"error": f"{type(error).__name__}: {error}", "missing": missing}
    Path(answer_file).write_text(json.dumps(found), encoding="utf-8")
