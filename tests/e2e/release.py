"""A release of the chart of its own, beside the operator that all tests share: installed, upgraded and taken away."""

from __future__ import annotations

import copy
import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

import yaml

from charts import CHART, helm_program
from e2e.kubectl import Kubectl, Object
from e2e.scene import RESTRICTED, SECONDS

OPERATOR = "app.kubernetes.io/name=nemo-rl-operator,app.kubernetes.io/component=operator"


def shared_values() -> Object:
    """Images, as the shared operator has them; everything else as the chart has it."""
    deployment = Kubectl().items("deployments", "--all-namespaces", "-l", "app.kubernetes.io/name=nemo-rl-operator")[0]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    variables = {e["name"]: e.get("value", "") for e in container["env"]}

    def image(name: str) -> Object:
        if "@" in name:
            repository, _, digest = name.partition("@")
            return {"repository": repository, "digest": digest}
        repository, _, tag = name.rpartition(":")
        return {"repository": repository, "tag": tag}

    return {"image": image(container["image"]), "trainerImage": image(variables["NEMO_RL_TRAINER_IMAGE"])}


def merged(base: Object, changes: Object) -> Object:
    found = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


class Release:
    """One release in a namespace of its own (named so that it sorts after the shared operator's), for some namespaces."""

    def __init__(self, word: str, watched: list[str], **values: Any) -> None:
        self.name = f"rl-{word}"
        self.namespace = f"rl-{word}-{uuid.uuid4().hex[:6]}"
        self.roles = self.namespace
        self.kubectl = Kubectl(self.namespace)
        own = {
            "watchNamespaces": watched,
            "crds": {"enabled": False},
            "userRoles": {"prefix": self.roles, "aggregate": False},
        }
        self.values = merged(merged(shared_values(), own), values)
        self.installed = False

    def open(self) -> Release:
        """Makes the namespace; `install` follows."""
        metadata = {"name": self.namespace, "labels": {RESTRICTED: "restricted"}}
        Kubectl().apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        return self

    def helm(self, *words: str, values: Object | None = None, check: bool = True) -> str:
        """Its output and errors. AssertionError with them where it fails."""
        command = [helm_program(), *words, "--namespace", self.namespace]
        command += ["--values", "-"] if values is not None else []
        text = json.dumps(values) if values is not None else None
        result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=2 * SECONDS)
        if check and result.returncode:
            about = self.kubectl("get", "pods,events", check=False) + self.kubectl(
                "logs", "-l", OPERATOR, "--tail=40", check=False
            )
            raise AssertionError(f"helm {' '.join(words)}: {result.stdout}{result.stderr}\n{about}")
        return result.stdout + result.stderr

    def install(self, chart: Path = CHART, **changes: Any) -> str:
        """Installs or upgrades, and waits until the operator is ready."""
        self.installed = True
        self.values = merged(self.values, changes)
        words = ("upgrade", "--install", self.name, str(chart), "--wait", f"--timeout={SECONDS:.0f}s")
        return self.helm(*words, values=self.values)

    def uninstall(self) -> None:
        self.helm("uninstall", self.name, "--wait", f"--timeout={SECONDS:.0f}s")
        self.installed = False

    def close(self) -> None:
        if self.installed:
            self.helm("uninstall", self.name, check=False)
        Kubectl()("delete", "namespace", self.namespace, "--wait=false", check=False)

    def manifests(self) -> list[Object]:
        """What the release consists of now."""
        return [found for found in yaml.safe_load_all(self.helm("get", "manifest", self.name)) if found]
