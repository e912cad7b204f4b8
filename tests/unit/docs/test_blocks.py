"""Every code block of the documentation runs here, on the lab (tests/e2e/test_quickstart.py), or says why not."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import render
from generated import load
from nemo_rl.job import names
from nemo_rl.job.manifest import parse_manifest
from unit.docs.blocks import DOCS, ROOT, Block, all_blocks, blocks_of

BLOCKS = all_blocks()
ON_THE_LAB = {"quickstart/cluster.md"}
"""Pages whose commands are run in order by tests/e2e/test_quickstart.py; so are single blocks marked `run: lab`."""
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B")


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and not block.skipped]


def pythons() -> list[Block]:
    return [block for block in of("python") if block.page not in ON_THE_LAB and block.page != "quickstart/local.md"]


def test_every_block_is_run_somewhere_or_says_why_not():
    assert len(BLOCKS) > 30
    for block in BLOCKS:
        assert block.language in ("python", "bash", "yaml", "text"), f"{block}: nothing runs {block.language!r}"
        assert block.mark in ("", "run: lab") or len(block.mark) > len("not run: because"), f"{block}: {block.mark!r}"
        if block.language == "bash" and not block.skipped:
            here = block.page == "quickstart/local.md"
            assert here or block.page in ON_THE_LAB or block.mark == "run: lab", f"{block}: commands that nobody runs"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for name, content in load(ROOT / "charts/nemo-rl-operator/files/helm_test.py").tiny_model().items():
        (folder / name).write_bytes(content)
    return folder


def with_local_names(text: str, model: Path) -> str:
    """The text with the hub's model and data replaced by what is here, and nothing else."""
    for name in MODELS:
        text = text.replace(f'"{name}"', repr(str(model)))
    return text.replace('"nvidia/HelpSteer2"', repr(str(model / "helpsteer.jsonl")))


def write_helpsteer(model: Path) -> None:
    rows = [f'{{"prompt": "one two {word}", "helpfulness": 4}}' for word in ("three", "four")] * 50
    (model / "helpsteer.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("block", pythons(), ids=str)
def test_a_python_block_runs(block: Block, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_helpsteer(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMO_RL_BACKEND", "local")
    # shipped functions are read from their file, so there must be one
    script = tmp_path / "block.py"
    script.write_text(with_local_names(block.text, model).replace("max_steps=100", "max_steps=2"))
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})


@pytest.mark.timeout(1800)  # three programs that import torch, on a machine that may be busy
def test_a_newcomer_who_follows_the_local_quickstart_gets_a_trained_model(model: Path, tmp_path: Path):
    """Word by word: files are written as shown, commands are run as shown; only the model's name is another."""
    import torch
    from transformers import AutoModelForCausalLM

    commands = 0
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"NEMO_RL_BACKEND": "local", "HF_HUB_OFFLINE": "1", "KUBECONFIG": str(tmp_path / "none")}
    for block in blocks_of(DOCS / "quickstart/local.md"):
        if block.skipped:
            continue
        if block.language == "python":
            (tmp_path / block.title).write_text(with_local_names(block.text, model))
        for line in block.text.splitlines() if block.language == "bash" else ():
            result = subprocess.run(
                shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
            commands += 1
    assert commands == 3
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "outputs/quickstart/checkpoints/best")
    before = AutoModelForCausalLM.from_pretrained(model)
    pairs = zip(trained.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def job_blocks() -> list[Block]:
    return [block for block in of("yaml") if yaml.safe_load(block.text).get("kind") == names.KIND]


@pytest.mark.parametrize("block", job_blocks(), ids=str)
def test_a_job_of_the_documentation_is_valid(block: Block):
    assert parse_manifest(block.text).name


@pytest.mark.parametrize("block", [b for b in of("yaml") if b not in job_blocks()], ids=str)
def test_values_of_the_documentation_are_values_of_the_chart(block: Block):
    values: Any = yaml.safe_load(block.text)
    assert render(values) != render({})
