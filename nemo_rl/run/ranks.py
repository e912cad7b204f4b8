"""Training on several ranks: who computes which share, and how all ranks go on or end together.

Run the same program on every rank under `torchrun` (its variables RANK, WORLD_SIZE, LOCAL_RANK). Every rank reads the same
data and knows the whole optimizer batch; each computes a share of it, and shares are put together in the order of the
batch. Totals, weights and metrics are therefore those of one rank, whatever the number of ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nemo_rl.errors import TrainingInterrupted
from nemo_rl.run import unpickle, wire
from nemo_rl.run.signals import Interrupted

T = TypeVar("T")
R = TypeVar("R")

JOIN_SECONDS = 1800.0
"""The ranks of a job wait for each other this long at the start. Their pods run by then; imports and bundles may differ."""
SILENT_SECONDS = 1800.0
"""The longest that a rank waits for others of which none gives a sign of life. While one does, it waits on: rollouts of one
may take far longer than those of the others."""
COLLECTIVE_SECONDS = 24 * 3600.0
"""The longest that one exchange may take, whatever signs of life there are."""
KERNEL_SECONDS = 4 * 3600.0
"""The same between GPUs, where the ranks compute one step together. In a pod its own time limit comes first."""
CHECK_SECONDS = 0.5
"""Between two looks at whether another rank ended."""
ALIVE_SECONDS = 5.0
"""How often a rank that works gives those that wait a sign of life."""

_CHALLENGE_BYTES = 32
RETRY_SECONDS = 5.0
"""How long one try to reach the first rank may take: between two tries, signals are seen."""

_runs = count()


class RankFailed(RuntimeError):
    """Another rank ended the run. The message has its number and its error, as far as they are known."""


class _Asked(Exception):
    """Another rank asked this one to leave its work and come to the exchange, which tells why."""


@dataclass(frozen=True)
class _Outcome:
    """How the work of one rank ended: a value, the name of a signal, an error, or none where it was asked to leave it."""

    value: Any = None
    signal: str | None = None
    error: str | None = None
    exception: BaseException | None = None
    """The error itself, for the other ranks to raise; they get its text alone where its type is not one that travels."""
    asked: bool = False


# --- ranks ----------------------------------------------------------------------------------------------------------


class Ranks:
    """This process among the ranks of a run. One process alone is rank 0 of 1, and communicates with nobody.

    `gather`, `together`, `first`, `map` and `sum` are collective: every rank calls them, in the same order. The work given
    to them must contain no collective call. When it ends by an exception on one rank, all ranks leave the call by that
    exception (`Interrupted` after a signal). A rank that waits for others notices signals, which `requested` tells, and
    ranks that ended elsewhere (RankFailed).
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, key: bytes = b"") -> None:
        """`store` holds what ranks tell each other beside the exchanges, `key` proves that a message is of this group."""
        self.rank, self.size, self._store, self._key = rank, size, store, key
        self._exchanges = 0
        self.requested: Callable[[], str | None] = lambda: None
        self._run = run = next(_runs)
        self._left = f"nemo_rl/left/{run}"
        self._alive = f"nemo_rl/alive/{run}"
        self._heard: Any = None
        self._signs = count()
        self._next_sign = self._next_look = 0.0
        self.heard_at = time.monotonic()
        """When this rank worked, or heard from one that does; on the clock of time.monotonic."""
        self._agreed = False
        self._in_flight = False
        self._pass_groups: dict[str, Any] = {}
        self._left_groups: list[Any] = []

    @property
    def _asked(self) -> str:
        """The key by which a rank asks the others to leave their work and come to the next exchange."""
        return f"nemo_rl/asked/{self._run}/{self._exchanges}"

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks for all."""
        return self.rank == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Returns what `work` returned on each rank, by rank. Values travel as `nemo_rl.run.wire` writes them."""
        if self.size == 1:
            return [work()]
        failure: BaseException | None = None
        try:
            outcome = _Outcome(value=work())
            content = _encoded(outcome)
        except RankFailed:  # that rank will not come to the exchange
            raise
        except _Asked:
            outcome = _Outcome(asked=True)
        except Interrupted as interrupted:
            outcome = _Outcome(signal=interrupted.signal)
        except BaseException as error:
            failure, outcome = error, _Outcome(error=_text_of(error), exception=error)
        try:
            if outcome.signal or outcome.error:
                self._ask(outcome.signal or "")
            if outcome.signal or outcome.error or outcome.asked:
                content = _encoded(outcome)
            asked = self._asked
            outcomes = self._exchange(outcome, content)
        except RankFailed:
            if failure is not None:
                raise failure
            raise
        self._agreed = any(other.error or other.signal or other.asked for other in outcomes)
        if self._agreed:
            self._leave_pass()
        if failure is not None:
            raise failure
        for rank, other in enumerate(outcomes):
            if other.error is not None:
                raise _error_of(rank, other)
        if self._agreed:
            signals = [other.signal for other in outcomes if other.signal]
            raise Interrupted(signals[0] if signals else self._store.get(asked))
        return [other.value for other in outcomes]

    def _exchange(self, outcome: _Outcome, content: bytes) -> list[_Outcome]:
        """Returns the outcomes of all ranks; `content` is this one's in the form in which it travels."""
        number = self._exchanges
        place = f"exchange {number} by rank "
        data = torch.frombuffer(bytearray(wire.sign(self._key, f"{place}{self.rank}", content)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.cat([data, data.new_zeros(longest - len(data))])
        self._wait(lambda: dist.all_gather(parts, padded, async_op=True))
        outcomes = []
        for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            content = wire.verify(self._key, f"{place}{rank}", part[: int(size)].numpy().tobytes())
            outcomes.append(outcome if rank == self.rank else _decoded(content))
        self._exchanges += 1
        return outcomes

    def send(self, tensor: torch.Tensor, begin: Callable[[Any], Any]) -> None:
        """Sends parts of a model within a pass: `begin(group)` starts the collective operation and returns its handle.

        Unlike all else that is collective it may be called within the work given to `gather`: passes have a group of their own,
        which is given up where a rank leaves its pass.
        """
        group = self._pass_groups.get(tensor.device.type)
        if group is None:
            backend = "nccl" if tensor.device.type == "cuda" else "gloo"
            seconds = KERNEL_SECONDS if backend == "nccl" else COLLECTIVE_SECONDS
            group = dist.new_group(backend=backend, timeout=timedelta(seconds=seconds))
            self._pass_groups[tensor.device.type] = group
        if tensor.device.type == "cuda":
            begin(group).wait()  # on the stream; the host goes on
            return
        self._wait(lambda: begin(group), within_pass=True)

    def settle(self, device: torch.device) -> None:
        """Waits within a pass for what a GPU still has to do, in Python: where the host waits in a kernel it does not see that
        another rank left the pass. Nothing to do on a CPU, where `send` waits."""
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._wait(lambda: _Reached(event), within_pass=True)

    def _leave_pass(self) -> None:
        """Gives up the groups in which another rank may still wait for this one; the next pass makes new ones."""
        for kind, group in self._pass_groups.items():
            if kind == "cuda":
                with contextlib.suppress(RuntimeError, ValueError):
                    dist.distributed_c10d._abort_process_group(group)
        self._left_groups += self._pass_groups.values()  # to end one is to wait for what is on its way in it
        self._pass_groups.clear()

    def _wait(self, begin: Callable[[], Any], within_pass: bool = False) -> None:
        """Waits for a collective in Python, where signals are seen, and not for ranks that will never come.

        Within a pass it is left where another rank left it.
        """
        pause = 1e-4
        self.heard_at = time.monotonic()
        try:
            self._in_flight = True
            operation = begin()
            while not operation.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.002 if within_pass else 0.02)
                if self._may_look():
                    asked = self._look()
                    self._listen()
                    if within_pass and asked:
                        raise _Asked
                    if not within_pass and (signal := self.requested()):
                        self._ask(signal)
            self._in_flight = False
            operation.wait()
        except (RuntimeError, dist.DistError) as error:
            if isinstance(error, RankFailed):
                raise
            self._in_flight = False
            raise RankFailed(self._story(error)) from error

    def together(self, work: Callable[[], T]) -> T:
        """Returns what `work` returned on this rank, once all ranks have done theirs."""
        kept: list[T] = []
        self.gather(lambda: kept.append(work()))
        return kept[0]

    def first(self, work: Callable[[], T]) -> T:
        """Returns on every rank what `work` returned on the first one; the others do not run it."""
        return self.gather(lambda: work() if self.is_first else None)[0]  # type: ignore[return-value]

    def map(self, items: Sequence[T], costs: Sequence[float], work: Callable[[list[T]], list[R]]) -> list[R]:
        """Returns one result for each item, in order; each rank gives its share of the items to `work`."""
        shares = self.shares(costs)
        parts = self.gather(lambda: work([items[i] for i in shares[self.rank]]))
        results: list[Any] = [None] * len(items)
        for share, part in zip(shares, parts, strict=True):
            for i, result in zip(share, part, strict=True):
                results[i] = result
        return results

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Returns the sums of each value over the ranks."""
        parts = self.gather(lambda: values)
        return {name: sum(part[name] for part in parts) for name in values}

    def shares(self, costs: Sequence[float]) -> list[list[int]]:
        """Returns the indices that each rank takes, balanced by cost, rising within a rank. Equal on all ranks."""
        shares: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0.0] * self.size
        for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            rank = loads.index(min(loads))
            shares[rank].append(i)
            loads[rank] += costs[i]
        return [sorted(share) for share in shares]

    def check(self) -> None:
        """Ends this rank's work in `gather` soon after another rank's ended by an exception. Cheap: call it in loops."""
        if self.size > 1 and self._may_look():
            asked = self._look()
            self._give_sign()
            if asked:
                raise _Asked

    def leave(self, error: BaseException) -> BaseException:
        """Tells the other ranks that this one's run ends by `error`; returns what to raise.

        That is `error` itself, or RankFailed where communication broke because another rank had ended before.
        """
        if self.size == 1 or self._agreed or isinstance(error, TrainingInterrupted | KeyboardInterrupt):
            return error  # all ranks end by it
        if _is_broken(error) and not isinstance(error, RankFailed):
            error = RankFailed(self._story(error))
        with contextlib.suppress(RuntimeError, dist.DistError):  # the rank that kept the store may be gone
            if not self._store.check([self._left]):
                self._store.set(self._left, f"rank {self.rank}: {_text_of(error)}")
        if not self._in_flight:
            _disconnect()  # ranks that wait for this one must not do so for as long as its process lives
        return error

    def _may_look(self) -> bool:
        return time.monotonic() >= self._next_look

    def _look(self) -> bool:
        """Whether this rank is asked to leave its work. RankFailed where another one will come to no exchange any more."""
        self._next_look = time.monotonic() + CHECK_SECONDS
        try:
            if self._store.check([self._left]):
                raise RankFailed(self._story(None))
            return bool(self._store.check([self._asked]))
        except (RuntimeError, dist.DistError) as error:
            if isinstance(error, RankFailed):
                raise
            raise RankFailed(self._story(error)) from error

    def _give_sign(self) -> None:
        """Tells the ranks that wait that this one works."""
        self.heard_at = time.monotonic()
        if self.heard_at >= self._next_sign:
            self._next_sign = self.heard_at + ALIVE_SECONDS
            with contextlib.suppress(RuntimeError, dist.DistError):  # the next look tells it better
                self._store.set(self._alive, f"rank {self.rank}, sign {next(self._signs)}")

    def _listen(self) -> None:
        """Hears whether any rank works. RankFailed where none has for very long: one of them hangs."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            if self._store.check([self._alive]) and (sign := self._store.get(self._alive)) != self._heard:
                self._heard, self.heard_at = sign, time.monotonic()
        if time.monotonic() - self.heard_at > SILENT_SECONDS:
            raise RankFailed(
                f"no rank gave a sign of life for {SILENT_SECONDS:.0f} s while rank {self.rank} waited; one of them hangs: "
                "see the ranks' stacks, for example with py-spy"
            )

    def announce_end(self, text: str) -> None:
        """Tells the ranks that wait for this one that it ends, and why. May be called from any thread."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            if self.size > 1 and not self._store.check([self._left]):
                self._store.set(self._left, text)

    def _ask(self, signal: str) -> None:
        """Asks the other ranks to leave their work and come to the exchange."""
        with contextlib.suppress(RuntimeError, dist.DistError):  # the exchange, which comes next, tells it better
            self._store.set(self._asked, signal)

    def _story(self, error: BaseException | None) -> str:
        """What is known of the rank that ended the run."""
        try:
            if self._store.check([self._left]):
                return f"another rank ended this run, {self._store.get(self._left)}"
        except (RuntimeError, dist.DistError):  # the rank that kept the store is gone
            return f"another rank ended this run: rank 0 of {self.size} cannot be reached; see its log"
        text = re.sub(r"^\[\S*\] ", "", " ".join(str(error).split())).split(". ")[0]  # without gloo's advice
        return (
            f"another rank ended this run without a word, as a killed process does ({text}); see the other ranks' logs"
        )


def join(device: torch.device, seconds: float = JOIN_SECONDS) -> Ranks:
    """Returns this process's place among the ranks that torchrun started; alone where it did not.

    The process group (NCCL for tensors on GPUs, gloo for all else) is made once and lives as long as the process. Raises
    RuntimeError when not all ranks come within `seconds`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized() and size > 1:
        _connect(device, int(os.environ["RANK"]), size, seconds)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), _group["store"], _group["key"])


class _Reached:
    """An event on a stream of the GPU, as the handle of an operation."""

    def __init__(self, event: Any) -> None:
        self.is_completed = event.query

    def wait(self) -> None: ...


_group: dict[str, Any] = {}
"""Of this process's group, which is made once: the store and the key that its ranks agreed on."""


class SignedStore:
    """What ranks tell each other through a store that anybody who reaches its port can write to.

    Values that no rank of this job wrote are as if they were not there.
    """

    def __init__(self, store: Any, key: bytes) -> None:
        self._store, self._key = store, key

    def set(self, name: str, value: str) -> None:
        self._store.set(name, wire.sign(self._key, name, value.encode()).hex())

    def check(self, names: list[str]) -> bool:
        """Whether all of them are there."""
        return all(self._store.check([name]) and self._read(name) is not None for name in names)

    def get(self, name: str) -> str:
        """The value, which must be there."""
        return self._read(name) or ""

    def _read(self, name: str) -> str | None:
        try:
            return wire.verify(self._key, name, bytes.fromhex(self._store.get(name).decode())).decode()
        except (ValueError, wire.ForgedMessage):
            return None


def _connect(device: torch.device, rank: int, size: int, seconds: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    token = wire.read_token()
    deadline = time.monotonic() + seconds
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = _reach_store(rank, deadline)
    signed = SignedStore(store, token)
    joined = [f"nemo_rl/joined/{other}" for other in range(size)]
    try:
        if store is not None:
            signed.set(joined[rank], "")
        while store is None or not signed.check(joined):
            if store is None or time.monotonic() > deadline:
                came = sum(signed.check([name]) for name in joined) if store is not None else 0
                found = f"{came} of {size} ranks" if store is not None else "no connection"
                raise RuntimeError(
                    f"rank {rank} waited {seconds:.0f} s at {where} and found {found}; expected all {size}: see whether "
                    "all pods or processes started, and whether this one can reach that address"
                )
            time.sleep(0.05)
    except dist.DistNetworkError as error:
        raise RuntimeError(
            f"rank {rank} waited at {where} for all {size} ranks, and rank 0, where they meet, went away: see its log "
            f"({str(error).splitlines()[0]})"
        ) from None
    store.set_timeout(timedelta(seconds=KERNEL_SECONDS))
    unpickle.guard_collectives()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(wire.secret(token, "the name of the group"), store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=KERNEL_SECONDS),
    )
    gloo = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    gloo._set_default_timeout(timedelta(seconds=COLLECTIVE_SECONDS))
    atexit.register(_disconnect)
    _group.update(store=signed, key=_agree(token, rank, size))


def _agree(token: bytes, rank: int, size: int) -> bytes:
    """The key of this group: each rank proves that it has the job's secret, by an answer to what the others just drew.

    ForgedMessage where one does not: somebody else took its place.
    """
    mine = torch.tensor(list(os.urandom(_CHALLENGE_BYTES)), dtype=torch.uint8)
    drawn = [torch.zeros_like(mine) for _ in range(size)]
    dist.all_gather(drawn, mine)
    key = wire.derived(token, b"".join(bytes(part.tolist()) for part in drawn))
    proof = torch.tensor(list(wire.sign(key, f"rank {rank}", b"")), dtype=torch.uint8)
    proofs = [torch.zeros_like(proof) for _ in range(size)]
    dist.all_gather(proofs, proof)
    for other, part in enumerate(proofs):
        wire.verify(key, f"rank {other}", bytes(part.tolist()))
    return key


def _reach_store(rank: int, deadline: float) -> Any:
    """Returns the key-value store at MASTER_ADDR:MASTER_PORT; None if it cannot be reached in time.

    torchrun serves it where it says so, else the first rank does. Unlike torch's own rendezvous this one tries again in
    Python, where a signal ends the waiting.
    """
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while True:
        left = deadline - time.monotonic()
        try:
            return dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=serves,
                timeout=timedelta(seconds=max(min(left, RETRY_SECONDS), 0.1)),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistError as error:
            if serves:
                raise RuntimeError(
                    f"rank 0 cannot serve at port {os.environ['MASTER_PORT']} ({error}); set MASTER_PORT to a free one"
                ) from error
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_broken(error: BaseException) -> bool:
    """Whether an error says that communication with another rank failed."""
    return isinstance(error, dist.DistError | RankFailed) or (type(error) is RuntimeError and "gloo" in str(error))


def _text_of(error: BaseException) -> str:
    """The type and text of an error in one line, with the notes on it."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join(f"{text} {' '.join(f'({note})' for note in getattr(error, '__notes__', []))}".split())


def _encoded(outcome: _Outcome) -> bytes:
    fields = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
    return wire.dumps(fields)


def _decoded(content: bytes) -> _Outcome:
    return _Outcome(**wire.loads(content))


def _error_of(rank: int, outcome: _Outcome) -> BaseException:
    error = outcome.exception
    if error is None:
        return RankFailed(f"another rank ended this run, rank {rank}: {outcome.error}")
    error.add_note(f"on rank {rank}, which ended this run")
    error.rank = rank  # type: ignore[attr-defined]
    return error
