"""The programs of tests/devices are compiled before the time limits of single tests begin to count."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import programs
from marks import mark_below

PROGRAMS = (*programs.CONTROL_PLANE, "kube-scheduler", "dra-test-driver")
TEST_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_below(__file__, items, pytest.mark.cluster, pytest.mark.timeout(TEST_SECONDS))


def pytest_collection_finish(session: pytest.Session) -> None:
    ours = any(Path(__file__).parent in item.path.parents for item in session.items)
    if ours and not session.config.option.collectonly:
        programs.ensure(PROGRAMS)
