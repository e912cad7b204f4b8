"""Why an attempt ended, read from its pods, or from its Job where the pods are gone.

The exit code that a trainer chose decides first, then what the cluster says it did to the pod. What containers of
others do in the pod decides nothing. Of several failed pods the root cause is wanted: when one node is drained, the
others of a job merely lose their connection to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from nemo_rl.job.names import TRAINER_CONTAINER, ExitCode
from nemo_rl.job.status import Cause, TerminationMessage, stacks_together
from nemo_rl_operator.observe import AttemptView, PodView, newest

Verdict = Literal["fatal", "counted", "free"]

FATAL = frozenset(
    {
        *(Cause.USER_ERROR, Cause.BAD_DATA, Cause.NON_FINITE, Cause.INVALID_SPEC, Cause.INVALID_IMAGE),
        *(Cause.DEADLINE, Cause.BUNDLES_MISSING, Cause.NAME_CONFLICT, Cause.WEIGHT_SYNC_MISMATCH),
    }
)
FREE = frozenset(
    {
        *(Cause.NODE_REJECTED, Cause.PREEMPTED, Cause.DISRUPTED, Cause.STARTUP_TIMEOUT, Cause.NODE_LOST),
        *(Cause.JOB_DELETED, Cause.SUSPENDED),
    }
)

EXIT_CAUSES = {
    ExitCode.USER_ERROR: Cause.USER_ERROR,
    ExitCode.BAD_DATA: Cause.BAD_DATA,
    ExitCode.NON_FINITE: Cause.NON_FINITE,
    ExitCode.PREEMPTED: Cause.PREEMPTED,
}
LOST_NODE = frozenset({"NodeLost", "NodeShutdown", "Shutdown", "Terminated", "Preempting", "ContainerStatusUnknown"})
"""Reasons of pods that went down with their node, or made room on it."""
NOT_STARTED = frozenset({"ContainerCannotRun", "StartError", "RunContainerError"})
LARGER_USE = re.compile(r"Container (\S+) was using (\S+), request is (\S+), has larger consumption of ([\w.-]+\w)")
"""What the kubelet says of each container that used more than it asked for, on a node that ran low."""
HIGHEST_CODE = 255
"""What the status takes; a node that reports more is not believed."""
TORCHRUN_CODE = 1
"""With this torchrun ends, whatever its processes ended with; the termination message tells what that was."""
FOLLOWED = "RankFailed"
"""What a trainer says that ended because one in another pod had."""
SIGNALS = {6: "SIGABRT", 7: "SIGBUS", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}


def verdict(cause: str) -> Verdict:
    """Whether a cause ends the job (fatal), counts towards backoffLimit (counted), or does neither (free)."""
    return "fatal" if cause in FATAL else "free" if cause in FREE else "counted"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `cause` is None after success."""

    cause: Cause | None
    message: str = ""
    exit_code: int | None = None
    pod: str | None = None
    traceback: str | None = None
    termination: TerminationMessage | None = None
    """The trainer's own last message, where it left one."""


def outcome(
    attempt: AttemptView, pods: tuple[PodView, ...], nodes: int, settled: bool, kept: bool = False
) -> Outcome | None:
    """How the attempt ended, or None while that is not known yet.

    Success is index 0's alone. A failure of a single pod is final at once, unless somebody deleted the pod: Kueue
    may have suspended the Job and resumed it already, and then another pod takes its place. Of several pods, all must
    have ended first, for the first to fail is often not the cause: the Job's Failed condition says so, and the news
    about each of them must be in. `settled` says that the Job ended some seconds ago, so that none can still be on the
    way. `kept` says that the Job will never end by itself: containers of others keep the pods of trainers that failed.
    """
    pods = newest(pods)
    first = next((pod for pod in pods if pod.index == 0), None)
    if first and first.phase == "Succeeded":
        return _success(first)
    if attempt.complete:
        return Outcome(None) if first is None or settled else None
    if attempt.deleting or attempt.suspended:
        return None
    failed = [pod for pod in pods if pod.phase == "Failed"]
    if not attempt.failed:
        alone = nodes == 1 and not any(pod.deleting for pod in failed)
        return pod_failure(tuple(failed), pods) if failed and (alone or kept) else None
    if not settled and not (failed and all(pod.terminal for pod in pods)):
        return None
    asked = _asked_to_stop(pods) or _disrupted(attempt) or len(pods) < nodes
    failures = [_failure(pod, asked) for pod in failed]
    if _disrupted(attempt):
        failures.append(((1, attempt.ended), _from_job(attempt)))
    return _root_cause(failures) if failures else _from_job(attempt)


def pod_failure(failed: tuple[PodView, ...], pods: tuple[PodView, ...]) -> Outcome:
    """The root cause among pods that failed; `pods` are all of the attempt."""
    asked = _asked_to_stop(pods)
    return _root_cause([_failure(pod, asked) for pod in failed])


def _root_cause(failures: list[tuple[tuple[int, str], Outcome]]) -> Outcome:
    """The failure that the others followed from. Of processes that hung, the stacks of all stand in it."""
    found = min(failures, key=lambda failure: failure[0])[1]
    if found.cause is not Cause.STALLED:
        return found
    stalled = [other for _, other in sorted(failures, key=lambda failure: failure[0]) if other.cause is Cause.STALLED]
    return replace(found, traceback=stacks_together(*(other.traceback or "" for other in stalled)) or None)


def _success(pod: PodView) -> Outcome:
    termination = TerminationMessage.parse(pod.termination)
    if termination and termination.kind == "result":
        return Outcome(None, pod=pod.name, exit_code=0, termination=termination)
    return Outcome(
        Cause.NO_RESULT,
        "the trainer exited with 0 but left no result; is spec.image a nemo-rl trainer image?",
        exit_code=pod.exit_code,
        pod=pod.name,
    )


def _asked_to_stop(pods: tuple[PodView, ...]) -> bool:
    """Whether somebody asked one of the pods to stop. The ranks tell each other, so then all of them may save and end."""
    return any(
        pod.deleting or pod.disruption or pod.reason == "Evicted" or {pod.reason, pod.end_reason} & LOST_NODE
        for pod in pods
    )


def _failure(pod: PodView, asked: bool) -> tuple[tuple[int, str], Outcome]:
    """The failure of a pod, with its rank as a root cause: lower ranks first, then what ended earlier."""
    termination = TerminationMessage.parse(pod.termination)
    code = pod.exit_code
    claimed = termination.exit_code if termination and termination.kind == "failure" else None
    if claimed is not None and code in (TORCHRUN_CODE, None):
        code = claimed
    cause, rank, message = _cause(pod, code, asked)
    if termination and termination.message and rank in (0, 3, 4):
        message = termination.message
    if termination and cause is Cause.ERROR and termination.cause == Cause.STALLED:
        cause, rank = Cause.STALLED, 2
    elif termination and cause is Cause.ERROR and termination.cause == Cause.ROLLOUT_LOST:
        cause = Cause.ROLLOUT_LOST
    elif termination and cause is Cause.USER_ERROR and termination.cause == Cause.WEIGHT_SYNC_MISMATCH:
        cause = Cause.WEIGHT_SYNC_MISMATCH
    elif termination and termination.cause == FOLLOWED and rank == 4:
        rank = 5
    found = Outcome(
        cause,
        message,
        exit_code=code if code is not None and abs(code) <= HIGHEST_CODE else None,
        pod=pod.name,
        traceback=termination.traceback if termination else None,
        termination=termination,
    )
    return (rank, pod.ended or "~"), found


def _cause(pod: PodView, code: int | None, asked: bool) -> tuple[Cause, int, str]:
    known = EXIT_CAUSES.get(ExitCode(code)) if code in set(ExitCode) else None
    if known and known in FATAL:
        return known, 0, f"the trainer exited with {code} ({known})"
    text = pod.disruption or (f"{pod.reason}: {pod.message}" if pod.reason else "")
    if pod.disruption or pod.reason == "Evicted" or pod.reason in LOST_NODE:
        if own := _own_fault(pod.message or pod.disruption):
            return own[0], 2, own[1]
        return Cause.DISRUPTED, 1, f"the pod was disrupted ({text.strip(': ')})"
    if pod.end_reason in LOST_NODE:
        return Cause.DISRUPTED, 1, "the node lost the container"
    if pod.end_reason == "OOMKilled":
        return (
            Cause.OUT_OF_MEMORY,
            2,
            "the trainer ran out of memory; raise spec.resources.memory, which may change while the job is suspended",
        )
    if pod.end_reason in NOT_STARTED:
        return Cause.START_FAILED, 2, f"the container could not start: {pod.termination or pod.end_reason}"
    if code is None and pod.reason:
        return Cause.NODE_REJECTED, 2, f"the node refused the pod: {text}"
    if code is None and pod.init_failure:
        return Cause.START_FAILED, 2, f"the trainer could not start, for init container {pod.init_failure}"
    if known is Cause.PREEMPTED and asked:
        return known, 4 if pod.deleting else 3, "the trainer was asked to stop and saved a checkpoint"
    if pod.deleting:
        return Cause.DISRUPTED, 4, "the pod was deleted"
    if code is None:
        return Cause.UNKNOWN, 4, "the pod failed without an exit code"
    if known is Cause.PREEMPTED:
        return Cause.ERROR, 4, f"the trainer exited with {code} as if it had been asked to stop, but nobody asked it to"
    signal = SIGNALS.get(code - 128)
    return Cause.ERROR, 4, f"the trainer exited with {code}" + (f" ({signal})" if signal else "")


def _own_fault(message: str) -> tuple[Cause, str] | None:
    """Evictions that would happen again anywhere: the trainer used more than it asked for."""
    for name, used, request, resource in LARGER_USE.findall(message):
        if name != TRAINER_CONTAINER:
            continue
        told = f"evicted: the node ran low on {resource}, and the trainer used {used} of it but asks for {request}"
        if resource == "memory":
            return Cause.OUT_OF_MEMORY, f"{told}; raise spec.resources.memory"
        return Cause.STORAGE_EXCEEDED, f"{told}; raise spec.resources.ephemeralStorage, or write less"
    if "exceeds the" in message or "exceeded its local ephemeral storage" in message:
        return Cause.STORAGE_EXCEEDED, f"evicted: {message}; raise spec.resources.ephemeralStorage, or write less"
    return None


def _disrupted(attempt: AttemptView) -> bool:
    return "DisruptionTarget" in attempt.message


def _from_job(attempt: AttemptView) -> Outcome:
    """The pods are gone; the Job's condition still says which rule of its podFailurePolicy matched.

    Where none did: a Job keeps its pods when it fails, so somebody deleted them, and that is why it failed. (Or they
    failed first and were cleaned up before the operator, which was away, could look. That costs one free attempt.)
    """
    code = re.search(r"exit code (\d+)", attempt.message)
    if code and int(code[1]) in set(ExitCode) and (cause := EXIT_CAUSES.get(ExitCode(int(code[1])))):
        return Outcome(cause, attempt.message, exit_code=int(code[1]))
    if _disrupted(attempt):
        return Outcome(Cause.DISRUPTED, attempt.message)
    if attempt.reason == "BackoffLimitExceeded":
        return Outcome(Cause.DISRUPTED, "its pods were deleted")
    text = attempt.message or attempt.reason or "no reason given"
    return Outcome(Cause.UNKNOWN, f"the Job failed and its pods are gone: {text}")
