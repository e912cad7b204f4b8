"""`make architectures` checks every type; `make test` some that cover every mechanism."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from architectures.checks import Report

REPORTS = "NEMO_RL_ARCHITECTURES"
"""Folder for the reports of all types; set, every type is checked, and each mechanism in whole runs."""

collect_ignore = [] if REPORTS in os.environ else ["test_invariants.py"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write_report() -> Callable[[Report], None]:
    def write(report: Report) -> None:
        if folder := os.environ.get(REPORTS):
            path = Path(folder) / f"{report.type}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report.as_dict()), encoding="utf-8")

    return write
