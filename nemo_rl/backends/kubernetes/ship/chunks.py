"""The generated file of a source bundle: pieces of the user's text with their places, and lines made around them."""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from nemo_rl.worker.bundles import compile_chunk


@dataclass
class Chunk:
    """A piece of code that is run as a whole in the pod.

    `label` and `segments` (line of the piece → line there) say where the user knows it from; without a label it is made
    here. `future` postpones its annotations. `imported` are names that the text around it imports, which changes the
    code of calls through them. `bind` maps names it defines to the names they get in the module.
    """

    lines: list[str]
    label: str | None = None
    segments: list[tuple[int, int]] = field(default_factory=lambda: [(1, 1)])
    future: bool = False
    imported: list[str] = field(default_factory=list)
    bind: dict[str, str] = field(default_factory=dict)

    def compiled(self) -> CodeType:
        """Code object of the piece, as the pod will compile it (but for the lines)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse("\n".join(self.lines))
            return compile_chunk(tree, self.label or "<made>", self.future, self.imported)


def render(title: str, imports: list[str], chunks: list[Chunk]) -> tuple[str, list[dict[str, Any]]]:
    """(text of the file, its chunks for the manifest)."""
    lines = [
        f"# {title}",
        "# Made by nemo-rl from the live objects; the job names its digest, so a changed file is refused.",
        "",
    ]
    placed: list[dict[str, Any]] = []
    head = Chunk(["import nemo_rl.worker.bundles as _nemo_rl", *sorted(set(imports))])
    for chunk in [head, *chunks]:
        if chunk.label:
            renamed = "".join(f", called {new} here" for new in chunk.bind.values())
            lines += ["", f"# {_printable(chunk.label)}, line {chunk.segments[0][1]}{renamed}"]
        start = len(lines) + 1
        lines += chunk.lines
        entry: dict[str, Any] = {"start": start, "end": len(lines)}
        if chunk.label:
            entry |= {"file": chunk.label, "lines": [list(pair) for pair in chunk.segments]}
        else:
            entry["lines"] = [[1, start]]
        if chunk.future:
            entry["future"] = True
        if chunk.imported:
            entry["imported"] = chunk.imported
        if chunk.bind:
            entry["bind"] = chunk.bind
        placed.append(entry)
    return "\n".join([*lines, ""]), placed


def _printable(label: str) -> str:
    return label if label.isprintable() else ascii(label)
