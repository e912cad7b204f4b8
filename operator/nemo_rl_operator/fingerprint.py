"""What a Job runs, as a short digest: by it an attempt that the operator made is told from a Job that only says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Object = Mapping[str, Any]

_WITHIN_POD = (
    *("initContainers", "ephemeralContainers", "volumes", "serviceAccountName", "subdomain", "runtimeClassName"),
    *("hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace", "securityContext"),
)
_WITHIN_CONTAINER = (
    *("name", "image", "command", "args", "env", "envFrom", "volumeMounts", "volumeDevices", "lifecycle"),
    "securityContext",
)
_RUNS = {"completionMode": "NonIndexed", "completions": 1, "backoffLimit": 6}
"""What of a Job says what runs, with the API server's defaults. Kueue changes placement and suspends; that is not in it."""


def fingerprint(spec: Object) -> str:
    """A digest of what a Job runs: equal for a Job as the operator makes it and as the API server completed it."""
    return hashlib.sha256(json.dumps(runs(spec), sort_keys=True).encode()).hexdigest()[:16]


def runs(spec: Object) -> dict[str, Any]:
    """What of a Job's specification says what runs in its pods."""
    pod = (spec.get("template") or {}).get("spec") or {}
    found = {name: spec.get(name, default) for name, default in _RUNS.items()}
    found |= {name: pod.get(name) for name in _WITHIN_POD}
    found["token"] = "none" if pod.get("automountServiceAccountToken") is False else "mounted"
    found["containers"] = [
        {name: container.get(name) for name in _WITHIN_CONTAINER} for container in pod.get("containers") or ()
    ]
    return {name: _given(value) for name, value in found.items()}


def _given(value: Any) -> Any:
    """Without empty values and the modes of files, which the API server leaves out or fills in."""
    if isinstance(value, dict):
        return {name: given for name, each in value.items() if name != "defaultMode" and (given := _given(each))}
    return [_given(each) for each in value] if isinstance(value, list) else value
