"""The two places where rewards run: a process that can be ended at any time, or a thread that can only be left behind."""

from __future__ import annotations

import codecs
import json
import linecache
import marshal
import os
import pickle
import queue
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from nemo_rl.environments.execute import Executor, Message, Request
from nemo_rl.environments.signature import BoundReward
from nemo_rl.environments.worker import LENGTH

_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from nemo_rl.environments.worker import main
main(*map(int, sys.argv[2:]))
"""
_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')
_READ_BYTES = 1 << 16
_SEND_SECONDS = 60.0
_WHERE_SECONDS = 0.2
_OUTPUT_SECONDS = 1.0


class Gone(Exception):
    """The lane ended by itself. The text says how, as far as it is known."""


class Lane(Protocol):
    """What the runner needs of a place where rewards run. Used by one thread; `kill` may be called from any."""

    def send(self, request: Request) -> None:
        """Hands a request over. Gone if nobody takes it."""

    def ended(self) -> bool:
        """Whether it ended by itself."""

    def receive(self, seconds: float) -> Message | None:
        """The next message; None if there is none within that time. Gone if none can come any more."""

    def where(self) -> str:
        """The line of user code that it is at, or an empty string."""

    def stop(self, seconds: float) -> None:
        """Lets it tear down and end, for at most that time."""

    def kill(self) -> None:
        """Ends it now, or leaves it behind."""


class ProcessLane:
    """A worker process with its own session, so that signals of the terminal do not reach it.

    What it prints appears on this process's sys.stdout and sys.stderr. It dies with the thread that made it.
    """

    def __init__(self, payload: bytes) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self._where = _scratch_file()
        files = (requests, replies, self._where.fileno())
        arguments = [json.dumps(sys.path), str(os.getpid()), *map(str, files)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-X", "faulthandler", "-c", _START, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=files,
            start_new_session=True,
            # A reward that walks over a set must score the same in a resumed run.
            env={"PYTHONHASHSEED": "0", **os.environ},
        )
        os.close(requests)
        os.close(replies)
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self._output = threading.Thread(target=_forward, args=(self._process,), daemon=True, name="reward-output")
        self._output.start()
        self._buffer = bytearray()
        self._messages: deque[Message] = deque()
        self._readable = selectors.DefaultSelector()
        self._readable.register(self._replies, selectors.EVENT_READ)
        self._payload: bytes | None = payload
        self._closed = False
        self._lock = threading.Lock()

    def send(self, request: Request) -> None:
        self._write(pickled(request), _SEND_SECONDS)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def load(self, seconds: float) -> None:
        """Sends the rewards; the answer is ("ready",), ("failed", ...) or ("unpackable", ...)."""
        assert self._payload is not None
        self._write(self._payload, seconds)
        self._payload = None

    def _write(self, data: bytes, seconds: float) -> None:
        view = memoryview(LENGTH.pack(len(data)) + data)
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as writable:
            writable.register(self._requests, selectors.EVENT_WRITE)
            while view:
                left = deadline - time.monotonic()
                if left <= 0 or not writable.select(left):
                    raise Gone(f"took no request for {seconds:g} s")
                try:
                    view = view[os.write(self._requests, view) :]
                except BlockingIOError:
                    continue
                except OSError:
                    raise Gone(self._how_it_ended()) from None

    def receive(self, seconds: float) -> Message | None:
        if self._messages:
            return self._messages.popleft()
        deadline = time.monotonic() + seconds
        while not self._messages:
            # Also after the deadline one look is taken: what has arrived counts, however late this thread wakes up.
            if not self._readable.select(max(0.0, deadline - time.monotonic())):
                return None
            data = os.read(self._replies, _READ_BYTES)
            if not data:
                raise Gone(self._how_it_ended())
            self._buffer += data
            self._split()
        return self._messages.popleft()

    def _split(self) -> None:
        start = 0
        while len(self._buffer) - start >= LENGTH.size:
            size = LENGTH.unpack_from(self._buffer, start)[0]
            end = start + LENGTH.size + size
            if len(self._buffer) < end:
                break
            self._messages.append(marshal.loads(self._buffer[start + LENGTH.size : end]))
            start = end
        del self._buffer[:start]

    def where(self) -> str:
        self._process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _WHERE_SECONDS
        size = -1
        while time.monotonic() < deadline:
            time.sleep(0.02)
            last, size = size, os.fstat(self._where.fileno()).st_size
            if size > 0 and size == last:
                break
        self._where.seek(0)
        return _innermost_user_frame(self._where.read().decode(errors="replace"))

    def stop(self, seconds: float) -> None:
        os.close(self._requests)
        self._requests = -1
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"nemo-rl: the teardown of the rewards took more than {seconds:g} s; it was ended", file=sys.stderr)
        self._release()

    def kill(self) -> None:
        with self._lock:
            if not self._closed:
                self._kill_group()

    def close(self) -> None:
        """Ends it and waits for it: afterwards no process, file or thread of it is left."""
        self._release()

    def _kill_group(self) -> None:
        # The whole session: also what the reward itself started and waits for. Before wait(), so that the number is ours.
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()

    def _release(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._kill_group()
            self._closed = True
        self._process.wait()
        self._output.join(_OUTPUT_SECONDS)
        self._readable.close()
        os.close(self._replies)
        if self._requests >= 0:
            os.close(self._requests)
        self._where.close()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "the worker process closed its pipe"
        if code >= 0:
            return f"the worker process ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}"


class ThreadLane:
    """A daemon thread of this process. A call that hangs cannot be ended: the thread is left behind."""

    def __init__(self, rewards: Sequence[BoundReward], *, setup: bool) -> None:
        """With `setup` the environments are set up first, as they are only once in a process."""
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(rewards, setup), daemon=True, name="rewards")
        self._thread.start()

    def _serve(self, rewards: Sequence[BoundReward], setup: bool) -> None:
        executor = Executor(rewards, self._replies.put, shared=True)
        if setup:
            if not executor.setup():
                return
        else:
            self._replies.put(("ready",))
        while (request := self._requests.get()) is not None:
            executor.run(request)
        executor.teardown()

    def send(self, request: Request) -> None:
        self._requests.put(request)

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def receive(self, seconds: float) -> Message | None:
        try:
            message = self._replies.get(timeout=max(seconds, 0.001))
        except queue.Empty:
            return None
        if message == _LEFT:
            raise Gone("the run ended")
        return message

    def where(self) -> str:
        frame: Any = sys._current_frames().get(self._thread.ident or 0)
        lines = []
        while frame is not None:
            lines.append(f'File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
            frame = frame.f_back
        return _innermost_user_frame("\n".join(lines))

    def stop(self, seconds: float) -> None:
        self._requests.put(None)
        self._thread.join(seconds)

    def kill(self) -> None:
        self._requests.put(None)
        self._replies.put(_LEFT)

    def close(self) -> None:
        """Leaves the thread behind."""
        self.kill()


_LEFT: Message = ("left",)


def _scratch_file() -> Any:
    """A file without a name; in memory where the system can, since a pod's disk may be read-only."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("nemo-rl-reward"), "w+b")
    return tempfile.TemporaryFile()


def pickled(request: Request) -> bytes:
    """Bytes of a request; columns may hold what only cloudpickle packs."""
    try:
        return pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
    except Exception:
        import cloudpickle

        try:
            data: bytes = cloudpickle.dumps(request)
        except Exception as error:
            raise TypeError(
                f"a column that the reward reads cannot be sent to its process: {error}; leave it out of the parameters, or "
                f"decorate the reward with @nemo_rl.reward_function(in_process=True)"
            ) from error
        return data


def _forward(process: subprocess.Popen[bytes]) -> None:
    """Copies what a worker prints to whatever sys.stdout and sys.stderr are at that moment (a notebook replaces them)."""
    decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}
    with selectors.DefaultSelector() as selector:
        for name in decoders:
            selector.register(getattr(process, name), selectors.EVENT_READ, name)
        while selector.get_map():
            for key, _ in selector.select():
                data = os.read(key.fd, _READ_BYTES)
                text = decoders[key.data].decode(data, final=not data)
                try:
                    stream = getattr(sys, key.data)
                    stream.write(text)
                    stream.flush()
                except Exception:  # a stream that was closed must not stop the reward's prints from being read
                    pass
                if not data:
                    selector.unregister(key.fileobj)
    for name in decoders:
        getattr(process, name).close()


def _innermost_user_frame(text: str) -> str:
    """From frames, innermost first, the place in user code: the innermost file that is not installed, else the innermost."""
    frames = []
    for path, line, function in _FRAME.findall(text):
        if path.startswith(os.path.dirname(__file__)):
            break
        frames.append((path, int(line), function))
    if not frames:
        return ""
    # faulthandler cannot show sources; of the standard library the caller is more telling (time.sleep, subprocess, re)
    installed = os.path.dirname(os.__file__)
    path, line, function = next((f for f in frames if not f[0].startswith((installed, "<frozen"))), frames[0])
    source = linecache.getline(path, line).strip()
    return f'File "{path}", line {line}, in {function}' + (f": {source}" if source else "")
