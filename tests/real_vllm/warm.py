"""vLLM servers that are forks of one process which has imported vLLM: a start costs seconds of CPU time, where three processes of a
server would import it for half a minute.

With vLLM's interpreter, `warm.py SOCKET` is that process. Tests begin it by `Warm`; `warm_starts` has a trainer's servers come from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOCKET_VARIABLE = "NEMO_RL_TEST_WARM_VLLM"
"""Address of the process that forks servers, for trainers that are processes of their own."""
IMPORTED = (
    "vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "vllm.v1.engine.async_llm",
    "vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn",
    "vllm.distributed.weight_transfer.factory", "vllm.model_executor.model_loader.reload",
    "vllm.model_executor.models.qwen2", "vllm.model_executor.models.llama",
)  # fmt: skip


# --- with vLLM's interpreter


def main(address: str) -> None:
    import importlib
    import multiprocessing

    for name in IMPORTED:
        importlib.import_module(name)
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork")  # type: ignore[assignment]
    _keep_ports_from_forks()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    waiting: dict[int, socket.socket] = {}
    """Who waits for a process, until it closes its end."""
    alone: set[int] = set()
    told: set[int] = set()
    while True:
        ready, _, _ = select.select([listener, sys.stdin, *waiting.values()], [], [], 0.05)
        if sys.stdin in ready:
            return
        if listener in ready:
            connection, _ = listener.accept()
            pid = _fork(connection, [listener, *waiting.values()])
            waiting[pid] = connection
        for pid, connection in list(waiting.items()):
            if connection in ready:
                connection.close()
                del waiting[pid]
                alone.add(pid)
            elif pid not in told and (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
                code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                told.add(pid)
                with contextlib.suppress(OSError):  # it has ended, too
                    connection.send(f"{code}\n".encode())
        # not before, so that its number is not given to another process
        gone = {pid for pid in alone if os.waitpid(pid, os.WNOHANG)[0]}
        alone, told = alone - gone, told - gone


def _keep_ports_from_forks() -> None:
    """A server's engine has none of the sockets that its parent listens on, as where it is started by another exec."""
    bound: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.bind" and arguments[0].family != socket.AF_UNIX:
            bound.add(arguments[0])

    def close() -> None:
        for one in bound:
            one.close()

    sys.addaudithook(watch)
    os.register_at_fork(after_in_child=close)


def _fork(connection: socket.socket, others: list[socket.socket]) -> int:
    raw, given, *_ = socket.recv_fds(connection, 2**20, 2)
    while not raw.endswith(b"\n"):
        raw += connection.recv(2**20)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            for fd, own in zip((0, 1, 2), (given[0], given[1], given[1]), strict=True):
                os.dup2(own, fd)
            for one in (connection, *others):
                one.close()
            for fd in given:
                os.close(fd)
            code = _serve(**json.loads(raw))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for fd in given:
        os.close(fd)
    connection.send(f"{pid}\n".encode())
    return pid


def _serve(arguments: list[str], environment: dict[str, str]) -> int:
    """As `python -m MODULE …` with this environment."""
    import random
    import runpy
    import traceback

    random.seed()
    tempfile.tempdir = None
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.stdin = open(0)  # noqa: SIM115 - the one before was of the process that forks
    assert arguments[0] == "-m"
    sys.argv = arguments[1:]
    try:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    else:
        return 0
    return 1


# --- with the tests' interpreter


class Warm:
    """The process that forks servers. `python`: vLLM's interpreter; `folder`: short, for its address."""

    def __init__(self, python: str, folder: Path) -> None:
        self.address = str(folder / "warm")
        self.process = subprocess.Popen(
            [python, __file__, self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) != "ready\n":
            assert line, "the process that forks vLLM servers has ended"

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


class Fork:
    """What `subprocess.Popen` is for a server: a child of the process that forks them, in a session of its own."""

    def __init__(self, address: str, command: list[str], *, stdout: Any, env: dict[str, str], **_: Any) -> None:
        reader, writer = os.pipe()
        self.args, self.stdin = command, os.fdopen(writer, "wb", 0)
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        asked = json.dumps({"arguments": command[1:], "environment": env}).encode() + b"\n"
        sent = socket.send_fds(self._connection, [asked], [reader, stdout.fileno()])
        self._connection.sendall(asked[sent:])
        os.close(reader)
        self._lines = self._connection.makefile("r")
        self.pid = int(self._lines.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            line = self._lines.readline()
            self.returncode = int(line) if line else -signal.SIGKILL  # what forks servers has ended
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def __del__(self) -> None:
        self._lines.close()
        self._connection.close()


def warm_starts(set_attribute: Callable[[Any, str, Any], None], python: str, address: str) -> None:
    """Has servers that are to run with this interpreter forked instead. `set_attribute`: setattr, or that of a MonkeyPatch."""
    from nemo_rl.rollout.vllm import server

    def begin(command: list[str], **options: Any) -> Any:
        return Fork(address, command, **options) if command[0] == python else subprocess.Popen(command, **options)

    set_attribute(server, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": begin}))


if __name__ == "__main__":
    main(sys.argv[1])
