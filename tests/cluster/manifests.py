"""Builders of what users write (manifests) and of what trainers say (termination messages)."""

from __future__ import annotations

import copy
from typing import Any

from cluster.api import Object
from nemo_rl.job import names
from nemo_rl.job.status import TerminationMessage

SMALLEST: dict[str, Object] = {
    "grpo": {
        "model": "tiny",
        "dataset": {"inline": [{"prompt": "2+2=", "answer": "4"}]},
        "reward": {"builtin": "exact_match"},
    },
    "sft": {"model": "tiny", "algorithm": "sft", "dataset": {"inline": [{"prompt": "a", "completion": "b"}]}},
    "dpo": {
        "model": "tiny",
        "algorithm": "dpo",
        "dataset": {"inline": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
    },
}


def job(name: str, algorithm: str = "grpo", job_labels: dict[str, str] | None = None, **spec: Any) -> Object:
    """A manifest on CPU. spec: camelCase fields that are merged in, section by section; None removes a field."""
    content = {"resources": {"gpusPerNode": 0}, **copy.deepcopy(SMALLEST[algorithm])}
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "labels": job_labels or {}},
        "spec": merge(content, spec),
    }


def merge(base: Object, changes: Object) -> Object:
    """base with changes merged in as a merge patch does: None removes, mappings merge, all else replaces."""
    result = dict(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def result(steps: int = 10, **more: Any) -> str:
    """The last word of a trainer that succeeded."""
    return TerminationMessage(kind="result", total_steps=steps, **more).encode()


def failure(message: str, **more: Any) -> str:
    """The last word of a trainer that failed."""
    return TerminationMessage(kind="failure", message=message, **more).encode()


def bundle(name: str, parts: int) -> Object:
    """An entry of spec.bundles, in as many parts, named NAME-part-0, ..."""
    return {"name": name, "sha256": "0" * 64, "configMaps": [f"{name}-part-{i}" for i in range(parts)]}
