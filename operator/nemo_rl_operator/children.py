"""Whether an object that exists is what the operator would make: where it differs, in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from nemo_rl_operator import frozen
from nemo_rl_operator.fingerprint import runs
from nemo_rl_operator.plan import Kind

Object = Mapping[str, Any]

STRAY_SECONDS = 60
"""A Job that says it is the job's and is not what the operator makes has its name for so long; then it is deleted.

Not at once: of two operators of different versions, the one that was faster has made it, and will say so in the status.
"""

_SUFFIXES: dict[str, Decimal] = {
    **{"": Decimal(1), "m": Decimal("0.001")},
    **{letter: Decimal(1000) ** power for power, letter in enumerate("kMGTP", 1)},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTP", 1)},
}


def difference(kind: Kind, found: Object, body: Object) -> str:
    """What of an object that exists is not as in the one that we make; empty where nothing that matters is."""
    compare = _COMPARED.get(kind)
    return compare(found, body) if compare else ""


# --- Jobs


def _job(found: Object, body: Object) -> str:
    theirs, ours = runs(found.get("spec") or {}), runs(body["spec"])
    return ", ".join(sorted(name for name in ours if theirs[name] != ours[name]))


# --- Services, claims


def _service(found: Object, body: Object) -> str:
    """Where the host names of the pods would lead elsewhere."""
    theirs, ours = found.get("spec") or {}, body["spec"]
    wrong = [name for name in ("selector", "clusterIP") if theirs.get(name) != ours[name]]
    if theirs.get("externalName") or theirs.get("type", "ClusterIP") != "ClusterIP":
        wrong.append("type")
    if not theirs.get("publishNotReadyAddresses"):
        wrong.append("publishNotReadyAddresses")
    return ", ".join(wrong)


def _claim(found: Object, body: Object) -> str:
    """Where a claim that was kept gives less than, or something else than, the job asks for."""
    theirs, ours = found.get("spec") or {}, body["spec"]
    wrong = []
    size, asked = (spec.get("resources", {}).get("requests", {}).get("storage", "0") for spec in (theirs, ours))
    if quantity(size) < quantity(asked):
        wrong.append(f"it has {size}, spec.output.size asks for {asked}")
    modes, wanted = theirs.get("accessModes") or [], ours["accessModes"][0]
    if wanted not in modes:
        wrong.append(f"its access mode is {' and '.join(modes) or 'not set'}, the job asks for {wanted}")
    if "storageClassName" in ours and theirs.get("storageClassName") != ours["storageClassName"]:
        theirs_class = theirs.get("storageClassName") or "not set"
        wrong.append(f"its storage class is {theirs_class}, the job asks for {ours['storageClassName']}")
    if theirs.get("volumeMode", "Filesystem") != "Filesystem":
        wrong.append(f"its volume mode is {theirs['volumeMode']}, the job needs Filesystem")
    return "; ".join(wrong)


def _workload(found: Object, body: Object) -> str:
    """Where a Workload asks Kueue for other quota than the job takes."""
    theirs, ours = ([_quota(p) for p in o["spec"].get("podSets") or ()] for o in (found, body))
    return "" if theirs == ours else "what its pods ask for"


def _quota(pods: Object) -> Any:
    containers = pods["template"]["spec"].get("containers") or ()
    asked = [(c.get("resources") or {}).get("requests") or {} for c in containers]
    return pods["name"], pods.get("count", 1), [{n: quantity(v) for n, v in a.items()} for a in asked]


def quantity(text: str) -> Decimal:
    """An amount of the core API, like 20Gi, as a number; -1 for what is none."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]{0,2})", str(text))
    if match is None or match[2] not in _SUFFIXES:
        return Decimal(-1)
    return Decimal(match[1]) * _SUFFIXES[match[2]]


_COMPARED: dict[Kind, Callable[[Object, Object], str]] = {
    Kind.CONFIG_MAP: frozen.difference,
    Kind.JOB: _job,
    Kind.SERVICE: _service,
    Kind.CLAIM: _claim,
    Kind.WORKLOAD: _workload,
}
