"""Dependencies point one way (docs: design), and no module imports another in a circle, not even within functions."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = (ROOT, ROOT / "operator")


def modules() -> dict[str, Path]:
    """The modules of the distribution by name."""
    found = {}
    for place, package in zip(PLACES, ("nemo_rl", "nemo_rl_operator"), strict=True):
        for path in (place / package).rglob("*.py"):
            parts = path.relative_to(place).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules of ours that this one imports when it runs, at its top or within functions."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & set(MODULES)) or {node.module}
    return (found & set(MODULES)) - {name}


GRAPH = {name: imports(name) for name in MODULES}


def test_no_module_imports_another_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


LOWER = {
    "job": set(),
    "storage": {"job"},
    "run": {"storage", "job"},
    "display": {"run", "storage", "job"},
    "data": {"display", "run", "storage", "job"},
    "nemo_rl_operator": {"job"},
}
"""Layers whose dependencies are settled, and the layers that each may use; `errors` and `extras` are everybody's."""


def layer(name: str) -> str:
    package, *rest = name.split(".")
    return rest[0] if package == "nemo_rl" and rest else package


@pytest.mark.parametrize("above", LOWER)
def test_a_layer_uses_those_below_it_only(above: str) -> None:
    used = {(name, other) for name in GRAPH if layer(name) == above for other in GRAPH[name]}
    allowed = LOWER[above] | {above, "errors", "extras"}
    assert [pair for pair in sorted(used) if layer(pair[1]) not in allowed] == []
