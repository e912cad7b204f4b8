"""Scores completions by the rewards of a run: in worker processes, with a time limit for each call and a policy for failures."""

from __future__ import annotations

import logging
import math
import queue
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, get_args

from nemo_rl.environments.execute import CAUSES, DIED, TIMEOUT, cut_down
from nemo_rl.environments.lanes import ProcessLane
from nemo_rl.environments.pickling import CannotTravel, pack
from nemo_rl.environments.signature import BoundReward, RewardSet
from nemo_rl.environments.supervise import Failure, LoadFailed, Score, Supervisor, Unit
from nemo_rl.errors import RewardError
from nemo_rl.run.signals import Interrupted

logger = logging.getLogger(__name__)

OnError = Literal["raise", "zero", "drop"]
_POLL_SECONDS = 0.2
_EXCERPT = 200


@dataclass(frozen=True)
class RewardCall:
    """One completion to score.

    `prompt` is the data set's own string, `messages` its conversation where it has one, `columns` its other columns.
    `key` (seed, step, prompt, sample) seeds the random numbers of the call, so that a resumed run draws the same;
    an empty key seeds nothing. `response_raw` is the response with its special tokens, None where it has none; `step` and
    `epoch` are those of the run.
    """

    prompt: str
    response: str
    messages: list[dict[str, Any]] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    key: tuple[int, ...] = ()
    response_raw: str | None = None
    step: int | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class RewardOutcome:
    """The score of one completion. `value` is None where it was dropped; `error` says what failed, if anything did.

    `parts` are the numbers behind it, unweighted: the entries of dict results, and each of several rewards by its name.
    """

    value: float | None
    parts: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class RewardRunner:
    """Runs rewards; a context manager. `should_stop` is polled while waiting: it may raise, or return true or the name of
    a signal, and then `Interrupted` is raised.

    Rewards run in `workers` processes, those that cannot travel to one (or say in_process) in a thread of this process. A
    call that takes longer than `timeout_seconds` (batched rewards: a whole batch) is ended with its process and counts as
    failed; calls that had not begun are made by the next process. A failed reward raises RewardError, scores 0, or drops the
    completion (`on_error`). `submit` may be called from any thread, and futures complete in another.
    """

    def __init__(self, rewards: RewardSet, *, timeout_seconds: float, on_error: OnError, workers: int = 1) -> None:
        if not (timeout_seconds > 0 and math.isfinite(timeout_seconds)):
            raise ValueError(f"found timeout_seconds={timeout_seconds}; expected a finite number of seconds above 0")
        if on_error not in get_args(OnError):
            raise ValueError(f"found on_error={on_error!r}; expected one of {', '.join(get_args(OnError))}")
        if workers < 1:
            raise ValueError(f"found workers={workers}; expected at least 1")
        self.rewards = rewards
        self.timeout_seconds = timeout_seconds
        self.on_error: OnError = on_error
        self.workers = workers
        self.should_stop: Callable[[], Any] = lambda: False
        self._supervisors: list[Supervisor] = []
        self._place: dict[int, tuple[queue.SimpleQueue[Unit | None], int, int]] = {}
        self._lock = threading.Lock()
        self._errors: Counter[str] = Counter()
        self._closed = False

    def start(self) -> None:
        """Starts loading the rewards and returns at once; `score` waits for that. Once per runner."""
        with self._lock:
            if not self._place:
                self._start()

    def _start(self) -> None:
        outside = [i for i, reward in enumerate(self.rewards.rewards) if not reward.in_process]
        inside = [i for i, reward in enumerate(self.rewards.rewards) if reward.in_process]
        payload = b""
        if outside:
            try:
                payload = pack([self.rewards.rewards[i] for i in outside])
            except CannotTravel as problem:
                outside, payload, more = self._travelling(outside, str(problem))
                inside += more
        if outside:
            self._supervise(outside, self.workers, lambda: ProcessLane(payload))
        if inside:
            self._supervise(sorted(inside), 1, None)

    def _travelling(self, candidates: list[int], problem: str) -> tuple[list[int], bytes, list[int]]:
        """Tells the rewards that can leave this process from those that cannot, which is said in a warning each."""
        outside, inside = [], []
        for i in candidates:
            reward = self.rewards.rewards[i]
            try:
                pack([reward])
                outside.append(i)
            except CannotTravel as own:
                inside.append(i)
                self._warn_in_process(reward, str(own))
        return outside, pack([self.rewards.rewards[i] for i in outside]) if outside else b"", inside

    def _warn_in_process(self, reward: BoundReward, problem: str) -> None:
        warnings.warn(
            f"reward {reward.name!r} cannot run in a process of its own ({problem}); it runs in a thread of the training "
            f"process, where a call that hangs is left behind after {self.timeout_seconds:g} s but not ended. "
            f"Create what cannot be pickled in Environment.setup, or say in_process=True",
            UserWarning,
            stacklevel=5,
        )

    def _supervise(self, indices: list[int], lanes: int, make: Callable[[], ProcessLane] | None) -> None:
        units: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        rewards = [self.rewards.rewards[i] for i in indices]
        for _ in range(lanes):
            self._supervisors.append(Supervisor(rewards, make, units, self.timeout_seconds))
        for place, i in enumerate(indices):
            self._place[i] = (units, place, lanes)
        for supervisor in self._supervisors[-lanes:]:
            supervisor.start()

    def score(self, calls: Sequence[RewardCall]) -> list[RewardOutcome]:
        """Scores these calls and returns their outcomes in the same order. RewardError as `on_error` says."""
        return self.wait(self.submit(calls))

    def submit(self, calls: Sequence[RewardCall]) -> Future[list[RewardOutcome]]:
        """Begins to score these calls; they are one batch for batched rewards."""
        if self._closed:
            raise RuntimeError("the reward runner is closed; make a new one")
        self.start()
        batch = _Batch(self, list(calls))
        batch.dispatch()
        return batch.future

    def wait(self, future: Future[list[RewardOutcome]]) -> list[RewardOutcome]:
        """The result of a future of `submit`, polling `should_stop` meanwhile."""
        while True:
            signal = self.should_stop()
            if signal:
                raise Interrupted(signal if isinstance(signal, str) else "SIGTERM")
            try:
                return future.result(_POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise

    def metrics(self) -> dict[str, float]:
        """Failed calls by cause since the start (reward_errors/<cause>), restarts, and `Environment.get_metrics`."""
        with self._lock:
            found: dict[str, float] = {f"reward_errors/{cause}": float(self._errors[cause]) for cause in CAUSES}
        found["reward_workers/restarts"] = float(sum(s.restarts for s in self._supervisors))
        several = sum(reward.environment is not None for reward in self.rewards.rewards) > 1
        for reward in self.rewards.rewards:
            readings = [s.metrics[reward.name] for s in self._supervisors if reward.name in s.metrics]
            for name in sorted({name for reading in readings for name in reading}):
                values = [reading[name] for reading in readings if name in reading]
                found[f"{reward.name}.{name}" if several else name] = sum(values) / len(values)
        return found

    def close(self) -> None:
        """Tears idle environments down and ends all processes; those in the middle of a call are ended at once."""
        self._closed = True
        for supervisor in self._supervisors:
            supervisor.ask_to_stop()
        for supervisor in self._supervisors:
            supervisor.join()

    def __enter__(self) -> RewardRunner:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def count(self, cause: str) -> None:
        """Counts a failed call."""
        with self._lock:
            self._errors[cause] += 1

    def place_of(self, reward: int) -> tuple[queue.SimpleQueue[Unit | None], int, int]:
        """Where a reward runs: the queue of its units, its number there, and how many take from that queue."""
        return self._place[reward]


class _Batch:
    """The calls of one `submit`: cut into units, and put together again when all have been made."""

    def __init__(self, runner: RewardRunner, calls: list[RewardCall]) -> None:
        self.runner = runner
        self.calls = calls
        self.future: Future[list[RewardOutcome]] = Future()
        rewards = runner.rewards.rewards
        self._scores: list[list[Score | Failure | None]] = [[None] * len(calls) for _ in rewards]
        self._open_units = 0
        self._lock = threading.Lock()

    def dispatch(self) -> None:
        units: list[tuple[queue.SimpleQueue[Unit | None], Unit]] = []
        for i, reward in enumerate(self.runner.rewards.rewards):
            target, place, lanes = self.runner.place_of(i)
            whole = reward.signature.batched or reward.signature.is_async
            calls = [cut_down(j, call, reward.signature) for j, call in enumerate(self.calls)]
            # Several units for each worker: where some calls take longer, the others go on with the rest.
            size = max(1, len(calls) if whole else len(calls) if lanes == 1 else -(-len(calls) // (4 * lanes)))
            for start in range(0, len(calls), size):
                units.append(
                    (target, Unit(self, i, place, calls[start : start + size], self.runner.on_error == "raise"))
                )
        self._open_units = len(units)
        if not units:
            self.future.set_result([])
        for target, unit in units:
            target.put(unit)

    # ------------------------------------------------------------------ called by supervisors

    def put(self, reward: int, index: int, score: Score | Failure) -> None:
        if isinstance(score, Failure):
            self.runner.count(score.cause)
        self._scores[reward][index] = score
        if isinstance(score, Failure) and self.runner.on_error == "raise":
            self._fail(self._error(reward, index, score))

    def unit_done(self) -> None:
        with self._lock:
            self._open_units -= 1
            if self._open_units == 0 and not self.future.done():
                self.future.set_result([self._outcome(i) for i in range(len(self.calls))])

    def unit_failed(self, error: BaseException) -> None:
        if isinstance(error, LoadFailed):
            error = RewardError(f"{error}; mend it and run again", error.traceback)
        self._fail(error)

    @property
    def over(self) -> bool:
        """Whether nobody needs the units that are left."""
        return self.future.done()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)

    def _outcome(self, index: int) -> RewardOutcome:
        total: list[float] = []
        parts: dict[str, float] = {}
        errors: list[str] = []
        named = self.runner.rewards.named
        for reward, scores in zip(self.runner.rewards.rewards, self._scores, strict=True):
            score = scores[index]
            assert score is not None
            if isinstance(score, Failure):
                errors.append(f"{reward.name} {self._words(score)}")
                continue
            total.append(reward.weight * score.value)
            parts |= {f"{reward.name}/{name}" if named else name: value for name, value in score.parts.items()}
            if named:
                parts[reward.name] = score.value
        value = math.fsum(total) if not errors or self.runner.on_error == "zero" else None
        return RewardOutcome(value, parts, "; ".join(errors) or None)

    def _error(self, reward: int, index: int, failure: Failure) -> RewardError:
        name = self.runner.rewards.rewards[reward].name
        call = self.calls[index]
        where = ""
        if len(call.key) == 4:
            _, seeded, prompt, sample = call.key
            step = seeded if call.step is None else call.step
            where = f" ({f'step {step}' if step else 'tried before the first step'}, prompt {prompt}, sample {sample})"
        error = RewardError(
            f"reward {name!r} {self._words(failure)}{where}; expected a finite number or a dict of them. Correct the reward, or set "
            f"on_reward_error='zero' or 'drop' to go on without it\n"
            f"  prompt:   {_excerpt(call.prompt)}\n  response: {_excerpt(call.response)}",
            failure.traceback,
        )
        if failure.traceback:
            error.add_note(failure.traceback.rstrip())
        return error

    def _words(self, failure: Failure) -> str:
        if failure.cause == TIMEOUT:
            return f"took longer than {self.runner.timeout_seconds:g} s (reward_timeout)" + (
                f", at {failure.error}" if failure.error else ""
            )
        if failure.cause == DIED:
            return f"ended its process: {failure.error}"
        return failure.error


def preflight(rewards: RewardRunner | RewardSet, calls: Sequence[RewardCall], on_error: OnError = "raise") -> list[str]:
    """Scores a few calls before training and returns warnings; under "raise" a reward that fails raises RewardError.

    Where all scores are equal, the first call is scored with a few other responses too: if they are equal as well, one of
    the warnings says that GRPO would learn nothing.
    """
    if isinstance(rewards, RewardSet):
        from nemo_rl.job.spec import RewardSpec

        timeout = RewardSpec.model_fields["timeout_seconds"].default
        with RewardRunner(rewards, timeout_seconds=timeout, on_error=on_error) as runner:
            return preflight(runner, calls, on_error)
    if not calls:
        return []
    outcomes = rewards.score(calls)
    probes: list[RewardCall] = []
    if len({outcome.value for outcome in outcomes}) == 1:
        probes = _probes(calls[0])
        outcomes += rewards.score(probes)
    found = []
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failed and on_error == "raise":
        raise RewardError(f"the reward failed on {len(failed)} of {len(outcomes)} trial calls: {failed[0]}")
    if failed:
        fate = "score 0" if on_error == "zero" else "are left out"
        found.append(f"the reward failed on {len(failed)} of {len(outcomes)} trial calls, which {fate}: {failed[0]}")
    values = {outcome.value for outcome in outcomes if outcome.value is not None}
    if probes and len(values) == 1 and not failed:
        found.append(
            f"the reward gave {values.pop():g} to all of {len(outcomes)} trial responses; GRPO learns only where completions "
            f"of one prompt differ in reward"
        )
    return found


def _probes(call: RewardCall) -> list[RewardCall]:
    """The same call with responses that a reward is likely to tell apart."""
    from nemo_rl.environments.builtin import ANSWER_COLUMNS

    answers = [str(call.columns[name]) for name in ANSWER_COLUMNS if call.columns.get(name) is not None]
    texts = [*answers[:1], call.prompt, "The answer is 42.", "<think>\nA thought.\n</think>\n" + (answers or ["7"])[0]]
    return [replace(call, response=text, response_raw=text) for text in dict.fromkeys(texts)]


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…")
