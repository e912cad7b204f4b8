"""The chart's objects that a test applied, and how they are taken away again."""

from __future__ import annotations

import yaml

from charts import Object
from cluster.api import eventually
from cluster.manifests import job
from cluster.server import Cluster

POLICY = "ValidatingAdmissionPolicy"


def remove_release(cluster: Cluster, objects: list[Object]) -> None:
    """Deletes them. Returns when their admission policy refuses nothing more: one for all namespaces would refuse jobs
    of the tests that follow, since the API server enforces it for a moment after its deletion."""
    if not objects:
        return
    cluster.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=yaml.safe_dump_all(objects))
    everywhere = [
        found["spec"]["policyName"]
        for found in objects
        if found["kind"] == f"{POLICY}Binding" and "matchResources" not in found["spec"]
    ]
    if everywhere:
        refused_by_any = job("x", image="elsewhere/trainer:latest", serviceAccountName="nobody")
        words = ("-n", "default", "create", "--dry-run=server", "-f", "-")

        def answer() -> str:
            return cluster.kubectl(*words, stdin=yaml.safe_dump(refused_by_any), check=False)

        eventually(lambda: not any(name in answer() for name in everywhere), f"{', '.join(everywhere)} refuses no more")
