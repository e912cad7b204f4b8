"""The API server that the tests use: a control plane of their own, or one that NEMO_RL_TEST_KUBECONFIG names."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.api import MERGE, Api, ApiError, eventually, path
from cluster.manifests import job
from cluster.scene import run_kubectl
from lab import programs
from lab.control_plane import ControlPlane
from nemo_rl.job import changes, names

CRDS = Path(__file__).resolve().parents[2] / "crds"


@dataclass
class Cluster:
    """An API server with the resource defined. plane is None where the server is somebody else's."""

    api: Api
    kubectl: Callable[..., str]
    kubeconfig: Path
    plane: ControlPlane | None


@contextmanager
def serve(folder: Path) -> Iterator[Cluster]:
    """A cluster with the resource defined; the keys, data and logs of a control plane of its own lie in the folder."""
    kubeconfig = external_kubeconfig()
    if kubeconfig:
        kubectl = run_kubectl(Path(shutil.which("kubectl") or programs.path("kubectl")), kubeconfig, folder / "cache")
        define(Api(kubeconfig), kubectl)
        yield Cluster(Api(kubeconfig), kubectl, kubeconfig, None)
        return
    need_programs()
    plane = ControlPlane(folder)
    kubectl = run_kubectl(programs.path("kubectl"), plane.kubeconfig, folder / "cache")
    try:
        # before the controllers: a garbage collector that starts later knows the kind at once
        plane.start(lambda: define(Api(plane.kubeconfig), kubectl))
        yield Cluster(Api(plane.kubeconfig), kubectl, plane.kubeconfig, plane)
    finally:
        plane.stop()


def external_kubeconfig() -> Path | None:
    named = os.environ.get("NEMO_RL_TEST_KUBECONFIG")
    return Path(named) if named else None


def need_programs() -> None:
    """Skips where the programs cannot be had; where they must be had, their lack is a failure."""
    required = os.environ.get("NEMO_RL_REQUIRE_CLUSTER") == "1" or os.environ.get("CI") == "true"
    missing = programs.missing(programs.CONTROL_PLANE)
    if missing and not shutil.which("go") and not required:
        pytest.skip(
            f"{', '.join(missing)} not in {programs.BIN} and Go is not installed to compile them; "
            "install Go, or set NEMO_RL_TEST_KUBECONFIG to an API server without nodes"
        )
    if not shutil.which("openssl") and not required:
        pytest.skip("openssl is not installed; it makes the API server's certificates")
    programs.ensure(missing)


def define(api: Api, kubectl: Callable[..., str], crds: Path = CRDS) -> None:
    """Creates or updates the resource definition, with the policy of what may change, and waits until both are in force."""
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crds))

    def served() -> bool:
        try:
            return bool(api.request("GET", f"/apis/{names.API_VERSION}")["resources"])
        except ApiError as error:
            if error.code in (404, 503):
                return False
            raise

    eventually(served, "the resource is served")
    if any(changes.NAME in file.read_text() for file in crds.glob("*.yaml")):
        await_policy(api)


def await_policy(api: Api, there: bool = True) -> None:
    """A policy is enforced a moment after it is made, and for a moment after it is deleted."""
    name = f"probe-{uuid.uuid4().hex[:8]}"

    def made() -> bool:
        try:
            return bool(api.create(names.PLURAL, "default", job(name, suspend=True)))
        except ApiError as error:
            if error.code == 404:  # a server that has just started has no namespace yet
                return False
            raise

    def enforced() -> bool:
        try:
            api.request("PATCH", path(names.PLURAL, "default", name) + "?dryRun=All", {"spec": {"model": "b"}}, MERGE)
        except ApiError as error:
            if changes.FIXED_MESSAGE not in error.message:
                raise
            return there
        return not there

    eventually(made, "a job can be made")
    try:
        eventually(enforced, f"the policy of what may change is {'in force' if there else 'gone'}")
    finally:
        api.delete(names.PLURAL, "default", name)
