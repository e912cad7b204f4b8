"""Fixtures: those of tests/e2e, and a lab whose node enforces NetworkPolicies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.conftest import TEST_SECONDS, manifests, new_scene, operator, pytest_runtest_makereport
from lab import network_policies
from lab.settings import KUBECONFIG, LabError
from marks import mark_below

__all__ = ["manifests", "new_scene", "operator", "pytest_runtest_makereport"]
OUTSIDE, PRIVATE, METADATA = "198.51.100.2", "10.200.0.2", "169.254.169.254"
"""Addresses outside the cluster: a public one, one of somebody's network, and that where clouds answer with credentials."""
HERE = "198.51.100.1"
OUTSIDE_PORTS = (80, 443)
LISTEN = """
import socket, sys, threading
def accept(server):
    while True:
        server.accept()[0].close()
for port in map(int, sys.argv[1:]):
    server = socket.create_server(("", port), backlog=64)
    threading.Thread(target=accept, args=(server,)).start()
print("listens", flush=True)
"""
"""Accepts connections on these ports."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_below(__file__, items, pytest.mark.e2e, pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="session")
def enforced() -> Iterator[None]:
    """The lab with kube-network-policies, and a network outside it, as long as these tests run."""
    if Path(os.environ.get("KUBECONFIG", "")) != KUBECONFIG:
        raise LabError(
            "tests/enforced change the node of the lab; run them by `make e2e-integrations` without KUBECONFIG"
        )
    with contextlib.ExitStack() as ending:
        ending.callback(network_policies.off)
        network_policies.on()
        ending.callback(remove_outside)
        remove_outside()
        make_outside()
        code = f"{LISTEN}\nimport os; sys.stdin.read(); os._exit(0)"  # it ends with these tests, however they end
        listen = ("ip", "netns", "exec", "outside", sys.executable, "-c", code, *map(str, OUTSIDE_PORTS))
        process = subprocess.Popen(
            network_policies.nsenter(*listen), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin and process.stdout
        ending.callback(process.wait)
        ending.callback(process.stdin.close)
        assert process.stdout.readline() == "listens\n"
        yield


def make_outside() -> None:
    """A network namespace beside the node's, with a link to it."""
    for line in (
        "netns add outside",
        "link add outside0 type veth peer name eth0 netns outside",
        f"address add {HERE}/24 dev outside0",
        "link set outside0 up",
        f"route add {PRIVATE}/32 via {OUTSIDE}",
        f"route add {METADATA}/32 via {OUTSIDE}",
        "-n outside link set lo up",
        f"-n outside address add {OUTSIDE}/24 dev eth0",
        f"-n outside address add {PRIVATE}/32 dev lo",
        f"-n outside address add {METADATA}/32 dev lo",
        "-n outside link set eth0 up",
        f"-n outside route add default via {HERE}",
    ):
        network_policies.inside("ip", *line.split())


def remove_outside() -> None:
    network_policies.inside("ip", "link", "delete", "outside0", check=False)
    network_policies.inside("ip", "netns", "delete", "outside", check=False)
