"""Fixtures: those of tests/e2e for jobs in real pods, and the browser of tests/ui."""

from __future__ import annotations

import pytest

from e2e.conftest import manifests, new_scene, operator, pytest_runtest_makereport, scene
from marks import mark_below
from ui.conftest import browser, visit

__all__ = ["browser", "manifests", "new_scene", "operator", "pytest_runtest_makereport", "scene", "visit"]
TEST_SECONDS = 1200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_below(__file__, items, pytest.mark.e2e, pytest.mark.timeout(TEST_SECONDS))
