"""The Helm chart for tests: where helm is, and what the chart renders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import programs

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "charts" / "nemo-rl-operator"
Object = dict[str, Any]


def program(name: str) -> str:
    """Path of a program. Skips where it is not at hand; where tests must run, it is compiled and its lack is a failure."""
    if found := shutil.which(name):
        return found
    required = os.environ.get("CI") == "true" or os.environ.get("NEMO_RL_REQUIRE_CLUSTER") == "1"
    if not programs.path(name).exists() and not required:
        pytest.skip(f"{name} is not installed; compile it with: python tests/lab/lab.py build {name}")
    programs.ensure([name])
    return str(programs.path(name))


def helm_program() -> str:
    return program("helm")


def helm(
    *words: str, values: Any = None, kubeconfig: Path | None = None, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """The ended process; without a kubeconfig it knows no cluster. Its folders are its own."""
    with tempfile.TemporaryDirectory() as home:
        environment = {"HOME": home, "PATH": os.environ["PATH"], "KUBECONFIG": str(kubeconfig or f"{home}/none")}
        command = [helm_program(), *words] + (["--values", "-"] if values is not None else [])
        text = json.dumps(values) if values is not None else None
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds, env=environment)


def render(
    values: Any = None, *, release: str = "rl", namespace: str = "rl-system", hooks: bool = False
) -> list[Object]:
    """The objects that the chart makes of these values."""
    words = ["template", release, str(CHART), "--namespace", namespace] + ([] if hooks else ["--no-hooks"])
    result = helm(*words, values=values or {})
    assert result.returncode == 0, result.stderr
    found = [found for found in yaml.safe_load_all(result.stdout) if found]
    return [one for each in found for one in (each["items"] if each["kind"] == "List" else [each])]
