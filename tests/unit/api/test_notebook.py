"""The notebook of the documentation is what tests/e2e/client runs, and was run."""

from __future__ import annotations

import nbformat

from documented import EXAMPLES
from e2e.client import notebook


def test_its_cells_are_the_examples_of_the_readme():
    kept = nbformat.read(notebook.NOTEBOOK, as_version=4)
    wanted = [cell.source for cell in notebook.build().cells]
    assert [cell.source for cell in kept.cells] == wanted, (
        "run tests/e2e/client/test_documented_examples.py with NEMO_RL_WRITE_NOTEBOOK=1"
    )


def test_each_example_was_run_to_its_end_on_a_cluster():
    kept = nbformat.read(notebook.NOTEBOOK, as_version=4)
    for heading in EXAMPLES:
        shown = str(notebook.outputs(kept, heading))
        assert "<progress" in shown, heading
        assert "nemo-rl: Succeeded" in shown, heading
        assert "Traceback" not in shown, heading
