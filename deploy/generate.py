"""Writes the Kustomize base from the Helm chart: `python deploy/generate.py`. A test checks that it is up to date.

Needs helm, on PATH or as tests/lab compiles it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "nemo-rl-operator"
BASE = Path(__file__).resolve().parent / "base"
NAMESPACE = "nemo-rl-system"
HEAD = "# Generated from charts/nemo-rl-operator by `python deploy/generate.py`; do not edit.\n"
HELM_LABELS = re.compile(r"^ *(helm\.sh/(chart|resource-policy):|app\.kubernetes\.io/managed-by:).*\n", re.MULTILINE)
EMPTY_ANNOTATIONS = re.compile(r"^  annotations:\n(?=\S|  \S)", re.MULTILINE)


def helm() -> str:
    """Path of the program. Raises FileNotFoundError if there is none."""
    lab = Path(os.environ.get("NEMO_RL_LAB_HOME", Path.home() / ".cache/nemo-rl/lab")) / "bin" / "helm"
    found = shutil.which("helm") or (str(lab) if lab.exists() else None)
    if found is None:
        raise FileNotFoundError(f"helm is neither on PATH nor at {lab}; compile it: python tests/lab/lab.py build helm")
    return found


def files(program: str) -> dict[str, str]:
    """Name in the base → content: a file for each template of the chart that renders something, and what ties them."""
    command = [program, "template", "nemo-rl-operator", str(CHART), "--namespace", NAMESPACE]
    command += ["--set", "tests.enabled=false"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for document in re.split(r"^---\n", rendered, flags=re.MULTILINE):
        source = re.match(r"# Source: .*/templates/(\S+)\n", document)
        if source:
            body = EMPTY_ANNOTATIONS.sub("", HELM_LABELS.sub("", document[source.end() :]))
            found.setdefault(source[1], HEAD)
            found[source[1]] += f"---\n{body.strip()}\n"
    found["namespace.yaml"] = HEAD + _namespace()
    resources = "".join(f"  - {name}\n" for name in sorted(found))
    found["kustomization.yaml"] = (
        f"{HEAD}apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n{resources}"
    )
    return found


def _namespace() -> str:
    return (
        f"apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n"
        "  labels:\n    pod-security.kubernetes.io/enforce: restricted\n"
    )


if __name__ == "__main__":
    BASE.mkdir(exist_ok=True)
    for old in BASE.glob("*.yaml"):
        old.unlink()
    for name, content in files(helm()).items():
        (BASE / name).write_text(content, encoding="utf-8")
