"""The commands and snippets of README.md, and for each command who runs it: this folder's test, or another one that is named."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("git", "cd", "make", "pip", "nemo-rl", "helm", "kubectl", "python")
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)

HERE = "here"
"""Run by tests/readme/test_readme.py, in an environment that it makes."""
RUN: dict[str, str] = {
    # a fresh clone, and a trained model
    "git clone <address of this repository> nemo-rl": HERE,
    "cd nemo-rl": HERE,
    "make demo": HERE,
    # installing
    "pip install '.[engine]'": HERE,
    "pip install '.[engine,lora]'": HERE,
    "pip install '.[kubernetes]'": HERE,
    "nemo-rl doctor": HERE,
    "nemo-rl plan job.yaml": HERE,
    # the job
    "nemo-rl train job.yaml": HERE,
    "nemo-rl train job.yaml --set training.maxSteps=10": HERE,
    "nemo-rl train job.yaml --dry-run": HERE,
    "nemo-rl crd": HERE,
    "nemo-rl chat FOLDER": HERE,
    "nemo-rl eval": HERE,
    "make help": HERE,
    # what the whole check of a clean checkout runs by itself
    "make test": ".ci/run",
    "make test-cluster": ".ci/run",
    "make e2e": ".ci/run",
    "make test-readme": "tests/readme/test_readme.py",
    "make docs": "tests/unit/docs/test_pages.py::test_the_site_builds_without_a_warning",
    "make images": "tests/lab/deploy.py",
    "make gpu": "tests/unit/engine/test_gpu_script.py",
    "make bench": "benchmarks/engine.py",
    "nemo-rl ui": "tests/ui/conftest.py",
    # on a cluster
    "helm install nemo-rl-operator charts/nemo-rl-operator --namespace nemo-rl-system --create-namespace": (
        "tests/e2e/test_quickstart.py::test_a_newcomer_who_follows_the_cluster_quickstart_gets_trained_models"
    ),
    "helm test nemo-rl-operator --namespace nemo-rl-system --logs": (
        "tests/e2e/test_quickstart.py::test_a_newcomer_who_follows_the_cluster_quickstart_gets_trained_models"
    ),
    "kubectl apply --server-side -k deploy/base": (
        "tests/cluster/test_chart.py::test_the_api_server_takes_the_kustomize_base"
    ),
}


def commands() -> list[str]:
    """The commands of the README in order: lines of blocks without a language, and inline code that begins with a program."""
    text = re.sub(r"<details>.*?</details>", "", TEXT, flags=re.DOTALL)
    found: list[str] = []
    position = 0
    for block in _FENCE.finditer(text):
        found += _inline(text[position : block.start()])
        position = block.end()
        if not block["language"]:
            lines = [line.partition(" #")[0].strip() for line in block["text"].splitlines()]
            found += [line for line in lines if line.startswith(tuple(f"{p} " for p in PROGRAMS))]
    return [*found, *_inline(text[position:])]


def _inline(text: str) -> list[str]:
    codes = re.findall(r"`([^`\n]+)`", text)
    return [code for code in codes if code.startswith(tuple(f"{program} " for program in PROGRAMS))]


def snippets() -> dict[str, str]:
    """The Python blocks by the heading that they stand below."""
    found: dict[str, str] = {}
    for block in _FENCE.finditer(TEXT):
        if block["language"] == "python":
            heading = re.findall(r"^#+ (.*)$", TEXT[: block.start()], re.MULTILINE)[-1]
            assert heading not in found, f"two snippets below {heading!r}"
            found[heading] = block["text"]
    return found


def job() -> str:
    """The job in YAML."""
    (found,) = (block["text"] for block in _FENCE.finditer(TEXT) if block["language"] == "yaml")
    return found
