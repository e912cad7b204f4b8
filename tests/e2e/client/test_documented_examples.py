"""The six documented examples run on a cluster, from scripts and from a notebook."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from documented import EXAMPLES, example, with_files
from e2e.client import notebook
from e2e.client.desk import Desk, Program
from e2e.scene import SECONDS
from nemo_rl.run.metrics import read_history


@pytest.fixture(scope="module")
def inputs(desk: Desk, gpus: None) -> Path:
    notebook.write_inputs(desk.folder)
    return desk.folder


@pytest.fixture(scope="module")
def scripts(desk: Desk, inputs: Path) -> dict[str, Program]:
    """All six, started in one folder each, two at a time."""
    found: dict[str, Program] = {}
    for number, heading in enumerate(EXAMPLES):
        folder = inputs / heading.replace(" ", "-")
        folder.mkdir()
        for one in ("Qwen", "helpsteer2.jsonl", "openmath.jsonl"):
            (folder / one).symlink_to(inputs / one)
        (folder / "example.py").write_text(with_files(example(heading)))
        if number >= 2:
            found[EXAMPLES[number - 2]].end(2 * SECONDS)
        found[heading] = Program(
            [sys.executable, "-u", "example.py"],
            folder,
            {**os.environ, **desk.environment},
        )
    return found


@pytest.mark.parametrize("heading", EXAMPLES)
def test_an_example_trains_on_the_cluster_from_a_script(
    desk: Desk, scripts: dict[str, Program], inputs: Path, heading: str
) -> None:
    from transformers import AutoModelForCausalLM

    program = scripts[heading]
    assert program.end(2 * SECONDS) == 0, program.text[-8000:]
    assert "on the cluster" in program.text
    (output,) = (path.parent for path in (inputs / heading.replace(" ", "-")).rglob("metrics.jsonl"))
    history = read_history(output / "metrics.jsonl")
    steps = [int(found[1]) for line in program.lines if (found := re.match(r"step=(\d+)/", line))]
    start = [0] if "validation_reward" in history[0] and history[0]["step"] == 0 else []
    assert [row["step"] for row in history] == [*start, *steps] == [*start, *range(1, len(steps) + 1)]
    assert steps
    (checkpoint,) = (output / "checkpoints").iterdir()
    AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def executed(desk: Desk, scripts: dict[str, Program], inputs: Path) -> nbformat.NotebookNode:
    for program in scripts.values():
        program.end(2 * SECONDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(inputs / "ipython"))
        return notebook.run(notebook.build(), inputs)


@pytest.mark.parametrize("heading", EXAMPLES)
def test_an_example_trains_on_the_cluster_from_a_notebook_cell(executed: nbformat.NotebookNode, heading: str) -> None:
    found = notebook.outputs(executed, heading)
    text = "".join(output.text for output in found if output.output_type == "stream")
    areas = [output.data["text/html"] for output in found if output.output_type == "display_data"]
    progress = [area for area in areas if "step " in area and "<progress" in area]
    assert "on the cluster" in text
    assert len(progress) == 1, "one area for each cell"
    assert re.search(r"step (\d+)/", progress[0])
    if heading not in ("SFT", "DPO"):
        assert progress[0].count("(reward ") == 2
    assert not re.search(r"^step=", text, re.MULTILINE), "steps are in the area alone"


def test_a_cell_that_ran_before_has_a_job_of_its_own(desk: Desk, executed: nbformat.NotebookNode) -> None:
    phases = {job["metadata"]["name"]: job["status"]["phase"] for job in desk.jobs()}
    assert len(phases) == 2 * len(EXAMPLES)
    assert set(phases.values()) == {"Succeeded"}
    (listed,) = (o for o in executed.cells[-1].outputs if o.output_type == "execute_result")
    assert all(name in listed.data["text/plain"] for name in phases)


def test_nothing_is_left_of_the_secrets_and_paths_of_this_machine_in_the_notebook(executed: Any, inputs: Path) -> None:
    text = nbformat.writes(executed)
    assert str(inputs) not in text
    assert str(Path.home()) not in text
