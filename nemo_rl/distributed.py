"""Training on several ranks: who computes which share, how all ranks go on or end together, and the sharded model.

Run the same program on every rank under `torchrun` (its variables RANK, WORLD_SIZE, LOCAL_RANK). Every rank reads the same
data and knows the whole optimizer batch; each computes a share of it, and shares are put together in the order of the
batch. Totals, weights and metrics are therefore those of one rank, whatever the number of ranks.
"""

from __future__ import annotations

import atexit
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_rl.preemption import Interrupted

T = TypeVar("T")
R = TypeVar("R")

JOIN_SECONDS = 600.0
"""The ranks of a job wait for each other this long at the start: images and volumes of other nodes may come late."""
COLLECTIVE_SECONDS = 1800.0
"""The longest that a rank waits for another one: rollouts of one may take far longer than those of the others."""
CHECK_SECONDS = 0.5
"""Between two looks at whether another rank ended."""

_runs = count()


class RankFailed(RuntimeError):
    """Another rank ended the run. The message has its number and its error."""


class _Left(Exception):
    """Another rank left its work; which error that was, the next exchange tells."""


@dataclass(frozen=True)
class _Outcome:
    """How the work of one rank ended: a value, the name of a signal, an error, or none of them where it followed another."""

    value: Any = None
    signal: str | None = None
    error: str | None = None
    pickled: bytes | None = None


# --- ranks ----------------------------------------------------------------------------------------------------------


class Ranks:
    """This process among the ranks of a run. One process alone is rank 0 of 1, and communicates with nobody.

    `gather`, `together`, `first`, `map` and `sum` are collective: every rank calls them, in the same order. The work given
    to them must contain no collective call. When it ends by an exception on one rank, all ranks leave the call by that
    exception (`Interrupted` after a signal).
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._ended = f"nemo_rl/ended/{next(_runs)}"
        self._next_check = 0.0
        self._agreed = False

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks for all."""
        return self.rank == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Returns what `work` returned on each rank, by rank. Values travel pickled."""
        if self.size == 1:
            return [work()]
        failure: BaseException | None = None
        outcome = _Outcome()
        try:
            outcome = _Outcome(value=work())
        except _Left:
            pass
        except Interrupted as interrupted:
            outcome = _Outcome(signal=interrupted.signal)
        except BaseException as error:
            failure, outcome = error, _Outcome(error=_text_of(error), pickled=_pickled(error))
        if outcome.signal or outcome.error:
            self._tell(f"rank {self.rank}: {outcome.error or outcome.signal}")
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome)
        self._agreed = any(other.error or other.signal for other in outcomes)
        if failure is not None:
            raise failure
        for rank, other in enumerate(outcomes):
            if other.error is not None:
                raise _error_of(rank, other)
        for other in outcomes:
            if other.signal is not None:
                raise Interrupted(other.signal)
        return [other.value for other in outcomes]

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
        if self.size > 1 and time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + CHECK_SECONDS
            if self._store.check([self._ended]):
                raise _Left

    def leave(self, error: BaseException) -> BaseException:
        """Tells the other ranks that this one's run ends by `error`; returns what to raise.

        That is `error` itself, or RankFailed where communication broke because another rank had ended before.
        """
        if self.size == 1 or self._agreed:
            return error
        said = self._said()
        if said is None:
            self._tell(f"rank {self.rank}: {_text_of(error)}")
            return error
        broken = type(error) is RuntimeError or isinstance(error, dist.DistError | _Left)
        return RankFailed(f"another rank ended this run, {said}") if broken else error

    def _tell(self, text: str) -> None:
        if self._said() is None:
            self._store.set(self._ended, text)

    def _said(self) -> str | None:
        try:
            return self._store.get(self._ended).decode() if self._store.check([self._ended]) else None
        except (RuntimeError, dist.DistError):  # the rank that kept the store is gone
            return f"rank 0 of {self.size} cannot be reached; see its log"


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
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store())


def _connect(device: torch.device, rank: int, size: int, seconds: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    cure = "see whether all pods or processes started, and whether this one can reach that address"
    store: Any = None
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=seconds))))
        if store.add("nemo_rl/joined", 1) == size:
            store.set("nemo_rl/complete", "")
        store.wait(["nemo_rl/complete"], timedelta(seconds=seconds))
    except (dist.DistError, RuntimeError, ValueError) as error:
        came = f"{store.add('nemo_rl/joined', 0)} of {size} ranks" if store is not None else "no connection"
        raise RuntimeError(
            f"rank {rank} waited {seconds:.0f} s at {where} and found {came}; expected all {size}: {cure}"
        ) from error
    store.set_timeout(timedelta(seconds=COLLECTIVE_SECONDS))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    atexit.register(_disconnect)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _text_of(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _pickled(error: BaseException) -> bytes | None:
    """The error for the other ranks to raise, so that all end alike; None for one that cannot travel."""
    try:
        found = pickle.dumps(error)
        pickle.loads(found)
    except Exception:
        return None
    return found


def _error_of(rank: int, outcome: _Outcome) -> BaseException:
    error: BaseException = RankFailed(f"rank {rank} ended this run: {outcome.error}")
    if outcome.pickled is not None:
        try:
            error = pickle.loads(outcome.pickled)
        except Exception:
            return error
        error.add_note(f"on rank {rank}, which ended this run")
    return error


# --- the model ------------------------------------------------------------------------------------------------------


class ShardedModel:
    """A model whose trained parameters are sharded over the ranks by FSDP2 whenever the optimizer works on them.

    The optimizer's state exists once over all ranks, and frozen parameters stay as they are. For the passes of a step the
    parameters are made whole once, not layer by layer for each micro-batch: rollouts and the packed forward read them
    without FSDP's hooks, ranks may run different numbers of micro-batches, and a step moves each weight and each gradient
    once. During a step each rank therefore holds the whole weights and gradients (8 bytes a trained parameter).
    """

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        """Shards the model in place. Weights must be equal on all ranks."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.mesh = init_device_mesh(device.type, (ranks.size,))
        frozen = {p for p in model.parameters() if not p.requires_grad}
        self.model: Any = fully_shard(model, mesh=self.mesh, reshard_after_forward=False, ignored_params=frozen)
        # Where a path does call the module, its hooks must neither reduce nor reshard: `reduce` does, once a step.
        self.model.set_requires_gradient_sync(False)
        self.model.set_reshard_after_backward(False)
        self.shards = [p for p in self.model.parameters() if p.requires_grad]

    def make_whole(self) -> None:
        """Makes the parameters plain, whole tensors on every rank. Collective unless they are whole already."""
        self.model.unshard()

    def reduce(self) -> None:
        """Leaves the parameters sharded, each with its part of the gradient summed over the ranks.

        A parameter without gradient on all ranks stays without one, as on a single rank.
        """
        from torch.distributed.tensor import DTensor, Partial

        self.model.unshard()
        whole = [p for p in self.model.parameters() if p.requires_grad]
        gradients: list[Tensor | None] = [p.grad for p in whole]
        used = torch.tensor([g is not None for g in gradients], dtype=torch.int32, device=self.mesh.device_type)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        shapes = [p.shape for p in whole]
        for p in whole:
            p.grad = None
        self.model.reshard()
        for i, (shard, is_used) in enumerate(zip(self.shards, used.tolist(), strict=True)):
            if is_used:
                gradient = gradients[i]
                if gradient is None:
                    gradient = torch.zeros(shapes[i], dtype=shard.dtype, device=shard.device)
                partial = DTensor.from_local(gradient, self.mesh, [Partial("sum")], run_check=False)
                shard.grad = partial.redistribute(placements=shard.placements)
            gradients[i] = None
