"""Why an attempt ended: from exit codes, what the cluster did to the pods, or the Job's own condition."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rl.job.status import Cause, TerminationMessage
from nemo_rl_operator.classify import outcome, verdict
from nemo_rl_operator.observe import PodView
from unit.operator import make

FAILED = make.failed_attempt()


def cause(*pods: PodView, **attempt: Any) -> Cause | None:
    found = outcome(make.attempt(**({"failed": True, "ended": make.at(-9)} | attempt)), pods, max(1, len(pods)), True)
    assert found is not None
    return found.cause


@pytest.mark.parametrize(
    ("pod", "expected", "judged"),
    [
        (make.ended_pod(40), Cause.USER_ERROR, "fatal"),
        (make.ended_pod(41), Cause.BAD_DATA, "fatal"),
        (make.ended_pod(42), Cause.NON_FINITE, "fatal"),
        (make.ended_pod(75, deleting=True), Cause.PREEMPTED, "free"),
        (make.ended_pod(75), Cause.ERROR, "counted"),
        (make.ended_pod(1), Cause.ERROR, "counted"),
        (make.ended_pod(139), Cause.ERROR, "counted"),
        (make.ended_pod(137, end_reason="OOMKilled"), Cause.OUT_OF_MEMORY, "counted"),
        (make.ended_pod(143, disruption="PreemptionByScheduler: preempted"), Cause.DISRUPTED, "free"),
        (make.ended_pod(137, disruption="DeletionByTaintManager: node is gone"), Cause.DISRUPTED, "free"),
        (
            make.ended_pod(137, exit_code=None, reason="Evicted", message="low on resource: memory"),
            Cause.DISRUPTED,
            "free",
        ),
        (
            make.ended_pod(
                137,
                exit_code=None,
                reason="Evicted",
                message="Pod ephemeral local storage usage exceeds the total limit",
            ),
            Cause.STORAGE_EXCEEDED,
            "counted",
        ),
        (make.ended_pod(143, reason="Terminated", message="shut down"), Cause.DISRUPTED, "free"),
        (make.ended_pod(1, exit_code=None, reason="NodeLost"), Cause.DISRUPTED, "free"),
        (
            make.ended_pod(1, exit_code=None, reason="UnexpectedAdmissionError", message="no gpu"),
            Cause.NODE_REJECTED,
            "free",
        ),
        (make.ended_pod(128, end_reason="StartError"), Cause.START_FAILED, "counted"),
        (make.ended_pod(137, end_reason="ContainerStatusUnknown"), Cause.DISRUPTED, "free"),
        (make.ended_pod(143, deleting=True), Cause.DISRUPTED, "free"),
        (make.ended_pod(1, exit_code=None), Cause.UNKNOWN, "counted"),
        (make.ended_pod(0, termination=None), Cause.NO_RESULT, "counted"),
    ],
    ids=str,
)
def test_one_pod(pod: PodView, expected: Cause, judged: str) -> None:
    assert cause(pod) is expected
    assert verdict(expected) == judged


LOW = "The node was low on resource: {0}. Threshold quantity: 100Mi, available: 52Mi. {1}"
USED = "Container {0} was using 61234Mi, request is {2}, has larger consumption of {1}. "
OVER = [  # texts of the kubelet's eviction manager
    (LOW.format("memory", USED.format("trainer", "memory", 0)), Cause.OUT_OF_MEMORY, "spec.resources.memory"),
    (LOW.format("memory", USED.format("trainer", "memory", "1Gi")), Cause.OUT_OF_MEMORY, "asks for 1Gi"),
    (
        LOW.format("ephemeral-storage", USED.format("trainer", "ephemeral-storage", 0)),
        Cause.STORAGE_EXCEEDED,
        "spec.resources.ephemeralStorage",
    ),
    (
        LOW.format("memory", USED.format("mesh", "memory", 0) + USED.format("trainer", "memory", 0)),
        Cause.OUT_OF_MEMORY,
        "used 61234Mi",
    ),
    ('Container trainer exceeded its local ephemeral storage limit "1Gi". ', Cause.STORAGE_EXCEEDED, "write less"),
    ('Usage of EmptyDir volume "cache" exceeds the limit "1Gi". ', Cause.STORAGE_EXCEEDED, "write less"),
    (LOW.format("memory", USED.format("mesh", "memory", 0)), Cause.DISRUPTED, "mesh was using"),
    (LOW.format("memory", ""), Cause.DISRUPTED, "low on resource"),
]


@pytest.mark.parametrize(("message", "expected", "words"), OVER)
@pytest.mark.parametrize("told", ["by the pod", "by the condition alone"])
def test_an_eviction_for_what_the_trainer_itself_used_counts(
    message: str, expected: Cause, words: str, told: str
) -> None:
    condition = f"TerminationByKubelet: {message}"
    said = {"reason": "Evicted", "message": message} if told == "by the pod" else {}
    found = outcome(FAILED, (make.ended_pod(137, exit_code=None, disruption=condition, **said),), 1, True)
    assert found is not None
    assert found.cause is expected
    assert words in found.message
    assert verdict(expected) == ("free" if expected is Cause.DISRUPTED else "counted")


@pytest.mark.parametrize(
    ("code", "pod", "expected"),
    [
        (1, {}, Cause.ERROR),  # nobody asked it to stop
        (1, {"deleting": True}, Cause.PREEMPTED),  # torchrun ends with 1 whatever its processes ended with
        (137, {"end_reason": "OOMKilled"}, Cause.OUT_OF_MEMORY),
        (139, {}, Cause.ERROR),
    ],
)
def test_a_word_that_claims_a_saved_checkpoint_does_not_make_a_crash_free(
    code: int, pod: dict[str, Any], expected: Cause
) -> None:
    claim = TerminationMessage(kind="failure", exit_code=75, message="saved")
    found = outcome(FAILED, (make.ended_pod(code, termination=claim, **pod),), 1, True)
    assert found is not None
    assert found.cause is expected
    if code != 1:
        assert found.exit_code == code


def test_one_pod_that_is_asked_to_stop_lets_all_save() -> None:
    asked = make.ended_pod(75, index=1, deleting=True)
    assert cause(make.ended_pod(75), asked) is Cause.PREEMPTED
    drained = make.ended_pod(75, index=1, disruption="EvictionByEvictionAPI: drained")
    assert cause(make.ended_pod(75), drained) is Cause.DISRUPTED


def test_an_init_container_of_others_is_named_as_the_cause() -> None:
    pod = make.ended_pod(1, exit_code=None, init_failure="vault-agent exited with 137 (OOMKilled)")
    found = outcome(FAILED, (pod,), 1, True)
    assert found is not None
    assert found.cause is Cause.START_FAILED
    assert found.message == "the trainer could not start, for init container vault-agent exited with 137 (OOMKilled)"


def test_the_code_that_the_trainer_chose_survives_torchrun() -> None:
    termination = TerminationMessage(kind="failure", exit_code=40, message="reward raised")
    found = outcome(FAILED, (make.ended_pod(1, termination=termination),), 1, True)
    assert found is not None
    assert (found.cause, found.exit_code, found.message) == (Cause.USER_ERROR, 40, "reward raised")


def test_a_drained_node_is_the_cause_not_the_peers_that_lost_it() -> None:
    drained = make.ended_pod(143, index=1, ended=make.at(-10), disruption="EvictionByEvictionAPI: drained")
    assert cause(make.ended_pod(1, ended=make.at(-15)), drained) is Cause.DISRUPTED


def test_a_user_error_beats_everything() -> None:
    peer = make.ended_pod(143, index=1, disruption="EvictionByEvictionAPI: drained")
    assert cause(make.ended_pod(40), peer) is Cause.USER_ERROR


def test_a_pod_that_was_asked_to_stop_after_another_failed_is_not_the_cause() -> None:
    peer = make.ended_pod(75, index=1, ended=make.at(-5), deleting=True)
    assert cause(make.ended_pod(1, ended=make.at(-10)), peer) is Cause.ERROR


def test_a_pod_that_was_deleted_first_is_the_cause() -> None:
    peer = make.ended_pod(1, index=1, ended=make.at(-5))
    assert cause(make.ended_pod(75, ended=make.at(-10), deleting=True), peer) is Cause.PREEMPTED


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Container trainer for pod ns/x-1-0 failed with exit code 40 matching FailJob rule at index 0",
            Cause.USER_ERROR,
        ),
        ("Pod ns/x-1-0 has condition DisruptionTarget matching FailJob rule at index 1", Cause.DISRUPTED),
        ("Job was active longer than specified deadline", Cause.UNKNOWN),
    ],
)
def test_without_pods_the_job_tells_what_it_knows(message: str, expected: Cause) -> None:
    assert cause(message=message) is expected


def test_pods_that_are_gone_without_a_rule_that_matched_were_deleted() -> None:
    found = cause(reason="BackoffLimitExceeded", message="Job has reached the specified backoff limit")
    assert found is Cause.DISRUPTED
    assert verdict(found) == "free"


def test_a_disrupted_pod_that_is_gone_is_the_cause_not_the_peer_that_lost_it() -> None:
    message = "Pod ns/x-1-0 has condition DisruptionTarget matching FailJob rule at index 1"
    assert cause(make.ended_pod(1, index=1), message=message) is Cause.DISRUPTED
    assert cause(make.ended_pod(40, index=1), message=message) is Cause.USER_ERROR


def test_news_about_pods_are_waited_for_before_the_job_is_asked() -> None:
    assert outcome(FAILED, (), 1, False) is None
    assert outcome(FAILED, (), 1, True) is not None
    stale = (make.running_pod(), make.ended_pod(1, index=1))
    assert outcome(FAILED, stale, 2, False) is None
    assert outcome(FAILED, stale, 2, True) is not None


def test_several_pods_are_judged_when_all_have_ended() -> None:
    pods = (make.ended_pod(1), make.running_pod(index=1))
    assert outcome(make.attempt(), pods, 2, True) is None
    assert outcome(FAILED, pods, 2, True) is not None


def test_pods_stopped_on_purpose_are_no_failure() -> None:
    assert outcome(make.attempt(deleting=True), (make.ended_pod(75),), 1, True) is None
    assert outcome(make.attempt(suspended=True), (make.ended_pod(75),), 1, True) is None


def test_a_single_pod_that_was_deleted_waits_for_the_jobs_word() -> None:
    pods = (make.ended_pod(75, deleting=True),)
    assert outcome(make.attempt(), pods, 1, True) is None
    assert outcome(FAILED, pods, 1, True) is not None


def test_a_pod_from_before_the_job_was_suspended_does_not_count() -> None:
    old = make.ended_pod(75, created=make.at(-100), name="old", deleting=True)
    assert outcome(make.attempt(), (old, make.running_pod()), 1, True) is None
    found = outcome(make.attempt(), (old, make.ended_pod(0)), 1, True)
    assert found is not None
    assert found.cause is None


def test_every_cause_has_one_verdict() -> None:
    assert {verdict(found) for found in Cause} == {"fatal", "counted", "free"}
