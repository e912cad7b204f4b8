"""Builders of what the operator sees: one short call per thing, with only what a test cares about."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from nemo_rl.job import names
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl.job.status import Attempt, JobStatus, Progress, TerminationMessage
from nemo_rl_operator.observe import AttemptView, PodView, Resource, Snapshot, WorkloadView, observe
from nemo_rl_operator.runtime import timestamps

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
UID = "uid-x"
IMAGE = "trainer:1"
ROLLOUT_IMAGE = "rollout:1"


def at(seconds: float) -> str:
    """The time so many seconds after NOW."""
    return timestamps.write(NOW + timedelta(seconds=seconds))


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def spec(**fields: Any) -> dict[str, Any]:
    """A valid spec as the API server stores it, with these fields (camelCase) changed."""
    found: dict[str, Any] = {
        "model": "org/model",
        "dataset": {"inline": [{"prompt": "1", "answer": "2"}]},
        "reward": {"builtin": "exact_match"},
    }
    return {name: value for name, value in (found | fields).items() if value is not ...}


def parsed(**fields: Any) -> RLTrainingJobSpec:
    return RLTrainingJobSpec.model_validate(spec(**fields))


def resource(status: JobStatus | None = None, **fields: Any) -> Resource:
    """The job `x`; keyword arguments that are fields of Resource go there, the others into the spec."""
    own = {
        name: fields.pop(name)
        for name in ("queue", "priority", "restored", "deleting", "generation", "created", "uid")
        if name in fields
    }
    found = Resource(
        namespace="ns",
        name="x",
        uid=UID,
        version="7",
        generation=1,
        created=at(-60),
        deleting=False,
        queue="",
        priority="",
        spec=json.dumps(spec(**fields)),
        status=json.dumps(status.dump()) if status else "",
        phase=(status.phase or "") if status else "",
        at_rest=False,
    )
    return _replace(found, own)


def _replace(found: Any, fields: dict[str, Any]) -> Any:
    import dataclasses

    return dataclasses.replace(found, **fields)


def attempt(number: int = 1, **fields: Any) -> AttemptView:
    found = AttemptView(
        number=number,
        name=names.attempt_job("x", number),
        uid=f"job-{number}",
        owner=UID,
        created=at(-30),
        suspended=False,
        queue="",
        workload="",
        deleting=False,
        complete=False,
        failed=False,
        reason="",
        message="",
        ended="",
        content="",
    )
    return _replace(found, fields)


def workload(**fields: Any) -> WorkloadView:
    """The job's Workload, waiting in queue `team`."""
    found = WorkloadView(
        name="x",
        uid="workload-1",
        owner=UID,
        deleting=False,
        queue="team",
        active=True,
        reserved=False,
        admitted=False,
        evicted="",
        eviction="",
        pending="",
        pods_ready=None,
        finished=False,
        assignment="",
    )
    return _replace(found, fields)


def admitted(**fields: Any) -> WorkloadView:
    return workload(**({"reserved": True, "admitted": True, "assignment": '{"flavors":["gpu"]}'} | fields))


def evicted(**fields: Any) -> WorkloadView:
    """Kueue wants the quota back for a job of higher priority."""
    return admitted(**({"evicted": "Preempted to accommodate a workload", "eviction": "Preempted"} | fields))


def failed_attempt(number: int = 1, message: str = "", ended: float = -20) -> AttemptView:
    return attempt(number, failed=True, reason="PodFailurePolicy", message=message, ended=at(ended))


def pod(number: int = 1, index: int = 0, **fields: Any) -> PodView:
    found = PodView(
        name=f"x-{number}-{index}-abcde",
        uid=f"pod-{number}-{index}",
        owner=UID,
        controller=f"job-{number}",
        attempt=number,
        index=index,
        phase="Pending",
        reason="",
        message="",
        ip="",
        created=at(-29),
        deleting=False,
        gone_by="",
        forced=False,
        scheduled=True,
        unschedulable="",
        waiting="",
        waiting_message="",
        exit_code=None,
        end_reason="",
        termination="",
        started="",
        ended="",
        disruption="",
        lingers=False,
        scheduled_at="",
        init_failure="",
        init_waiting="",
    )
    return _replace(found, fields)


def running_pod(number: int = 1, index: int = 0, **fields: Any) -> PodView:
    return pod(number, index, phase="Running", ip="10.0.0.1", started=at(-25), **fields)


def ended_pod(code: int, number: int = 1, index: int = 0, **fields: Any) -> PodView:
    """A pod whose trainer exited with this code; with 0 it left a result."""
    termination = fields.pop("termination", TerminationMessage(kind="result", total_steps=500) if code == 0 else None)
    values = {
        "phase": "Succeeded" if code == 0 else "Failed",
        "exit_code": code,
        "ended": at(-20),
        "termination": termination.encode() if termination else "",
    }
    return pod(number, index, **(values | fields))


def record(number: int = 1, cause: str | None = None, counted: bool | None = None, **fields: Any) -> Attempt:
    end = at(-20) if cause else None
    values = {"start_time": at(-30), "end_time": end, "cause": cause, "counted": counted}
    return Attempt(number=number, job=names.attempt_job("x", number), **(values | fields))


def status(*attempts: Attempt, **fields: Any) -> JobStatus:
    values: dict[str, Any] = {
        "phase": "Starting",
        "start_time": at(-30),
        "attempt": attempts[-1].number if attempts else None,
        "attempts": list(attempts),
        "counted_failures": sum(bool(a.counted) for a in attempts) or None,
    }
    return JobStatus(**(values | fields))


def seen(
    found: Resource | None = None,
    attempts: Iterable[AttemptView] = (),
    pods: Iterable[PodView] = (),
    progress: Progress | None = None,
    **fields: Any,
) -> Snapshot:
    """What the operator observes; keyword arguments are fields of Snapshot."""
    return _replace(observe(found or resource(), attempts, pods, progress, IMAGE), fields)
