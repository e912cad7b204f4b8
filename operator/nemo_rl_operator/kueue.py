"""What the operator reads from Kueue's objects, and how it reports to them. Nothing here decides anything."""

from __future__ import annotations

import json
from typing import Any

from nemo_rl.job import names
from nemo_rl_operator.observe import MAIN_POD_SET, Assignment, Queueing, Snapshot, WorkloadView, workload_view
from nemo_rl_operator.plan import Kind, Report
from nemo_rl_operator.runtime.client import Api, Object

DEFAULT_QUEUE = "default"
"""The LocalQueue that takes jobs which name none, where a namespace has it: Kueue's own rule."""
TOPOLOGY_GATE = "kueue.x-k8s.io/topology"
"""Scheduling gate that Kueue takes away once it has chosen the pod's node."""


async def queueing(api: Api, snapshot: Snapshot) -> Queueing:
    """With what the job enters a queue: the one of its label or else the namespace's default, and its priority."""
    resource = snapshot.resource
    queue = resource.queue
    if not queue and await api.exists(Kind.LOCAL_QUEUE, resource.namespace, DEFAULT_QUEUE):
        queue = DEFAULT_QUEUE
    if not queue:
        return Queueing("")
    pod_class = snapshot.spec.priority_class_name if snapshot.spec else None
    name = resource.priority or pod_class
    if not name:
        return Queueing(queue, await _default_priority(api))
    kind = Kind.WORKLOAD_PRIORITY if resource.priority else Kind.POD_PRIORITY
    found = await api.get(kind, None, name)
    if found is None:
        what = "WorkloadPriorityClass" if resource.priority else "PriorityClass"
        return Queueing(queue, problem=f"there is no {what} {name}")
    return Queueing(queue, int(found.get("value") or 0), name, pod_priority=not resource.priority)


async def _default_priority(api: Api) -> int:
    """What pods without a class get."""
    classes = await api.items(Kind.POD_PRIORITY, None, {"limit": "500"})
    return max((int(c.get("value") or 0) for c in classes if c.get("globalDefault")), default=0)


async def assignment(api: Api, workload: WorkloadView | None) -> Assignment:
    """What Kueue adds to the pods of an admitted Workload: labels and tolerations of its flavors, and the like.

    Follows sigs.k8s.io/kueue, pkg/podset.FromAssignment.
    """
    if workload is None:
        return Assignment()
    assigned: dict[str, Any] = json.loads(workload.assignment or "{}")
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    if assigned.get("topology"):  # by these Kueue finds the pods whose nodes it chooses
        labels, annotations = {names.LABEL_POD_SET: MAIN_POD_SET}, {names.ANNOTATION_WORKLOAD: workload.name}
    node_selector: dict[str, str] = {}
    tolerations: list[Object] = []
    for flavor in assigned.get("flavors") or ():
        found = await api.get(Kind.FLAVOR, None, flavor)
        spec = (found or {}).get("spec") or {}
        node_selector |= spec.get("nodeLabels") or {}
        tolerations += spec.get("tolerations") or []
    for update in assigned.get("updates") or ():
        labels |= update.get("labels") or {}
        annotations |= update.get("annotations") or {}
        node_selector |= update.get("nodeSelector") or {}
        tolerations += update.get("tolerations") or []
    written = dict.fromkeys(json.dumps(t, sort_keys=True) for t in tolerations)
    return Assignment(
        tuple(labels.items()),
        tuple(annotations.items()),
        tuple(node_selector.items()),
        tuple(written),
        (TOPOLOGY_GATE,) if assigned.get("topology") else (),
    )


async def why_held(api: Api, namespace: str, job_uid: str) -> str:
    """What a Workload that Kueue made for a Job by itself waits for."""
    params = {"labelSelector": f"kueue.x-k8s.io/job-uid={job_uid}", "limit": "1"}
    found = await api.items(Kind.WORKLOAD, namespace, params)
    return workload_view(found[0]).pending if found else ""


def with_conditions(workload: Object, report: Report, time: str) -> Object | None:
    """Changes of a Workload's status that set the conditions, and give the quota back if asked; None if there are none."""
    status = workload.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    changed = False
    for kind, holds, reason, message in report.conditions:
        value = "True" if holds else "False"
        old = conditions.get(kind) or {}
        new = {
            "type": kind,
            "status": value,
            "reason": reason or "Unknown",
            "message": message[:1024],
            "observedGeneration": workload["metadata"].get("generation", 0),
            "lastTransitionTime": old["lastTransitionTime"] if old.get("status") == value else time,
        }
        changed = changed or new != old
        conditions[kind] = new
    changes: Object = {"conditions": list(conditions.values())} if changed else {}
    if report.release and status.get("admission"):
        changes["admission"] = None
    return changes or None
