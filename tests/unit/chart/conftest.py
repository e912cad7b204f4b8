"""Compiles helm and kubectl where they must be there, before the time limits of single tests begin to count."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from lab import programs
from lab.settings import LabError


def pytest_collection_finish(session: pytest.Session) -> None:
    ours = any(Path(__file__).parent in item.path.parents for item in session.items)
    if ours and os.environ.get("CI") == "true" and not session.config.option.collectonly:
        with contextlib.suppress(LabError):  # what goes wrong here is reported by the tests
            programs.ensure([name for name in ("helm", "kubectl") if not shutil.which(name)])
