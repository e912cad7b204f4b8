"""Every job that documentation and examples show is taken by a real API server, strictly: no field is unknown to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.scene import Scene
from nemo_rl.cli.init import job_text
from nemo_rl.job import names
from nemo_rl.job.spec import ALGORITHMS
from unit.docs.blocks import ROOT, all_blocks

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
JOBS = [b for b in all_blocks() if b.language == "yaml" and yaml.safe_load(b.text).get("kind") == names.KIND]
WORDS = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")


@pytest.mark.parametrize("block", JOBS, ids=str)
def test_a_job_of_the_documentation_is_accepted(block, scene: Scene):
    assert "serverside-applied" in scene.kubectl(*WORDS, stdin=block.text)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_accepted(path: Path, scene: Scene):
    assert names.KIND.lower() in scene.kubectl(*WORDS, stdin=path.read_text()).lower()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_job_that_init_writes_is_accepted(algorithm, scene: Scene):
    text = job_text(algorithm, model="org/model", dataset="", reward="", name="mine", gpus=1)
    assert "serverside-applied" in scene.kubectl(*WORDS, stdin=text)
