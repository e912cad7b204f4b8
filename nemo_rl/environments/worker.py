"""The process that runs rewards: reads requests from one pipe, answers on another, and dies with its parent.

Started with the numbers of three files: requests, replies, and the place where it writes on SIGUSR1 which line it is at.
"""

from __future__ import annotations

import ctypes
import faulthandler
import marshal
import os
import pickle
import signal
import struct
import sys
import threading
import time
from typing import Any

from nemo_rl.environments.execute import Executor, Message, summary, user_traceback
from nemo_rl.environments.pickling import unpack

LENGTH = struct.Struct("<Q")
"""Each message is its length, then its bytes."""
_PR_SET_PDEATHSIG = 1


def main(parent: int, requests: int, replies: int, where: int) -> None:
    """Serves requests until the parent closes the pipe."""
    _die_with(parent)
    # Ctrl-C is for the parent, which saves first. Not SIG_IGN: processes that a reward starts would inherit it.
    signal.signal(signal.SIGINT, lambda *_: None)
    for file in (requests, replies, where):
        os.set_inheritable(file, False)
    faulthandler.register(signal.SIGUSR1, file=where, all_threads=False)

    def emit(message: Message) -> None:
        data = marshal.dumps(message)
        _write(replies, LENGTH.pack(len(data)) + data)

    with os.fdopen(requests, "rb") as stream:
        executor = _load(stream, emit)
        if executor is None:
            return
        while (data := _read(stream)) is not None:
            try:
                request = pickle.loads(data)
            except BaseException as error:
                emit(("failed", summary(error), user_traceback(error)))
                return
            executor.run(request)
    executor.teardown()


def _load(stream: Any, emit: Any) -> Executor | None:
    data = _read(stream)
    if data is None:
        return None
    try:
        rewards = unpack(data)
    except BaseException as error:
        emit(("unpackable", summary(error), user_traceback(error)))
        return None
    executor = Executor(rewards, emit, shared=False)
    return executor if executor.setup() else None


def _read(stream: Any) -> bytes | None:
    """The next message; None at the end of the pipe."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    size = LENGTH.unpack(header)[0]
    data: bytes = stream.read(size)
    return data if len(data) == size else None


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _die_with(parent: int) -> None:
    """Lets the kernel end this process when its parent ends, even while a call hangs; elsewhere a thread watches."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
