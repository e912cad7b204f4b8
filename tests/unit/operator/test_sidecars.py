"""Containers that others add to a trainer's pod: they neither hold an attempt nor fail it, and what they break is said."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rl.job import names
from nemo_rl.job.status import JobStatus, TerminationMessage
from nemo_rl_operator.decide import Decision, decide
from nemo_rl_operator.observe import PodView, newest, pod_view
from nemo_rl_operator.plan import Create, Delete
from nemo_rl_operator.policies.sidecars import PATIENCE_SECONDS
from unit.operator import make

DONE = TerminationMessage(kind="result", total_steps=500).encode()
RUNNING = {"running": {"startedAt": make.at(-25)}}
WAITING = {"waiting": {"reason": "PodInitializing"}}
LIVE = make.status(make.record(), phase="Running")


def ended(code: int, message: str = "", reason: str = "") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": make.at(-20)}}


def raw(phase: str, trainer: dict[str, Any], sidecar: dict[str, Any] | None, index: int = 0, **status: Any) -> Any:
    """A pod as the API server has it, with a container that a webhook added before the trainer's."""
    labels = {names.LABEL_JOB: "x", names.LABEL_JOB_UID: make.UID, names.LABEL_ATTEMPT: "1"}
    owner = {"kind": "Job", "name": "x-1", "uid": "job-1", "controller": True}
    meta = {"name": f"x-1-{index}", "namespace": "ns", "uid": f"p{index}", "labels": labels, "ownerReferences": [owner]}
    meta |= {"creationTimestamp": make.at(-30), "annotations": {names.ANNOTATION_JOB_INDEX: str(index)}}
    others = [{"name": "mesh-proxy", "state": sidecar}] if sidecar else []
    containers = [*others, {"name": names.TRAINER_CONTAINER, "state": trainer}]
    return {
        "metadata": meta,
        "spec": {"nodeName": "n"},
        "status": {"phase": phase, "podIP": "10.0.0.1", "containerStatuses": containers} | status,
    }


def pod(*words: Any, **more: Any) -> PodView:
    return pod_view(raw(*words, **more))


def look(status: JobStatus, pods: list[PodView], seconds: float = 0, job: Any = None, **fields: Any) -> Decision:
    found = make.resource(status, resources={"nodes": len(pods)}, **fields)
    jobs = [job or make.attempt()]
    return decide(make.seen(found, jobs, pods, verified=1, warning_event=""), make.later(seconds))


def deleted(decision: Decision) -> list[str]:
    return [a.name for a in decision.actions if isinstance(a, Delete)]


@pytest.mark.parametrize("sidecar", [RUNNING, ended(1, reason="Error"), ended(137)])
@pytest.mark.parametrize("job", ["live", "failed"])
def test_success_is_the_trainers_whatever_a_sidecar_does(sidecar: dict[str, Any], job: str) -> None:
    found = pod("Running" if sidecar is RUNNING else "Failed", ended(0, DONE), sidecar)
    attempt = make.failed_attempt(message="Job has reached the backoff limit") if job == "failed" else make.attempt()
    decision = look(LIVE, [found], job=attempt)
    assert (decision.status.phase, decision.status.attempts[0].cause) == ("Succeeded", "Succeeded")


@pytest.mark.parametrize(
    ("phase", "sidecar"),
    [
        ("Running", ended(1, reason="Error")),
        ("Pending", {"waiting": {"reason": "ImagePullBackOff"}}),
        ("Pending", {"waiting": {"reason": "CreateContainerConfigError"}}),
    ],
)
def test_a_sidecar_that_died_or_never_came_does_not_hold_the_trainer(phase: str, sidecar: dict[str, Any]) -> None:
    decision = look(make.status(make.record()), [pod(phase, RUNNING, sidecar)])
    assert (decision.status.phase, decision.status.message) == ("Running", "attempt 1 trains on 1 pod")


@pytest.mark.parametrize(("code", "phase"), [(40, "Failed"), (0, "Succeeded")])
def test_a_sidecar_that_goes_on_after_the_end_is_deleted_after_a_while_with_its_job(code: int, phase: str) -> None:
    lingers = [pod("Running", ended(code, DONE if code == 0 else ""), RUNNING)]
    first = look(LIVE, lingers)
    assert (first.status.phase, deleted(first), first.requeue_after) == (phase, [], PATIENCE_SECONDS)
    waits = look(first.status, lingers)
    assert (waits.requeue_after, deleted(waits)) == (PATIENCE_SECONDS, [])
    assert deleted(look(first.status, lingers, PATIENCE_SECONDS)) == ["x-1"]
    by_itself = [pod("Failed" if code else "Succeeded", ended(code), ended(0))]
    assert look(first.status, by_itself, PATIENCE_SECONDS, make.attempt(complete=True)).actions == ()


def test_the_next_attempt_does_not_wait_for_a_sidecar_and_the_last_one_is_let_go() -> None:
    lingers = [pod("Running", ended(143), RUNNING, conditions=[{"type": "DisruptionTarget", "status": "True"}])]
    decision = look(LIVE, lingers, backoffLimit=0)
    assert "x-2" in [a.body["metadata"]["name"] for a in decision.actions if isinstance(a, Create)]
    assert decision.status.attempts[0].cause == "Disrupted"
    later = look(decision.status, lingers, PATIENCE_SECONDS, backoffLimit=0)
    assert "x-1" in deleted(later)


def test_trainers_whose_peer_failed_in_a_pod_that_a_sidecar_keeps_are_stopped() -> None:
    pods = [pod("Running", RUNNING, RUNNING, index=0), pod("Running", ended(1), RUNNING, index=1)]
    first = look(LIVE, pods)
    assert (first.status.reason, first.requeue_after, first.actions) == ("PodFailed", PATIENCE_SECONDS, ())
    assert "x-1-1" in (first.status.message or "")
    again = look(first.status, pods, PATIENCE_SECONDS - 1)
    assert again.actions == ()
    over = look(first.status, pods, PATIENCE_SECONDS)
    assert deleted(over) == ["x-1"]
    assert (over.status.attempts[0].cause, over.status.attempts[0].counted) == ("Error", True)
    assert [a for a in over.actions if isinstance(a, Create)] == [], "not before the others have ended"


def test_a_user_error_behind_a_sidecar_is_final_also_with_several_nodes() -> None:
    pods = [pod("Running", RUNNING, RUNNING, index=0), pod("Running", ended(40), RUNNING, index=1)]
    first = look(LIVE, pods)
    over = look(first.status, pods, PATIENCE_SECONDS)
    assert (over.status.phase, deleted(over)) == ("Failed", ["x-1"])


def test_an_init_container_that_fails_is_told_in_words() -> None:
    init = [{"name": "vault-agent", "state": ended(137, "no token", "OOMKilled")}]
    found = pod("Failed", WAITING, None, initContainerStatuses=init)
    decision = look(make.status(make.record()), [found])
    assert (decision.status.attempts[0].cause, decision.status.attempts[0].counted) == ("StartFailed", True)
    assert "init container vault-agent exited with 137 (OOMKilled: no token)" in str(
        decision.status.attempts[0].message
    )


def test_an_init_container_that_is_waited_for_is_named() -> None:
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}
    init = [{"name": "istio-proxy", "state": waiting}]
    found = pod("Pending", WAITING, None, initContainerStatuses=init)
    decision = look(make.status(make.record()), [found])
    assert decision.status.reason == "InitContainer"
    assert "waits for init container istio-proxy (CrashLoopBackOff: back-off 40s)" in str(decision.status.message)


def test_the_file_servers_phase_is_its_pods() -> None:
    found = raw("Running", RUNNING, None)
    found["metadata"]["labels"].pop(names.LABEL_ATTEMPT)
    found["status"]["containerStatuses"] = [{"name": names.COMPONENT_FILES, "state": ended(1)}]
    assert pod_view(found).phase == "Running", "it starts again by itself"


@pytest.mark.parametrize(
    "owner",
    [
        {},
        {"kind": "Job", "name": "theirs", "uid": "theirs", "controller": True},
        {"kind": "ReplicaSet", "name": "x-1", "uid": "r", "controller": True},
        {"kind": "Job", "name": "x-2", "uid": "r", "controller": True},
    ],
)
@pytest.mark.parametrize("number", ["1", "7", "99"])
def test_a_strangers_pod_with_our_labels_does_not_hold_the_job(owner: dict[str, Any], number: str) -> None:
    found = raw("Running", RUNNING, None)
    found["metadata"]["labels"][names.LABEL_ATTEMPT] = number
    found["metadata"]["ownerReferences"] = [owner] if owner else []
    decision = decide(make.seen(pods=[pod_view(found)]), make.NOW)
    assert decision.status.phase == "Starting"
    assert "x-1" in [a.body["metadata"]["name"] for a in decision.actions if isinstance(a, Create)]
    ended_once = make.status(make.record(1, "Disrupted", False))
    retried = make.seen(make.resource(ended_once), [make.failed_attempt()], [pod_view(found)], verified=1)
    assert "x-2" in [a.body["metadata"]["name"] for a in decide(retried, make.NOW).actions if isinstance(a, Create)]


def test_a_pod_that_outlives_its_job_is_ours_and_holds_the_next_attempt() -> None:
    found = pod_view(raw("Running", RUNNING, None))
    decision = decide(make.seen(make.resource(LIVE), pods=[found], verified=1), make.NOW)
    assert decision.status.reason == "WaitingForPods"
    assert decision.actions == ()


def test_a_strangers_pod_is_not_taken_for_the_file_server() -> None:
    found = raw("Failed", RUNNING, None)
    found["metadata"]["labels"].pop(names.LABEL_ATTEMPT)
    found["metadata"]["ownerReferences"] = []
    job = make.resource(LIVE, output={"serveUntil": make.at(100)})
    decision = decide(make.seen(job, [make.attempt()], [pod_view(found), make.running_pod()]), make.NOW)
    assert [a.body["metadata"]["name"] for a in decision.actions if isinstance(a, Create)] == ["x-job", "x-files"]
    assert deleted(decision) == []


def test_of_two_pods_of_one_second_the_deleted_one_is_the_older_whatever_their_names() -> None:
    replaced = make.pod(1, 0, name="x-1-0-z", phase="Failed", exit_code=75, deleting=True)
    for name in ("x-1-0-a", "x-1-0-zz"):
        succeeded = make.pod(1, 0, name=name, phase="Succeeded", exit_code=0)
        assert newest((succeeded, replaced)) == newest((replaced, succeeded)) == (succeeded,)
