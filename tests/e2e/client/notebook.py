"""The documented examples as a notebook: its cells are the README's, and it is run against the current cluster.

Tests run it; with NEMO_RL_WRITE_NOTEBOOK=1 they keep it, with its outputs, as docs/on_a_cluster.ipynb.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat

from documented import EXAMPLES, ROOT, example, with_files, write_data, write_models

NOTEBOOK = ROOT / "docs" / "on_a_cluster.ipynb"
CELL_SECONDS = 600
INTRODUCTION = """# The documented examples on a cluster

The examples of the README, run against a Kubernetes cluster: each cell ships its reward and its data, follows the job in
one area of the output, and gets the checkpoint. The cluster here has one node without a GPU and no way to the hub, so the
model's name means a folder beside the notebook, which travels too, and the data sets are files."""
AFTERWARDS = """## Afterwards

Jobs stay on the cluster until they are deleted, and can be found by name from anywhere."""


def write_inputs(folder: Path) -> None:
    """What the names in the examples mean."""
    write_models(folder)
    write_data(folder)


def build() -> nbformat.NotebookNode:
    """The notebook, without outputs. Its cells have the same ids each time."""
    cells = [nbformat.v4.new_markdown_cell(INTRODUCTION)]
    for heading in EXAMPLES:
        cells += [
            nbformat.v4.new_markdown_cell(f"## {heading}"),
            nbformat.v4.new_code_cell(with_files(example(heading))),
        ]
    cells += [nbformat.v4.new_markdown_cell(AFTERWARDS), nbformat.v4.new_code_cell("nemo_rl.jobs()")]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
        cell["source"] = cell["source"].strip()
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel)


def run(book: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Executes it in a folder with its inputs. nbclient's CellExecutionError where a cell raises."""
    client = nbclient.NotebookClient(
        book, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # when each cell ran: it would differ each time
    if os.environ.get("NEMO_RL_WRITE_NOTEBOOK") == "1":
        nbformat.write(book, NOTEBOOK)
    return book


def outputs(book: nbformat.NotebookNode, heading: str) -> list[Any]:
    """What the example of a heading left in the notebook."""
    titles = [cell.source for cell in book.cells]
    return list(book.cells[titles.index(f"## {heading}") + 1].outputs)
