"""Sends files to a store from a process of its own, with low priority, so that training keeps its interpreter and processors.

A thread would take the interpreter's lock from training after every piece, and keep it where its own core is taken. The process is
told one file a line, answers with its size and digest, and ends with the one that started it. Loads no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from nemo_rl.errors import StorageError
from nemo_rl.storage.errors import Conflict, Damaged, Missing, Unavailable
from nemo_rl.storage.store import Store
from nemo_rl.storage.transfer import FILES_AT_ONCE, File, upload

NICE = 10
"""A tenth of a core that training wants too; all of one that nobody wants, as where training waits for the save."""
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from nemo_rl.storage.sender import serve; serve()"
_PR_SET_PDEATHSIG = 1
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (StorageError, Unavailable, Conflict, Missing, Damaged)
}


class _Ended(Exception):
    """The process is no more."""


class Sender:
    """A process that sends files, started when it is first needed. `close` ends it; else it ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._guard = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Its number while it runs."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Begins to start it, and does not wait until it has. From the main thread: then no death of this process outlives it."""
        with self._guard:
            if sys.executable:
                self._started()

    def upload(
        self, store: Store, files: Iterable[tuple[str, Path]], stop: Callable[[], None] = lambda: None
    ) -> list[File]:
        """As `transfer.upload`. A process that died (of memory that ran out, say) is started once more."""
        given = list(files)
        if not sys.executable:  # an interpreter within another program
            return upload(store, given, stop)
        with self._guard:
            try:
                return self._upload(store, given, stop)
            except BaseException:
                self._end()  # nobody waits for the answers that may still come
                raise

    def close(self) -> None:
        with self._guard:
            self._end()

    def _upload(self, store: Store, given: list[tuple[str, Path]], stop: Callable[[], None]) -> list[File]:
        left, under_way, found = deque(given), dict[str, Path](), dict[str, File]()
        deaths, failure = 0, None
        while under_way or (left and failure is None):
            try:
                process = self._started()
                while left and failure is None and len(under_way) < FILES_AT_ONCE:
                    stop()
                    name, path = left.popleft()
                    under_way[name] = path
                    request = {"uri": store.uri, "patience": store.patience, "name": name, "path": os.fspath(path)}
                    _tell(process, request)
                answer = _answer(process)
            except _Ended:
                deaths += 1
                self._end()
                if deaths > 1:
                    raise Unavailable(
                        f"cannot write to {store.uri}: the process that sends files ended twice"
                    ) from None
                left.extendleft(under_way.items())
                under_way.clear()
                continue
            del under_way[answer["name"]]
            if "error" in answer:
                failure = failure or _KINDS.get(answer["error"], OSError)(answer["words"])
            else:
                found[answer["name"]] = File(answer["name"], answer["size"], answer["sha256"])
        if failure is not None:
            raise failure
        return [found[name] for name, _ in given]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # As this one finds its modules. Not of its session: what stops training must not stop the last save.
            bound = threading.current_thread() is threading.main_thread()
            command = [
                sys.executable,
                "-c",
                _START,
                json.dumps([place for place in sys.path if place]),
                str(int(bound)),
            ]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


def _tell(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except OSError:
        raise _Ended from None


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise _Ended
    answer: dict[str, Any] = json.loads(line)
    return answer


# --- the process ------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answers requests from stdin until there are no more, and then ends at once."""
    parent, requests = os.getppid(), sys.stdin.buffer
    if sys.argv[2] == "1":
        _die_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    open_store = functools.lru_cache(maxsize=2)(Store)
    told = threading.Lock()
    pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="nemo-rl-send")
    os.nice(NICE)
    for line in requests:
        pool.submit(_serve, json.loads(line), open_store, answers, told)
    os._exit(0)


def _serve(request: dict[str, Any], open_store: Callable[..., Store], answers: IO[bytes], told: threading.Lock) -> None:
    answer: dict[str, Any] = {"name": request["name"]}
    try:
        (sent,) = upload(open_store(request["uri"], request["patience"]), [(request["name"], Path(request["path"]))])
        answer |= {"size": sent.size, "sha256": sent.sha256}
    except BaseException as error:
        answer |= {"error": type(error).__name__, "words": str(error) or type(error).__name__}
    with told:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _die_with_parent() -> None:
    """Asks the kernel to kill this process when the thread that started it ends, before any other could notice."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with(parent: int) -> None:
    """Should others hold the pipe open: processes that were forked from the one that is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)
