"""Marks that all tests of a folder have."""

from __future__ import annotations

from pathlib import Path

import pytest


def mark_below(conftest: str, items: list[pytest.Item], *marks: pytest.MarkDecorator) -> None:
    """Marks the collected tests below the folder of this conftest.py, and no others."""
    for item in items:
        if Path(conftest).parent in item.path.parents:
            for mark in marks:
                item.add_marker(mark)
