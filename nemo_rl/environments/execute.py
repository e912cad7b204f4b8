"""Calls rewards: arguments, seeds, the checks of what they return, and the messages that say what came of each call.

Runs in a worker process, or in a thread for rewards that cannot leave the training process. A message is a tuple of a word
and plain values, so that it can travel as marshalled bytes:

    ("ready",) ("failed", error, traceback)             after the rewards were loaded and set up
    ("begin",)                                          a request was read
    ("start", i)                                        call i begins; only where calls overlap
    ("value", i, number, parts)                         call i returned
    ("error", i, cause, error, traceback)               call i failed
    ("done", metrics)                                   no more calls of this request
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import random
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_rl.environments.arguments import RAW
from nemo_rl.environments.signature import BoundReward, RewardSignature

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

Message = tuple[Any, ...]
Emit = Callable[[Message], None]

EXCEPTION = "exception"
TIMEOUT = "timeout"
NOT_FINITE = "not_finite"
WRONG_TYPE = "wrong_type"
WRONG_LENGTH = "wrong_length"
DIED = "died"
CAUSES = (EXCEPTION, TIMEOUT, NOT_FINITE, WRONG_TYPE, WRONG_LENGTH, DIED)
"""Why a call of a reward failed."""

MOST_AT_ONCE = 256
"""Async calls that are in flight together: each may hold a connection, and processes have 1024 files by default."""
_TRACEBACK_CHARACTERS = 20_000


@dataclass(frozen=True)
class Request:
    """Calls of one reward that are made one after the other, or together. `fail_fast` ends it at the first failure."""

    reward: int
    calls: list[WorkerCall]
    timeout_seconds: float
    fail_fast: bool


@dataclass(frozen=True)
class WorkerCall:
    """A `RewardCall` cut down to what its reward reads; `index` is its place in the submitted list."""

    index: int
    prompt: str
    response: str
    messages: list[dict[str, Any]] | None
    columns: dict[str, Any]
    key: tuple[int, ...]
    response_raw: str | None = None
    step: int | None = None
    epoch: int | None = None


class BadValue(Exception):
    """A reward returned what is no reward. `cause` is one of CAUSES."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Executor:
    """Makes the calls of requests, in the thread that uses it. `emit` is given each message.

    `shared` says that other code runs in this process, whose random state must be left as it was.
    """

    def __init__(self, rewards: Sequence[BoundReward], emit: Emit, *, shared: bool) -> None:
        self._rewards = rewards
        self._emit = emit
        self._shared = shared
        self._loop: AbstractEventLoop | None = None

    def setup(self) -> bool:
        """Sets all environments up, each once, and says so; False if one failed."""
        try:
            for environment in _environments(self._rewards):
                environment.setup()
            if any(_mentions(reward.target, "numpy") for reward in self._rewards):
                import numpy  # noqa: F401  (so that it is seeded before the first call too)
        except BaseException as error:
            self._emit(("failed", summary(error), user_traceback(error)))
            return False
        self._emit(("ready",))
        return True

    def run(self, request: Request) -> None:
        reward = self._rewards[request.reward]
        self._emit(("begin",))
        if reward.signature.batched:
            self._run_batch(reward, request)
        elif reward.signature.is_async:
            self._in_loop(self._run_together(reward, request))
        else:
            self._run_in_turn(reward, request)
        self._emit(("done", self._metrics(reward)))

    def teardown(self) -> None:
        """Tears all environments down; what fails is printed, since the run is over."""
        for environment in _environments(self._rewards):
            try:
                environment.teardown()
            except BaseException as error:
                print(f"teardown of {type(environment).__name__} failed:\n{user_traceback(error)}", file=sys.stderr)
        if self._loop is not None:
            self._loop.close()

    def _run_in_turn(self, reward: BoundReward, request: Request) -> None:
        signature, target = reward.signature, reward.target
        for call in request.calls:
            message: Message
            try:
                args, keywords = signature.arguments(call)
                with seeded(call.key, shared=self._shared):
                    value = target(*args, **keywords)
                    if inspect.isawaitable(value):
                        value = self._in_loop(_result_of(value))
                message = ("value", call.index, *as_reward(signature.score_of(value)))
            except BaseException as error:
                message = failure(call.index, error)
            self._emit(message)
            if request.fail_fast and message[0] == "error":
                return

    def _run_batch(self, reward: BoundReward, request: Request) -> None:
        calls = request.calls
        try:
            args, keywords = reward.signature.batch_arguments(calls)
            with seeded(tuple(n for call in calls for n in call.key), shared=self._shared):
                values = reward.target(*args, **keywords)
                if inspect.isawaitable(values):
                    values = self._in_loop(_within(values, request.timeout_seconds))
            values = _as_list(values, len(calls))
        except BaseException as error:
            for call in calls:
                self._emit(failure(call.index, error))
            return
        for call, value in zip(calls, values, strict=True):
            try:
                self._emit(("value", call.index, *as_reward(reward.signature.score_of(value))))
            except BadValue as error:
                self._emit(failure(call.index, error))

    async def _run_together(self, reward: BoundReward, request: Request) -> None:
        import asyncio  # here and below: half of the time that a worker needs to start

        gate = asyncio.Semaphore(MOST_AT_ONCE)

        async def one(call: WorkerCall) -> bool:
            async with gate:
                self._emit(("start", call.index))
                try:
                    args, keywords = reward.signature.arguments(call)
                    # No await between the seed and the first step of the coroutine, so that it draws from this seed.
                    with seeded(call.key, shared=self._shared):
                        pending = reward.target(*args, **keywords)
                        value = await _within(pending, request.timeout_seconds)
                    self._emit(("value", call.index, *as_reward(reward.signature.score_of(value))))
                except BaseException as error:
                    task = asyncio.current_task()
                    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                        raise  # by us, below; a reward may also raise it of its own
                    self._emit(failure(call.index, error))
                    return False
                return True

        tasks = [asyncio.ensure_future(one(call)) for call in request.calls]
        for finished in asyncio.as_completed(tasks):
            if not await finished and request.fail_fast:
                break
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _in_loop(self, coroutine: Any) -> Any:
        if self._loop is None:
            import asyncio

            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(coroutine)

    def _metrics(self, reward: BoundReward) -> dict[str, float]:
        if reward.environment is None:
            return {}
        try:
            metrics = reward.environment.get_metrics()
            return {str(name): number(value) for name, value in metrics.items()}
        except BaseException as error:
            print(f"get_metrics of {reward.name} failed:\n{user_traceback(error)}", file=sys.stderr)
            return {}


def as_reward(value: Any) -> tuple[float, dict[str, float]]:
    """What a reward returned as (sum, parts by name); parts is empty for a plain number. BadValue if it is neither."""
    if isinstance(value, Mapping):
        if not value:
            raise BadValue(WRONG_TYPE, "returned an empty dict; expected at least one named number")
        parts = {str(name): number(part, f" for {name!r}") for name, part in value.items()}
        try:
            return math.fsum(parts.values()), parts
        except OverflowError:
            raise BadValue(NOT_FINITE, f"returned {value}, whose sum is too large; expected a finite sum") from None
    return number(value), {}


def number(value: Any, where: str = "") -> float:
    """A float, int, bool or 0-d array or tensor as a finite float; BadValue else."""
    if type(value) is not float:
        if isinstance(value, str | bytes) or not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0:
            shown = repr(value)
            raise BadValue(
                WRONG_TYPE,
                f"returned {shown[:80]}{'…' if len(shown) > 80 else ''} ({type(value).__name__}){where}; expected a number",
            )
        try:
            value = float(value.detach() if hasattr(value, "detach") else value)
        except OverflowError:  # an integer of more than 308 digits
            value = math.inf
    if not math.isfinite(value):
        raise BadValue(NOT_FINITE, f"returned {value}{where}; expected a finite number")
    return float(value)


def failure(index: int, error: BaseException) -> Message:
    """The message of a call that failed."""
    if isinstance(error, BadValue):
        return ("error", index, error.cause, str(error), "")
    if isinstance(error, _TimedOut):
        return ("error", index, TIMEOUT, "", "")
    return ("error", index, EXCEPTION, f"raised {summary(error)}", user_traceback(error))


def summary(error: BaseException) -> str:
    """The last line of a traceback: type and message."""
    return "".join(traceback.format_exception_only(error)).strip()[:2000]


def user_traceback(error: BaseException) -> str:
    """The traceback of user code, with its source lines, without the frames of this package above it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in _OWN_MODULES:
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace or error.__traceback__))
    except Exception:  # an error whose own __str__ fails
        text = f"{type(error).__name__} (its text could not be formatted)"
    return text if len(text) <= _TRACEBACK_CHARACTERS else "[…]\n" + text[-_TRACEBACK_CHARACTERS:]


_OWN_MODULES = {__name__, "asyncio.base_events", "asyncio.runners"}


@contextmanager
def seeded(key: tuple[int, ...], *, shared: bool) -> Iterator[None]:
    """Seeds the global random numbers of python, numpy and torch (where loaded) from the key of a call.

    An empty key seeds nothing. With `shared`, torch is left alone, and the others' state is put back afterwards.
    """
    if not key:
        yield
        return
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    numpy_random: Any = getattr(sys.modules.get("numpy"), "random", None)
    torch: Any = sys.modules.get("torch")
    before = (random.getstate(), numpy_random.get_state() if numpy_random is not None else None) if shared else None
    random.seed(seed)
    if numpy_random is not None:
        numpy_random.seed(seed & 0xFFFFFFFF)
    if torch is not None and not shared:
        torch.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            if before[1] is not None:
                numpy_random.set_state(before[1])


class _TimedOut(Exception):
    """An async call took longer than it may."""


async def _within(awaitable: Any, seconds: float) -> Any:
    import asyncio

    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if limit.expired():
            raise _TimedOut from None
        raise


async def _result_of(awaitable: Any) -> Any:
    return await awaitable


def _as_list(values: Any, expected: int) -> list[Any]:
    if isinstance(values, Mapping) and "rewards" in values:  # OpenRLHF's form
        values = values["rewards"]
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise BadValue(WRONG_TYPE, f"returned a {type(values).__name__}; expected a list of {expected} numbers")
    found: list[Any] = list(values)
    if len(found) != expected:
        raise BadValue(WRONG_LENGTH, f"returned {len(found)} values for {expected} responses; expected one for each")
    return found


def _environments(rewards: Sequence[BoundReward]) -> list[Any]:
    """Each environment once, also where several rewards share it."""
    return list({id(r.environment): r.environment for r in rewards if r.environment is not None}.values())


def _mentions(fn: Any, name: str) -> bool:
    """Whether the code of a function names a module, as an import within it does."""
    fn = inspect.unwrap(fn.func if isinstance(fn, functools.partial) else fn)
    code = getattr(fn if hasattr(fn, "__code__") else type(fn).__call__, "__code__", None)
    pending = [code] if isinstance(code, types.CodeType) else []
    while pending:
        code = pending.pop()
        if any(used.split(".")[0] == name for used in code.co_names):
            return True
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return False


def cut_down(index: int, call: Any, signature: RewardSignature) -> WorkerCall:
    """A call with no more columns than its reward reads: what is not sent costs nothing."""
    keeps_messages = signature.messages
    columns = signature.wanted(call.columns)
    if keeps_messages and call.messages is None and "messages" in call.columns:
        columns["messages"] = call.columns["messages"]
    messages = call.messages if keeps_messages else None
    raw = call.response_raw if signature.takes.has(RAW) else None
    return WorkerCall(index, call.prompt, call.response, messages, columns, tuple(call.key), raw, call.step, call.epoch)
