"""Fixtures: those of tests/e2e, and a lab whose node offers devices by claims."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.conftest import manifests, new_scene, operator, pytest_runtest_makereport
from e2e.kubectl import Kubectl, eventually
from e2e.scene import SECONDS
from e2e.test_fields import devices, place
from lab import dra, programs
from lab.settings import KUBECONFIG, LabError
from marks import mark_below

__all__ = ["devices", "manifests", "new_scene", "operator", "place", "pytest_runtest_makereport"]
PROGRAMS = (*programs.CONTROL_PLANE, "kube-scheduler", "dra-test-driver")
TEST_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_below(__file__, items, pytest.mark.cluster, pytest.mark.timeout(TEST_SECONDS))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles what is missing, before the time limits of single tests begin to count."""
    ours = any(Path(__file__).parent in item.path.parents for item in session.items)
    if ours and not session.config.option.collectonly:
        programs.ensure(PROGRAMS)


@pytest.fixture(scope="session")
def driver() -> Iterator[None]:
    """The lab's node with Kubernetes' own test driver for dynamic resource allocation, as long as these tests run."""
    if Path(os.environ.get("KUBECONFIG", "")) != KUBECONFIG:
        raise LabError("the driver runs on the lab's node; run these tests by `make e2e-devices` without KUBECONFIG")

    def offered() -> bool:
        slices = Kubectl().items("resourceslices", f"--field-selector=spec.driver={dra.DRIVER}")
        return sum(len(found["spec"]["devices"]) for found in slices) == dra.COUNT

    try:
        dra.on()
        eventually(offered, "the driver offers its devices", SECONDS)
        yield
    finally:
        dra.off()
