"""Tokenising in several processes. Run as a module it is one of them: pickles come in, pickles go out."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, BinaryIO

from nemo_rl.data.encode import Encoded, Encoder

CHUNK = 1024
"""Rows that are tokenised together: enough for the tokenizer's own speed, little beside a data set."""
PARALLEL_ROWS = 20_000
"""Below this number of rows starting processes takes longer than they save."""
_LENGTH = struct.Struct("<Q")


def encode_all(encoder: Encoder, rows: Sequence[Any]) -> Iterator[Encoded]:
    """The rows, chunk after chunk in their order, tokenised here or, where there are many, in one process for each CPU."""
    starts = range(0, len(rows), CHUNK)
    processes = min(_cpus(), len(starts)) if len(rows) >= PARALLEL_ROWS else 1
    pickled = _pickled(encoder) if processes > 1 else None
    if pickled is None:
        yield from (encoder(rows[start : start + CHUNK], start) for start in starts)
        return
    workers = [_Worker(pickled) for _ in range(processes)]
    try:
        yield from _spread(workers, rows, starts)
    finally:
        for worker in workers:
            worker.close()


def _spread(workers: list[_Worker], rows: Sequence[Any], starts: range) -> Iterator[Encoded]:
    """Results in order, with at most two chunks for each worker on their way."""
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def encode(start: int) -> Encoded:
        worker = free.get()
        try:
            return worker.encode(rows[start : start + CHUNK], start)
        finally:
            free.put(worker)

    waiting: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(len(workers)) as threads:
        try:
            for start in starts:
                waiting.append(threads.submit(encode, start))
                if len(waiting) >= 2 * len(workers):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pickled(encoder: Encoder) -> bytes | None:
    """The encoder as a pickle; None for a tokenizer that has none, such as one of code that came with a model."""
    if type(encoder.tokenizer).__module__.startswith("transformers_modules"):
        return None
    try:
        return pickle.dumps(encoder)
    except Exception:  # a tokenizer of the user's own may fail in its own ways, and is used here instead
        return None


class _Worker:
    """A process that tokenises, which does not import the user's script."""

    def __init__(self, pickled: bytes) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nemo_rl.data.pool"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._first: bytes | None = pickled

    def encode(self, rows: Sequence[Any], start: int) -> Encoded:
        try:
            if self._first is not None:
                _send(self._in, self._first)
                self._first = None
            _send(self._in, pickle.dumps((rows, start)))
            answer = _receive(self._out)
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise RuntimeError(
                f"a process that tokenises rows was killed (exit code {self._process.wait()}), mostly for want of memory; "
                "ask for more memory, or give fewer rows at once with max_rows"
            )
        found = pickle.loads(answer)
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Encoded)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # what was not read by a process that is gone
            self._in.close()
        self._out.close()


def _send(stream: BinaryIO, data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> bytes | None:
    head = stream.read(_LENGTH.size)
    return stream.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else None


def _main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    encoder: Encoder | None = None
    while (message := _receive(sys.stdin.buffer)) is not None:
        try:
            if encoder is None:
                encoder = pickle.loads(message)
                continue
            answer: Any = encoder(*pickle.loads(message))
            data = pickle.dumps(answer)
        except Exception as error:
            data = _pickled_error(error)
        _send(answers, data)


def _pickled_error(error: Exception) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:  # an error that does not travel arrives as its text
        return pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))


if __name__ == "__main__":
    _main()
