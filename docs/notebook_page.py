"""Makes a page of the notebook docs/on_a_cluster.ipynb, with its outputs, when mkdocs builds the site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOK = Path(__file__).with_name("on_a_cluster.ipynb")
PAGE = "on_a_cluster.md"


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs: the page is one of the site's files."""
    files.append(File.generated(config, PAGE, content=page(json.loads(NOTEBOOK.read_text(encoding="utf-8")))))
    return files


def page(notebook: dict[str, Any]) -> str:
    """The notebook as Markdown: cells in order, what was printed as text, what was drawn as HTML."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += _outputs(cell["outputs"])
    title, *rest = parts
    note = f"This page is [a notebook]({NOTEBOOK.name}) that was run on a cluster; take it, and run it on yours."
    return "\n\n".join([title, note, *rest]) + "\n"


def _outputs(outputs: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    printed = ""
    for output in [*outputs, None]:
        if output is not None and output["output_type"] == "stream":
            printed += "".join(output["text"])
            continue
        if printed.strip():
            found.append(f"```text\n{printed.strip()}\n```")
        printed = ""
        if output is not None:
            data = output["data"]
            # one line: a blank one would end the HTML for Markdown
            drawn = " ".join("".join(data.get("text/html", "")).split("\n"))
            found.append(drawn if drawn.startswith("<div") else f"<div>{drawn}</div>" if drawn else _text(data))
    return found


def _text(data: dict[str, Any]) -> str:
    return "```text\n" + "".join(data["text/plain"]) + "\n```"
