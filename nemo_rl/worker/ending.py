"""How an attempt ends: the exit code that an error means, and the last word that the operator reads from the pod."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import nemo_rl
from nemo_rl.errors import (
    DatasetError,
    NonFiniteTraining,
    RewardError,
    RolloutLost,
    StorageError,
    TrainingInterrupted,
    WeightSyncMismatch,
)
from nemo_rl.job.names import ExitCode
from nemo_rl.job.status import TRACEBACK_LINES, Cause, Checkpoint, TerminationMessage, stacks_together
from nemo_rl.storage.errors import Conflict, Unavailable
from nemo_rl.worker.bundles import BundleError

OTHER = 1
"""Exit code of every error that a retry may cure."""
FOLLOWED = "RankFailed"
"""The cause of a rank that ended because another one had (nemo_rl.run.ranks.RankFailed, which loads torch)."""
_USER_CODE = "in the job's own code: "
_CALLBACK = "in callback "
_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "Unable to allocate", "CUDA out of memory", "std::bad_alloc")
_DISK = "No space left on device"
_NETWORK = ("httpx", "httpcore", "requests.", "urllib3.", "aiohttp.", "socket", "ssl")
"""What the names of modules begin with whose errors mean that another machine was not reached (httpx2 is one)."""


# --- what an error means


@contextlib.contextmanager
def user_code(doing: str) -> Iterator[None]:
    """What is raised within is an error of the job's own code, whatever its type."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{_USER_CODE}{doing}")
        raise


def meaning(error: BaseException) -> tuple[int, str]:
    """(exit code, cause) of the error that ended a run.

    What a retry may cure, such as a hub that was not reached, a full disk or memory, exits with 1 and is counted.
    """
    if isinstance(error, TrainingInterrupted | KeyboardInterrupt):
        return ExitCode.PREEMPTED, Cause.PREEMPTED
    if type(error).__name__ == FOLLOWED:  # whatever it was in the midst of
        return OTHER, FOLLOWED
    if _is_memory(error):
        return OTHER, Cause.OUT_OF_MEMORY
    if _is_disk(error):
        return OTHER, Cause.STORAGE_EXCEEDED
    if not isinstance(error, RewardError) and _is_network(error):
        return OTHER, type(error).__name__
    if isinstance(error, StorageError) and not isinstance(error, Unavailable | Conflict):
        return ExitCode.USER_ERROR, Cause.USER_ERROR  # its address, its credentials or their rights
    if isinstance(error, DatasetError):
        return ExitCode.BAD_DATA, Cause.BAD_DATA
    if isinstance(error, NonFiniteTraining):
        return ExitCode.NON_FINITE, Cause.NON_FINITE
    if isinstance(error, WeightSyncMismatch):
        return ExitCode.USER_ERROR, Cause.WEIGHT_SYNC_MISMATCH
    if isinstance(error, RolloutLost):
        return OTHER, Cause.ROLLOUT_LOST
    if isinstance(error, RewardError | BundleError | TypeError | ValueError | ImportError) or _is_users(error):
        return ExitCode.USER_ERROR, Cause.USER_ERROR
    return OTHER, type(error).__name__


def _is_users(error: BaseException) -> bool:
    """Raised by the job's own code; an OSError there may be a server that was away for a moment."""
    noted = any(note.startswith((_USER_CODE, _CALLBACK)) for note in getattr(error, "__notes__", ()))
    return noted and isinstance(error, Exception) and not isinstance(error, OSError)


def _is_memory(error: BaseException) -> bool:
    """Python's, torch's on a GPU (a RuntimeError by its class name, so that torch need not be there), and on the CPU."""
    named = any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__)
    return isinstance(error, MemoryError) or named or (isinstance(error, RuntimeError) and _mentions(error, _MEMORY))


def _is_disk(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _mentions(error, (_DISK,))


def _is_network(error: BaseException) -> bool:
    """Whether another machine was not reached, or was in trouble, somewhere in the chain of causes.

    A server's clear answer (4xx) is no such thing, and neither is a hub that was switched off by HF_HUB_OFFLINE.
    """
    for part in _chain(error):
        status = getattr(getattr(part, "response", None), "status_code", None)
        if isinstance(status, int):
            return status == 429 or status >= 500
        if type(part).__name__ == "OfflineModeIsEnabled":
            return False
        if isinstance(part, ConnectionError | TimeoutError) or type(part).__module__.startswith(_NETWORK):
            return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or (None if here.__suppress_context__ else here.__context__)


def _mentions(error: BaseException, phrases: tuple[str, ...]) -> bool:
    text = str(error)
    return any(phrase in text for phrase in phrases)


# --- the last word


def failure(error: BaseException, *, step: int, checkpoint: Checkpoint | None) -> TerminationMessage:
    """The word of a run that `error` ended after `step` steps."""
    code, cause = meaning(error)
    if code == ExitCode.PREEMPTED:
        return stopped(_sentence(error), step=step, checkpoint=checkpoint)
    return TerminationMessage(
        kind="failure",
        total_steps=step,
        checkpoint=checkpoint,
        exit_code=code,
        cause=cause,
        message=_sentence(error) + _cure(cause),
        traceback=traceback_of(error) if cause != FOLLOWED else None,
    )


def stopped(message: str, *, step: int, checkpoint: Checkpoint | None) -> TerminationMessage:
    """The word of a run that was asked to stop and goes on in the next attempt."""
    return TerminationMessage(
        kind="failure",
        total_steps=step,
        checkpoint=checkpoint,
        exit_code=ExitCode.PREEMPTED,
        cause=Cause.PREEMPTED,
        message=message,
    )


def stalled(message: str, where: str, stack: str, *, step: int, checkpoint: Checkpoint | None) -> TerminationMessage:
    """The word of a process that got nowhere, with the stack of its main thread; `where` is the process."""
    return TerminationMessage(
        kind="failure",
        total_steps=step,
        checkpoint=checkpoint,
        exit_code=OTHER,
        cause=Cause.STALLED,
        message=message,
        traceback=stacks_together(f"{where}:\n{stack}"),
    )


def write(word: TerminationMessage, path: Path) -> None:
    """Leaves the word in the termination log. A word that is there already stays: the first failure is the cause.

    Only a rank that merely followed another one's end gives way to the one that knows the cause.
    """
    _update(path, lambda there: word if there is None or there.cause == FOLLOWED else None)


def write_stalled(word: TerminationMessage, path: Path) -> None:
    """Leaves the word of a process that got nowhere; the stacks of several processes of the pod stand in one word."""

    def merged(there: TerminationMessage | None) -> TerminationMessage | None:
        if there is None or there.cause == FOLLOWED:
            return word
        if there.cause != Cause.STALLED:
            return None
        return there.model_copy(update={"traceback": stacks_together(there.traceback or "", word.traceback or "")})

    _update(path, merged)


def _update(path: Path, choose: Callable[[TerminationMessage | None], TerminationMessage | None]) -> None:
    """Replaces the word in the termination log by what `choose` makes of it; None leaves it.

    It is written in place and by one call, for the kubelet's file cannot be replaced; a lock keeps several processes of
    a pod apart. A log that cannot be written is told on stderr only.
    """
    try:
        descriptor = os.open(path, os.O_RDWR if path.exists() else os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            present = os.read(descriptor, 1 << 16).decode(errors="replace")
            word = choose(TerminationMessage.parse(present))  # what users' code may have put there is no word
            if word is not None:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, word.encode().encode(), 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"nemo-rl: cannot write {path}: {error}; the operator will only see the exit code", file=sys.stderr)


def for_the_log(error: BaseException, word: TerminationMessage) -> str:
    """What the pod's log says about the end: all of the traceback where it is not a plain refusal."""
    lines = [f"nemo-rl: {word.message}"]
    if word.exit_code == ExitCode.PREEMPTED or word.cause == FOLLOWED:
        return lines[0]
    if isinstance(error, RewardError) and error.traceback:
        lines.insert(0, error.traceback.rstrip())
    elif not isinstance(error, DatasetError | BundleError | NonFiniteTraining):
        lines.insert(0, "".join(traceback.format_exception(error)).rstrip())
    return "\n".join(lines)


def _sentence(error: BaseException) -> str:
    """The error's text; with its type where the text alone would not be a sentence."""
    text = " ".join(str(error).split())
    if not text or not isinstance(error, DatasetError | NonFiniteTraining | RewardError | BundleError | RuntimeError):
        ours = isinstance(error, ValueError | TypeError | KeyboardInterrupt) and text
        text = text if ours else f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def _cure(cause: str) -> str:
    if cause == Cause.OUT_OF_MEMORY:
        return "; lower training.tokensPerMicrobatch or maxSequenceLength, set activationCheckpointing, or ask for more memory"
    if cause == Cause.STORAGE_EXCEEDED:
        return "; raise output.size, lower training.keepCheckpoints, or free the claim"
    return ""


# --- tracebacks of at most 20 lines

_HEADER = "Traceback (most recent call last):"
_FRAME = re.compile(r'  File "(.*)", line \d+')
_LIBRARIES = ("/site-packages/", "/dist-packages/", f"{os.path.dirname(os.__file__)}/", "<frozen ")
_OURS = os.path.dirname(nemo_rl.__file__) + os.sep
_USER_FRAMES = 3
_LAST_FRAMES = 2


def stack_of(thread: int | None) -> str:
    """Where a thread of this process is now: at most 19 lines, the user's own frames and the innermost ones."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "(no Python frame)"
    text = shortened(f"{_HEADER}\n{''.join(traceback.format_stack(frame))}hangs here")
    return "\n".join(text.splitlines()[1:][-(TRACEBACK_LINES - 1) :])


def traceback_of(error: BaseException) -> str:
    """The traceback in at most 20 lines: the user's own frames with their source lines, and the place that raised."""
    text = error.traceback if isinstance(error, RewardError) and error.traceback else ""
    return shortened(text or "".join(traceback.format_exception(error)))


def shortened(text: str) -> str:
    """A formatted traceback that fits: our frames above the user's first one go, then those of libraries in the middle."""
    sections = text.rstrip().split(_HEADER)
    *frames, last = _frames(sections[-1])
    message = last
    users = [i for i, frame in enumerate(frames) if _is_own(frame)]
    if users:
        frames, users = frames[users[0] :], [i - users[0] for i in users]
    lines = [_HEADER, *(line for frame in frames for line in frame), *message]
    if len(lines) > TRACEBACK_LINES and len(frames) > _LAST_FRAMES:
        kept = {*users[-_USER_FRAMES:], *range(len(frames) - _LAST_FRAMES, len(frames))}
        lines = [_HEADER]
        for i, frame in enumerate(frames):
            if i in kept:
                lines += frame
            elif lines[-1] != "  …":
                lines.append("  …")
        lines += message[: max(1, TRACEBACK_LINES - len(lines))]
    return "\n".join(lines[-TRACEBACK_LINES:])


def _frames(section: str) -> list[list[str]]:
    """The lines of each frame, and at the end those of the message."""
    found: list[list[str]] = []
    message: list[str] = []
    for line in section.strip("\n").splitlines():
        if _FRAME.match(line):
            found.append([line])
        elif found and not message and line.startswith("    "):
            found[-1].append(line)
        else:
            message.append(line)
    return [*found, message]


def _is_own(frame: list[str]) -> bool:
    match = _FRAME.match(frame[0])
    path = match[1] if match else ""
    return not path.startswith(_OURS) and not any(part in path for part in _LIBRARIES)
