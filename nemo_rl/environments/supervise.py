"""Watches over one lane: hands it calls, measures their time, ends it when one hangs, and goes on in a new one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from nemo_rl.environments.execute import DIED, TIMEOUT, Message, Request, WorkerCall
from nemo_rl.environments.lanes import Gone, ProcessLane, ThreadLane
from nemo_rl.environments.signature import BoundReward

LOAD_SECONDS = 1800.0
"""Longest time that imports and Environment.setup may take: a judge model may have to be downloaded."""
TEARDOWN_SECONDS = 10.0
"""Longest time that Environment.teardown of all rewards may take."""
_SLACK_SECONDS = 5.0
_CLOSED = "the reward runner was closed before all rewards were known"
_LOOP_SECONDS = 0.4
"""What an event loop gets beyond the limit of its calls to cancel them itself, before its process is ended."""


@dataclass(frozen=True)
class Score:
    """What a reward gave: the number, and its parts if it named any."""

    value: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """Why a reward gave none. `error` continues a sentence that starts with the reward's name."""

    cause: str
    error: str
    traceback: str = ""


class LoadFailed(Exception):
    """The rewards cannot be loaded or set up at all, which no policy for single calls can mend."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class Receiver(Protocol):
    """Takes the scores of a unit."""

    @property
    def over(self) -> bool: ...
    def put(self, reward: int, index: int, score: Score | Failure) -> None: ...
    def unit_done(self) -> None: ...
    def unit_failed(self, error: BaseException) -> None: ...


@dataclass(frozen=True)
class Unit:
    """Calls of one reward that one lane makes. `reward` is its number in the run, `place` in the lane."""

    receiver: Receiver
    reward: int
    place: int
    calls: list[WorkerCall]
    fail_fast: bool


class Supervisor:
    """A thread that takes units from a queue, which several may share, and has one lane make their calls."""

    def __init__(
        self,
        rewards: Sequence[BoundReward],
        make: Callable[[], ProcessLane] | None,
        units: queue.SimpleQueue[Unit | None],
        timeout_seconds: float,
    ) -> None:
        """`make` starts a worker process; None means that the rewards run in a thread of this one."""
        self._rewards = rewards
        self._make = make
        self._units = units
        self._timeout = timeout_seconds
        self._lane: ProcessLane | ThreadLane | None = None
        self._set_up = False
        self._load_problem: LoadFailed | None = None
        self._stopping = False
        self._busy = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="reward-supervisor")
        self.restarts = 0
        self.metrics: dict[str, dict[str, float]] = {}

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Ends the lane now if it is in the middle of a call; else lets it tear down. Returns at once."""
        with self._lock:
            self._stopping = True
            if self._busy and self._lane is not None:
                self._lane.kill()
        self._units.put(None)

    def join(self) -> None:
        """Waits until the lane is gone."""
        self._thread.join(TEARDOWN_SECONDS + _SLACK_SECONDS)

    # ------------------------------------------------------------------ in the supervisor's own thread

    def _run(self) -> None:
        try:
            with self._working():
                self._lane_or_new()  # the rewards load while the model does
        except LoadFailed as problem:
            self._load_problem = problem  # every unit will say so
        except BaseException as error:  # closed before it began, or no process can be had
            self._load_problem = LoadFailed(f"the rewards could not be started: {error}")
        while (unit := self._units.get()) is not None:
            try:
                with self._working():
                    self._make_calls(unit)
                unit.receiver.unit_done()
            except BaseException as error:
                unit.receiver.unit_failed(error)
        with self._lock:
            lane, self._lane = self._lane, None
        if lane is not None:
            lane.stop(TEARDOWN_SECONDS)

    @contextmanager
    def _working(self) -> Iterator[None]:
        with self._lock:
            if self._stopping:
                raise RuntimeError(_CLOSED)
            self._busy = True
        try:
            yield
        finally:
            with self._lock:
                self._busy = False

    def _make_calls(self, unit: Unit) -> None:
        pending = {call.index: call for call in unit.calls}
        while pending and not unit.receiver.over:
            lane = self._lane_or_new()
            watch = _Watch(self._rewards[unit.place], pending, self._timeout)
            try:
                lane.send(Request(unit.place, list(pending.values()), self._timeout, unit.fail_fast))
                while (message := lane.receive(watch.seconds_left())) is not None:
                    if message[0] == "done":
                        self.metrics[self._rewards[unit.place].name] = message[1]
                        return
                    self._take(unit, message, pending, watch)
                # What was being done is asked before the process ends, and said to whoever has to find the cause.
                failure = Failure(TIMEOUT, lane.where())
            except Gone as gone:
                failure = Failure(DIED, str(gone))
            except LoadFailed:
                self._leave(lane)
                raise
            lane.kill()
            try:
                if self._stopping:
                    raise RuntimeError(_CLOSED)
                for index in watch.to_blame():
                    del pending[index]
                    unit.receiver.put(unit.reward, index, failure)
            finally:
                self._leave(lane)

    def _take(self, unit: Unit, message: Message, pending: dict[int, WorkerCall], watch: _Watch) -> None:
        kind, *rest = message
        if kind == "begin":
            watch.begin()
        elif kind == "start":
            watch.started(rest[0])
        elif kind == "value":
            index, value, parts = rest
            pending.pop(index, None)
            watch.finished(index)
            unit.receiver.put(unit.reward, index, Score(value, parts))
        elif kind == "error":
            index, cause, error, trace = rest
            pending.pop(index, None)
            watch.finished(index)
            unit.receiver.put(unit.reward, index, Failure(cause, error, trace))
        else:
            raise LoadFailed(f"a request could not be read by the worker: {rest[0]}", rest[1])

    def _lane_or_new(self) -> ProcessLane | ThreadLane:
        if self._load_problem is not None:
            raise self._load_problem
        if self._lane is not None and self._lane.ended():  # between two calls, so that none of them is to blame
            self._leave(self._lane)
        if self._lane is None:
            lane: ProcessLane | ThreadLane
            if self._make is None:
                lane = ThreadLane(self._rewards, setup=not self._set_up)
            else:
                lane = self._make()
            with self._lock:
                self._lane = lane
                if self._stopping:
                    lane.kill()
            try:
                self._load(lane)
            except BaseException:
                self._leave(lane)
                raise
        return self._lane

    def _load(self, lane: ProcessLane | ThreadLane) -> None:
        names = ", ".join(repr(reward.name) for reward in self._rewards)
        try:
            if isinstance(lane, ProcessLane):
                lane.load(LOAD_SECONDS)
            message = lane.receive(LOAD_SECONDS)
        except Gone as gone:
            raise LoadFailed(f"the reward {names} could not be loaded: {gone}") from None
        if message is None:
            raise LoadFailed(f"the reward {names} took longer than {LOAD_SECONDS:g} s to load, at {lane.where()}")
        if message[0] == "unpackable":
            raise LoadFailed(
                f"the reward {names} could not be made again in a process of its own: {message[1]}; "
                f"@nemo_rl.reward_function(in_process=True) keeps it in this one",
                message[2],
            )
        if message[0] != "ready":
            raise LoadFailed(f"the reward {names} could not be loaded: {message[1]}", message[2])
        self._set_up = True

    def _leave(self, lane: ProcessLane | ThreadLane) -> None:
        with self._lock:
            self._lane = None
        lane.close()
        self.restarts += 1


class _Watch:
    """Which call is being made, and until when."""

    def __init__(self, reward: BoundReward, pending: dict[int, WorkerCall], timeout: float) -> None:
        self._pending = pending
        self._batched = reward.signature.batched
        self._overlapping = reward.signature.is_async and not self._batched
        self._allowed = timeout + (_LOOP_SECONDS if reward.signature.is_async else 0.0)
        self._since = time.monotonic() + LOAD_SECONDS  # until the request has been read
        self._begun: dict[int, float] = {}

    def begin(self) -> None:
        self._since = time.monotonic()

    def started(self, index: int) -> None:
        self._begun[index] = time.monotonic()

    def finished(self, index: int) -> None:
        self._begun.pop(index, None)
        self._since = time.monotonic()

    def seconds_left(self) -> float:
        oldest = min(self._begun.values(), default=self._since) if self._overlapping else self._since
        return max(0.0, oldest + self._allowed - time.monotonic())

    def to_blame(self) -> list[int]:
        """The calls that had begun; where none is known to have, the next one, so that each round makes one fewer."""
        if self._batched:
            return list(self._pending)
        if self._overlapping and self._begun:
            return [index for index in self._begun if index in self._pending]
        return list(self._pending)[:1]
