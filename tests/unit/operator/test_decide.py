"""The life cycle of a job, row by row: what is snapshot, and what follows."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rl.job.status import Checkpoint, Progress, TerminationMessage
from nemo_rl_operator.decide import Decision, decide
from nemo_rl_operator.observe import Blocked
from nemo_rl_operator.plan import Create, Delete, Kind, Need
from unit.operator import make


def made(decision: Decision) -> list[str]:
    return [f"{a.body['kind']} {a.body['metadata']['name']}" for a in decision.actions if isinstance(a, Create)]


def deleted(decision: Decision) -> list[str]:
    return [a.name for a in decision.actions if isinstance(a, Delete)]


def conditions(decision: Decision) -> dict[str, str]:
    return {c.type: c.status for c in decision.status.conditions}


LIVE = make.status(make.record())


def test_a_new_job_gets_its_objects_and_its_first_attempt() -> None:
    decision = decide(make.seen(), make.NOW)
    assert made(decision) == ["ConfigMap x-job", "PersistentVolumeClaim x-output", "Job x-1"]
    status = decision.status
    assert (status.phase, status.attempt, status.start_time) == ("Starting", 1, make.at(0))
    assert conditions(decision) == {"Accepted": "True", "Running": "False", "Finished": "False"}
    assert status.observed_generation == 1
    assert [e.reason for e in decision.events] == ["AttemptStarted"]


def test_several_nodes_get_a_service_too() -> None:
    decision = decide(make.seen(make.resource(resources={"nodes": 2})), make.NOW)
    assert "Service x" in made(decision)


def test_a_job_with_a_claim_of_its_own_gets_none() -> None:
    decision = decide(make.seen(make.resource(output={"claim": "mine"})), make.NOW)
    assert made(decision) == ["ConfigMap x-job", "Job x-1"]


def test_a_job_being_deleted_is_left_alone() -> None:
    decision = decide(make.seen(make.resource(deleting=True)), make.NOW)
    assert decision.actions == ()


def test_a_job_suspended_by_somebody_else_is_not_resumed() -> None:
    decision = decide(make.seen(make.resource(LIVE), [make.attempt(suspended=True)]), make.NOW)
    assert decision.actions == ()
    assert decision.status.phase == "Queued"
    assert "suspended, and not by this operator" in str(decision.status.message)


@pytest.mark.parametrize(
    ("parts", "phase", "message"),
    [
        (frozenset(), "Pending", "waiting for 2 of 2 bundle parts"),
        (frozenset({"b-0"}), "Pending", "waiting for 1 of 2 bundle parts"),
        (frozenset({"b-0", "b-1"}), "Starting", "attempt 1 starts"),
    ],
)
def test_bundles_are_waited_for(parts: frozenset[str], phase: str, message: str) -> None:
    job = make.resource(bundles=[{"name": "code", "sha256": "0" * 64, "configMaps": ["b-0", "b-1"]}])
    assert decide(make.seen(job), make.NOW).needs == {Need.BUNDLES}
    decision = decide(make.seen(job, bundle_parts=parts), make.NOW)
    assert (decision.status.phase, decision.status.message) == (phase, message)


def test_bundles_that_never_come_fail_the_job() -> None:
    bundles = [{"name": "code", "sha256": "0" * 64, "configMaps": ["b-0", "b-1"]}]
    job = make.resource(bundles=bundles, created=make.at(-601))
    decision = decide(make.seen(job, bundle_parts=frozenset({"b-1"})), make.NOW)
    assert decision.status.phase == "Failed"
    assert decision.status.failure is not None
    assert decision.status.failure.cause == "BundlesMissing"
    assert "first missing: ConfigMap b-0" in str(decision.status.failure.message)


def test_an_invalid_spec_fails_with_the_path_of_the_field() -> None:
    decision = decide(make.seen(make.resource(training={"maxSteps": 0})), make.NOW)
    assert decision.status.phase == "Failed"
    assert conditions(decision)["Accepted"] == "False"
    assert "spec.training.maxSteps" in str(decision.status.message)
    assert decision.actions == ()


@pytest.mark.parametrize(
    ("pods", "phase"),
    [
        ([], "Starting"),
        ([make.pod()], "Starting"),
        ([make.running_pod()], "Running"),
        ([make.pod(unschedulable="0/2 nodes are available: 2 Insufficient nvidia.com/gpu.")], "Pending"),
        ([make.pod(waiting="ImagePullBackOff", waiting_message="not found")], "Starting"),
        ([make.pod(waiting="InvalidImageName")], "Failed"),
    ],
)
def test_the_phase_of_a_live_attempt_comes_from_its_pods(pods: list[Any], phase: str) -> None:
    decision = decide(make.seen(make.resource(LIVE), [make.attempt()], pods, warning_event=""), make.NOW)
    assert decision.status.phase == phase


def test_several_nodes_run_when_all_of_them_do() -> None:
    job = make.resource(LIVE, resources={"nodes": 2})
    one = decide(make.seen(job, [make.attempt()], [make.running_pod(), make.pod(index=1)], warning_event=""), make.NOW)
    both = decide(make.seen(job, [make.attempt()], [make.running_pod(), make.running_pod(index=1)]), make.NOW)
    assert (one.status.phase, one.status.message) == (
        "Starting",
        "1 of 2 pods run; waiting for x-1-1-abcde",
    )
    assert (both.status.phase, both.status.message) == ("Running", "attempt 1 trains on 2 pods")


def test_a_failed_pod_of_eight_is_named_and_nobody_says_that_all_train() -> None:
    status = make.status(make.record(), phase="Running", message="attempt 1 trains on 8 pods")
    pods = [make.running_pod(index=i, deleting=True, gone_by=make.at(120)) for i in range(8)]
    pods[3] = make.ended_pod(1, index=3)
    job = make.resource(status, resources={"nodes": 8})
    decision = decide(make.seen(job, [make.attempt()], pods), make.later(60))
    assert decision.status.reason == "PodFailed"
    assert decision.status.message == (
        "pod x-1-3-abcde ended: the trainer exited with 1; waiting for the other pods to end (7 of 8 left)"
    )
    assert conditions(decision)["Running"] == "False"


def test_late_pods_are_named() -> None:
    job = make.resource(LIVE, resources={"nodes": 8})
    seven = [make.running_pod(index=i) for i in range(7)]
    late = make.pod(index=7, waiting="ContainerCreating")
    said = decide(make.seen(job, [make.attempt()], [*seven, late], warning_event=""), make.NOW)
    assert said.status.message == "7 of 8 pods run; waiting for x-1-7-abcde (ContainerCreating)"
    none = decide(make.seen(job, [make.attempt()], seven, warning_event=""), make.NOW)
    assert none.status.message == "7 of 8 pods run; waiting for the pod with index 7, which is not made yet"
    few = decide(make.seen(job, [make.attempt()], [*seven[:2], late], warning_event=""), make.NOW)
    assert str(few.status.message).endswith("index 4, which is not made yet, 3 more")


def test_that_it_runs_is_taken_back_only_when_its_pods_were_read() -> None:
    live = make.seen(make.resource(LIVE), [make.attempt()], [make.running_pod()])
    running = decide(live, make.NOW).status
    assert running.phase == "Running"
    old, job = make.attempt(created=make.at(-30)), make.resource(running)
    asked = decide(make.seen(job, [old]), make.NOW)
    assert (asked.status.phase, asked.needs) == ("Running", {Need.ATTEMPT})
    read = decide(make.seen(job, [old], verified=1, warning_event=""), make.NOW)
    assert (read.status.phase, read.needs) == ("Starting", frozenset())


def test_a_start_is_quiet_at_first_and_then_looked_into() -> None:
    young, old = make.attempt(created=make.at(-2)), make.attempt(created=make.at(-30))
    first = decide(make.seen(make.resource(LIVE), [young], [make.pod()]), make.NOW)
    assert (first.status.message, first.needs, first.requeue_after) == ("the pod starts", frozenset(), 8.0)
    assert decide(make.seen(make.resource(LIVE), [old], [make.pod()]), make.NOW).needs == {Need.WARNING_EVENT}
    looked = make.seen(make.resource(LIVE), [old], [make.pod()], warning_event="")
    assert decide(looked, make.NOW).requeue_after == 10.0


def test_a_claim_that_is_not_bound_yet_is_said_at_once_and_looked_into_when_it_stays_so() -> None:
    pods = [make.pod(unschedulable="0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims.")]
    young, old = make.attempt(created=make.at(-2)), make.attempt(created=make.at(-30))
    first = decide(make.seen(make.resource(LIVE), [young], pods), make.NOW)
    assert (first.status.phase, first.status.reason, first.requeue_after) == ("Pending", "UnboundClaim", 8.0)
    later = decide(make.seen(make.resource(LIVE), [old], pods, warning_event=""), make.NOW)
    assert (later.status.phase, later.status.reason) == ("Pending", "UnboundClaim")


def test_success_is_read_from_index_0_before_the_job_says_so() -> None:
    termination = TerminationMessage(
        kind="result", total_steps=500, metrics={"reward": 0.9}, checkpoint=Checkpoint(best="x/best", best_step=450)
    )
    decision = decide(
        make.seen(make.resource(LIVE), [make.attempt()], [make.ended_pod(0, termination=termination)]), make.NOW
    )
    status = decision.status
    assert status.phase == "Succeeded"
    assert status.completion_time == make.at(0), "by our clock, not by the node's"
    assert status.result is not None
    assert (status.result.total_steps, status.result.metrics) == (500, {"reward": "0.9"})
    assert status.checkpoint is not None
    assert status.checkpoint.best == "x/best"
    assert status.progress is not None
    assert (status.progress.text, status.progress.percent) == ("500/500", 100)
    assert conditions(decision) == {"Accepted": "True", "Running": "False", "Finished": "True", "Complete": "True"}
    assert status.attempts[-1].cause == "Succeeded"
    assert decision.actions == ()


def test_success_of_another_index_is_not_the_jobs() -> None:
    job = make.resource(LIVE, resources={"nodes": 2})
    decision = decide(make.seen(job, [make.attempt()], [make.running_pod(), make.ended_pod(0, index=1)]), make.NOW)
    assert decision.status.phase == "Running"


def test_exit_0_without_a_result_is_no_success() -> None:
    pods = [make.ended_pod(0, termination=None)]
    decision = decide(make.seen(make.resource(LIVE), [make.attempt()], pods, verified=1), make.NOW)
    assert decision.status.attempts[0].cause == "NoResult"
    assert decision.status.attempts[0].counted


def test_a_complete_job_whose_pods_are_gone_succeeded() -> None:
    decision = decide(make.seen(make.resource(LIVE), [make.attempt(complete=True, ended=make.at(-20))]), make.NOW)
    assert decision.status.phase == "Succeeded"


@pytest.mark.parametrize(("code", "cause"), [(40, "UserError"), (41, "BadData"), (42, "NonFiniteTraining")])
def test_a_user_error_fails_the_job_at_once_with_its_traceback(code: int, cause: str) -> None:
    termination = TerminationMessage(
        kind="failure", message="reward raised KeyError", traceback="line 1\nKeyError: 'a'"
    )
    decision = decide(
        make.seen(make.resource(LIVE), [make.attempt()], [make.ended_pod(code, termination=termination)]), make.NOW
    )
    failure = decision.status.failure
    assert decision.status.phase == "Failed"
    assert failure is not None
    assert (failure.cause, failure.exit_code, failure.pod) == (cause, code, "x-1-0-abcde")
    assert (failure.message, failure.traceback) == ("reward raised KeyError", "line 1\nKeyError: 'a'")
    assert decision.actions == (), "the pod stays, with its log"
    assert conditions(decision)["Failed"] == "True"
    assert conditions(decision)["Finished"] == "True"


def test_a_disruption_is_retried_at_once_and_not_counted() -> None:
    pods = [make.ended_pod(143, disruption="EvictionByEvictionAPI: drained")]
    job = make.resource(LIVE, backoffLimit=0)
    asked = decide(make.seen(job, [make.failed_attempt()], pods), make.NOW)
    assert asked.needs == {Need.ATTEMPT}, "the cache may be old: attempt 1 is read before attempt 2 starts"
    decision = decide(make.seen(job, [make.failed_attempt()], pods, verified=1), make.NOW)
    assert "Job x-2" in made(decision)
    first, second = decision.status.attempts
    assert (first.cause, first.counted, first.end_time) == ("Disrupted", False, make.at(-20))
    assert (second.number, second.end_time) == (2, None)


def test_an_infrastructure_failure_is_counted_and_retried_after_a_delay() -> None:
    pods = [make.ended_pod(1, ended=make.at(-4))]
    decision = decide(make.seen(make.resource(LIVE), [make.failed_attempt(ended=-3)], pods), make.NOW)
    assert made(decision) == []
    assert (decision.status.phase, decision.status.reason) == ("Pending", "BackOff")
    assert decision.status.counted_failures == 1
    assert decision.requeue_after == 7.0
    again = make.resource(decision.status)
    assert "Job x-2" in made(decide(make.seen(again, [make.failed_attempt()], pods, verified=1), make.later(7)))


def test_after_backoff_limit_failures_the_job_fails() -> None:
    status = make.status(make.record(1, "Error", True), make.record(2))
    pods = [make.ended_pod(137, number=2, end_reason="OOMKilled")]
    job = make.resource(status, backoffLimit=1)
    decision = decide(make.seen(job, [make.failed_attempt(1), make.failed_attempt(2)], pods), make.NOW)
    assert decision.status.phase == "Failed"
    assert decision.status.failure is not None
    assert decision.status.failure.cause == "OutOfMemory"
    assert "2 attempts failed and backoffLimit is 1" in str(decision.status.message)


def test_a_job_deleted_by_somebody_is_started_again() -> None:
    asked = decide(make.seen(make.resource(LIVE)), make.NOW)
    assert asked.needs == {Need.ATTEMPT}
    decision = decide(make.seen(make.resource(LIVE), verified=1), make.NOW)
    assert decision.status.attempts[0].cause == "JobDeleted"
    assert "Job x-2" in made(decision)


def test_a_pod_that_is_being_deleted_is_said_to_end_and_its_attempt_goes_on_until_then() -> None:
    pod = make.running_pod(deleting=True, gone_by=make.at(20), disruption="DeletionByTaintManager: node is gone")
    decision = decide(
        make.seen(make.resource(make.status(make.record(), phase="Running")), [make.attempt()], [pod]), make.NOW
    )
    assert (decision.status.phase, decision.status.reason) == ("Running", "WaitingForPods")
    assert "node is gone" in (decision.status.message or "")
    assert decision.requeue_after == 50
    assert decision.actions == ()


def test_a_node_that_does_not_report_the_end_of_its_pod_is_said_to_be_lost_with_the_cure() -> None:
    pod = make.running_pod(deleting=True, gone_by=make.at(-31))
    decision = decide(
        make.seen(make.resource(make.status(make.record(), phase="Running")), [make.attempt()], [pod]), make.NOW
    )
    assert (decision.status.phase, decision.status.reason) == ("Pending", "PodLost")
    assert f"kubectl delete pod {pod.name} --force" in (decision.status.message or "")
    assert decision.actions == (), "its node may still run it: never two attempts at once"


def test_a_pod_deleted_by_force_on_a_silent_node_is_a_disruption_and_its_job_is_let_go() -> None:
    running = make.status(make.record(), phase="Running")
    fresh = make.running_pod(deleting=True, forced=True, gone_by=make.at(-10))
    decision = decide(make.seen(make.resource(running), [make.attempt()], [fresh]), make.NOW)
    assert decision.actions == (), "a node that answers reports the end in time"
    assert decision.requeue_after == 20
    silent = make.running_pod(deleting=True, forced=True, gone_by=make.at(-30))
    decision = decide(make.seen(make.resource(running), [make.attempt()], [silent]), make.NOW)
    assert deleted(decision) == ["x-1"]
    assert (decision.status.attempts[0].cause, decision.status.attempts[0].counted) == ("Disrupted", False)
    assert made(decision) == [], "not before the pod is gone"
    again = decide(make.seen(make.resource(decision.status), [make.attempt()], [silent]), make.NOW)
    assert deleted(again) == ["x-1"], "also when the deletion was refused the first time"


def test_a_new_attempt_waits_for_the_pods_of_the_last() -> None:
    decision = decide(make.seen(make.resource(LIVE), pods=[make.running_pod(deleting=True)], verified=1), make.NOW)
    assert made(decision) == []
    assert decision.status.reason == "WaitingForPods"
    assert decision.status.message == "waiting for pod x-1-0-abcde of attempt 1 to end"


def test_suspend_stops_the_pods_and_then_says_so() -> None:
    running = make.resource(make.status(make.record(), phase="Running"), suspend=True)
    stopping = decide(make.seen(running, [make.attempt()], [make.running_pod()]), make.NOW)
    assert deleted(stopping) == ["x-1"]
    assert (stopping.status.phase, stopping.status.reason) == ("Running", "Stopping")
    gone = decide(make.seen(make.resource(stopping.status, suspend=True), verified=1), make.later(5))
    assert gone.status.phase == "Suspended"
    assert gone.status.attempts[0].cause == "Suspended"
    assert conditions(gone)["Suspended"] == "True"


def test_the_last_word_of_a_suspended_pod_says_where_it_saved() -> None:
    progress = Progress(step=5, total_steps=9)
    running = make.resource(make.status(make.record(), phase="Running", progress=progress), suspend=True)
    termination = TerminationMessage(
        kind="failure", exit_code=75, total_steps=7, checkpoint=Checkpoint(latest="x/step-7", latest_step=7)
    )
    saved = make.ended_pod(75, termination=termination, deleting=True)
    stopping = decide(make.seen(running, [make.attempt(deleting=True)], [saved]), make.NOW)
    assert stopping.status.checkpoint is not None
    assert stopping.status.checkpoint.latest_step == 7
    gone = decide(make.seen(make.resource(stopping.status, suspend=True), verified=1), make.later(5))
    assert gone.status.phase == "Suspended"
    assert gone.status.progress is not None
    assert gone.status.progress.text == "7/9"
    assert gone.status.attempts[-1].to_step == 7


def test_a_suspended_job_stops_an_attempt_that_it_could_not_make_any_more() -> None:
    """Made just before an operator ended, and the job was changed since: it says that it is ours, and would train on."""
    stopped = make.status(make.record(end_time=make.at(-50), cause="Suspended", counted=False), phase="Suspended")
    job = make.resource(stopped, suspend=True, resources={"memory": "64Gi"})
    stray = make.attempt(2, content="other")
    decision = decide(make.seen(job, strays=(stray,), verified=1), make.NOW)
    assert deleted(decision) == [stray.name]
    assert (decision.status.phase, decision.status.reason) == ("Starting", "Stopping")
    ending = decide(make.seen(job, strays=(make.attempt(2, content="other", deleting=True),), verified=1), make.NOW)
    assert deleted(ending) == []
    assert decide(make.seen(job, verified=1), make.NOW).status.reason == "Suspended"


def test_a_job_created_suspended_starts_nothing() -> None:
    decision = decide(make.seen(make.resource(suspend=True)), make.NOW)
    assert (decision.status.phase, decision.actions) == ("Suspended", ())


def test_resume_makes_the_next_attempt() -> None:
    status = make.status(make.record(1, "Suspended", False), phase="Suspended")
    decision = decide(make.seen(make.resource(status), verified=1), make.NOW)
    assert "Job x-2" in made(decision)
    assert decision.status.phase == "Starting"


def test_resume_while_the_pods_still_save_waits_for_them() -> None:
    status = make.status(make.record(1, "Suspended", False, end_time=None), phase="Running")
    decision = decide(
        make.seen(make.resource(status), [make.attempt(deleting=True)], [make.running_pod(deleting=True)]), make.NOW
    )
    assert decision.actions == ()
    assert decision.status.reason == "WaitingForPods"


def test_a_result_while_suspending_is_kept() -> None:
    status = make.status(make.record(1, "Suspended", False, end_time=None), phase="Running")
    decision = decide(
        make.seen(make.resource(status, suspend=True), [make.attempt(deleting=True)], [make.ended_pod(0)]), make.NOW
    )
    assert decision.status.phase == "Succeeded"


def test_the_deadline_ends_the_job_and_stops_its_pods() -> None:
    status = make.status(make.record(), phase="Running", active_since=make.at(-30))
    job = make.resource(status, activeDeadlineSeconds=30)
    decision = decide(make.seen(job, [make.attempt()], [make.running_pod()]), make.NOW)
    assert decision.status.phase == "Failed"
    assert decision.status.failure is not None
    assert decision.status.failure.cause == "DeadlineExceeded"
    assert deleted(decision) == ["x-1"]


def test_a_name_that_somebody_else_has_is_said_and_in_the_end_fails() -> None:
    blocked = Blocked("NameConflict", "Job x-1 exists and does not belong to this job", fatal=False, conflict=True)
    decision = decide(make.seen(blocked=blocked), make.NOW)
    assert (decision.status.phase, conditions(decision)["Accepted"]) == ("Pending", "False")
    assert decision.actions == ()
    later = decide(make.seen(make.resource(decision.status), blocked=blocked), make.later(601))
    assert later.status.phase == "Failed"


def test_an_object_that_the_api_server_refuses_fails_the_job() -> None:
    blocked = Blocked("Refused", "the API server refuses Job x-1: too long", fatal=True)
    decision = decide(make.seen(blocked=blocked), make.NOW)
    assert (decision.status.phase, decision.status.message) == ("Failed", blocked.message)


def test_quota_is_waited_for() -> None:
    blocked = Blocked("QuotaExceeded", "waiting for quota q", fatal=False)
    decision = decide(make.seen(blocked=blocked), make.NOW)
    assert (decision.status.phase, decision.status.reason) == ("Pending", "QuotaExceeded")
    assert decision.requeue_after == 10.0


def test_without_any_image_it_says_who_should_name_one() -> None:
    decision = decide(make.seen(image=""), make.NOW)
    assert decision.actions == ()
    assert "give spec.image" in str(decision.status.message)


def test_progress_and_a_new_checkpoint_are_shown() -> None:
    progress = Progress(
        step=120, total_steps=500, seconds_remaining=840, checkpoint=Checkpoint(latest="x/c", latest_step=100)
    )
    status = make.status(make.record(), phase="Running")
    decision = decide(make.seen(make.resource(status), [make.attempt()], [make.running_pod()], progress), make.NOW)
    assert decision.status.progress is not None
    assert (decision.status.progress.text, decision.status.progress.eta) == ("120/500", "14m")
    assert decision.status.checkpoint is not None
    assert decision.status.checkpoint.latest_step == 100
    assert [(e.reason, e.key) for e in decision.events] == [("CheckpointSaved", "100")]


def test_a_lost_status_is_made_again_from_the_children() -> None:
    attempts = [make.failed_attempt(1), make.attempt(2)]
    pods = [make.ended_pod(1), make.running_pod(2)]
    decision = decide(make.seen(attempts=attempts, pods=pods), make.NOW)
    status = decision.status
    assert (status.phase, status.attempt, status.counted_failures) == ("Running", 2, 1)
    assert [a.cause for a in status.attempts] == ["Error", None]


def test_children_of_an_earlier_job_of_the_same_name_do_not_count() -> None:
    strange = make.attempt(owner="another uid", complete=True)
    decision = decide(make.seen(attempts=[strange], pods=[make.ended_pod(0, owner="another uid")]), make.NOW)
    assert decision.status.phase == "Starting"
    assert "Job x-1" in made(decision)


def test_a_pod_that_merely_carries_our_labels_is_not_believed() -> None:
    forged = make.ended_pod(0, controller="")
    decision = decide(make.seen(make.resource(LIVE), [make.attempt()], [forged]), make.NOW)
    assert decision.status.phase == "Starting"


def test_only_the_newest_ten_attempts_are_kept() -> None:
    status = make.status(*(make.record(n, "Disrupted", False, end_time=make.at(-400)) for n in range(1, 11)))
    attempts = [make.failed_attempt(n) for n in range(1, 11)]
    decision = decide(make.seen(make.resource(status), attempts, verified=10), make.NOW)
    assert "Job x-11" in made(decision)
    assert deleted(decision) == ["x-1"]
    assert [a.number for a in decision.status.attempts] == list(range(2, 12))


FINISHED = make.status(make.record(1, "Succeeded", False), phase="Succeeded", completion_time=make.at(-20))


def test_a_finished_job_is_left_alone() -> None:
    decision = decide(make.seen(make.resource(FINISHED), [make.attempt(complete=True)], [make.ended_pod(0)]), make.NOW)
    assert decision.actions == ()
    assert decision.requeue_after is None


def test_a_failed_job_with_a_live_attempt_stops_it() -> None:
    failed = FINISHED.model_copy(update={"phase": "Failed"})
    decision = decide(make.seen(make.resource(failed), [make.attempt()], [make.running_pod()]), make.NOW)
    assert deleted(decision) == ["x-1"]


def test_pods_that_linger_after_success_are_stopped_in_the_end() -> None:
    job = make.resource(FINISHED, resources={"nodes": 2})
    pods = [make.ended_pod(0), make.running_pod(index=1)]
    assert deleted(decide(make.seen(job, [make.attempt()], pods), make.NOW)) == []
    assert deleted(decide(make.seen(job, [make.attempt()], pods), make.later(300))) == ["x-1"]


def test_ttl_deletes_the_job_in_time() -> None:
    job = make.resource(FINISHED, ttlSecondsAfterFinished=50)
    early = decide(make.seen(job), make.NOW)
    assert (early.actions, early.requeue_after) == ((), 30.0)
    late = decide(make.seen(job), make.later(30))
    assert late.actions == (Delete(Kind.RESOURCE, "x", make.UID),)


def test_ttl_waits_until_the_output_is_no_longer_served() -> None:
    job = make.resource(FINISHED, ttlSecondsAfterFinished=0, output={"serveUntil": make.at(100)})
    files = make.running_pod(attempt=0)
    assert decide(make.seen(job, pods=[files]), make.NOW).actions == ()


def test_the_output_is_served_until_its_time_is_over() -> None:
    job = make.resource(FINISHED, output={"serveUntil": make.at(100)})
    start = decide(make.seen(job), make.NOW)
    assert (made(start), start.requeue_after) == (["ConfigMap x-job", "Pod x-files"], 100.0)
    files = make.running_pod(attempt=0, name="x-files")
    assert decide(make.seen(job, pods=[files]), make.NOW).actions == ()
    assert deleted(decide(make.seen(job, pods=[files]), make.later(100))) == ["x-files"]


def test_the_output_in_a_store_is_served_too() -> None:
    job = make.resource(FINISHED, output={"serveUntil": make.at(100), "uri": "s3://bucket/runs"})
    assert made(decide(make.seen(job), make.NOW)) == ["ConfigMap x-job", "Pod x-files"]


def test_a_file_server_that_ended_is_replaced() -> None:
    job = make.resource(FINISHED, output={"serveUntil": make.at(100)})
    decision = decide(make.seen(job, pods=[make.pod(attempt=0, name="x-files", phase="Failed")]), make.NOW)
    assert deleted(decision) == ["x-files"]


def test_raising_the_backoff_limit_of_a_failed_job_does_not_bring_it_back() -> None:
    failed = FINISHED.model_copy(update={"phase": "Failed"})
    decision = decide(make.seen(make.resource(failed, backoffLimit=100, generation=2)), make.NOW)
    assert (decision.status.phase, decision.status.observed_generation, decision.actions) == ("Failed", 2, ())


def test_a_job_restored_without_its_status_waits_to_be_told_and_one_that_has_begun_goes_on() -> None:
    held = decide(make.seen(make.resource(restored="nightly")), make.NOW)
    assert (held.status.phase, held.status.reason, held.actions) == ("Pending", "Restored", ())
    assert "kubectl label rlj x velero.io/restore-name-" in str(held.status.message)
    told = decide(make.seen(make.resource(held.status)), make.NOW)
    assert "Job x-1" in made(told)
    goes_on = decide(
        make.seen(make.resource(LIVE, restored="nightly"), [make.attempt()], [make.running_pod()]), make.NOW
    )
    assert goes_on.status.phase == "Running"
    finished = decide(make.seen(make.resource(FINISHED, restored="nightly")), make.NOW)
    assert (finished.status.phase, finished.actions) == ("Succeeded", ())


@pytest.mark.parametrize(("algorithm", "score"), [("grpo", "0.5"), ("sft", "1.25"), ("dpo", "0.875")])
def test_the_score_is_what_the_algorithm_is_judged_by(algorithm: str, score: str) -> None:
    metrics = {"reward": 0.5, "loss": 1.25, "preference_accuracy": 0.875}
    rows = {"sft": [{"prompt": "a", "completion": "b"}], "dpo": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}
    changes = {"dataset": {"inline": rows[algorithm]}, "reward": ...} if algorithm in rows else {}
    job = make.resource(make.status(make.record(), phase="Running"), algorithm=algorithm, **changes)
    progress = Progress(step=1, total_steps=9, metrics=metrics)
    shown = decide(make.seen(job, [make.attempt()], [make.running_pod()], progress), make.NOW)
    assert shown.status.score == score
    last = TerminationMessage(kind="result", total_steps=9, metrics=metrics)
    ended = make.seen(job, [make.attempt()], [make.ended_pod(0, termination=last)])
    assert decide(ended, make.NOW).status.score == score
