"""Checkpoints: directories that `from_pretrained` loads, the trainer's state beside the weights, complete or absent.

    checkpoints/step-00000100/   config, model.safetensors, tokenizer     what AutoModelForCausalLM loads, in the model's dtype
                  adapter/       LoRA weights, when the run trains adapters (the model beside it is merged)
                  trainer_state/ optimizer tensors, and the fp32 weights of a model in a narrower dtype, by
                                 torch.distributed.checkpoint
                  README.md      the model card, and nemo_rl.json: the same for programs (nemo_rl.run.card)
                  state.json     written last: step, metric, the trainer's own state, name and size of every file
    checkpoints/latest, best     relative symbolic links

This module loads no torch until it saves or loads tensors, so a client can look for checkpoints with it.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.errors import LeaseLost
from nemo_rl.run.lease import REPLACED, Lease, guarded
from nemo_rl.run.processes import is_distributed, is_rank_zero

if TYPE_CHECKING:
    from nemo_rl.run.stored.runs import StoredRuns

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
TRAINER_STATE = "trainer_state"
LATEST = "latest"
BEST = "best"
FORMAT = 1
_STEP_PREFIX = "step-"
_UNFINISHED = ".tmp-"
_REPLACED = ".replaced-"
NO_TEXTS: Mapping[str, str] = {}


class CorruptCheckpointError(ValueError):
    """A directory that looks like a checkpoint, but is not a complete one. The message says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `state` is what the trainer gave to `save`; a higher `metric` is better."""

    path: Path
    step: int
    state: dict[str, Any]
    metric: float | None
    optimizer_groups: list[dict[str, Any]] = field(default_factory=list, repr=False)


# --- finding and checking -------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in directory `path`; raises CorruptCheckpointError when a file is missing or has another size."""
    try:
        record = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise CorruptCheckpointError(
                f"{path} has format {record['format']}; this version of nemo-rl reads {FORMAT}"
            )
        checkpoint = Checkpoint(path, record["step"], record["state"], record["metric"], record["optimizer_groups"])
        files: dict[str, int] = record["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise CorruptCheckpointError(f"{path / STATE_FILE} is missing or unreadable ({error!r})") from None
    for name, size in files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            raise CorruptCheckpointError(f"{path / name} is missing") from None
        if found != size:
            raise CorruptCheckpointError(f"{path / name} has {found} bytes, but was saved with {size}")
    return checkpoint


def find_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, by rising step. Incomplete ones are skipped with a warning."""
    found = []
    for path in _step_directories(run_dir / CHECKPOINTS):
        try:
            found.append(read_checkpoint(path))
        except CorruptCheckpointError as error:
            logger.warning("skipped a checkpoint that is not complete: %s", error)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def best_of(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the highest metric (the first to reach it); where none has a metric, the latest."""
    measured = [c for c in checkpoints if c.metric is not None]
    if measured:
        return max(measured, key=lambda c: (c.metric, -c.step))
    return max(checkpoints, key=lambda c: c.step, default=None)


def _step_directories(root: Path) -> list[Path]:
    return [path for path in root.glob(f"{_STEP_PREFIX}*") if path.is_dir()]


# --- the store of one run -------------------------------------------------------------------------------------------


class CheckpointStore:
    """Writes and prunes the checkpoints of one run. Only the process that holds the run makes one."""

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        *,
        always: Collection[str] = (),
        lease: Lease | None = None,
        stored: StoredRuns | None = None,
    ) -> None:
        """Keep the `keep` newest checkpoints, the best one besides, and those whose names are in `always`. With a lease,
        all is written and moved by it. `stored`: what is whole in the folder is published there, in the background."""
        if keep < 1:
            raise ValueError(f"found keep={keep}; at least one checkpoint must be kept")
        self.run_dir = Path(run_dir)
        self.root = self.run_dir / CHECKPOINTS
        self.keep = keep
        self.lease = lease
        self.stored = stored
        self.always = frozenset(always)
        if is_rank_zero():
            self._clear_leftovers()
            self._point_out()
            if self.stored is not None:
                self.stored.checkpoints.finish_save(self.keep, self.always)

    def save(
        self,
        step: int,
        *,
        model: Any,
        tokenizer: Any,
        optimizer: Any = None,
        state: Mapping[str, Any],
        metric: float | None = None,
        texts: Mapping[str, str] = NO_TEXTS,
    ) -> Path:
        """Save step `step`, move `latest` and `best`, remove what is over the limit; returns the checkpoint's path.

        `state` must be JSON-able, `texts` are further files by name. A metric that is not finite counts as none. A checkpoint of the same step is
        replaced. With several ranks every rank calls it.
        """
        path = self.root / f"{_STEP_PREFIX}{step:08d}"
        parts = {"model": model, "tokenizer": tokenizer, "optimizer": optimizer}
        if self.stored is not None:
            self.stored.checkpoints.wait()
        write_checkpoint(
            path, step, **parts, state=state, metric=metric, texts=texts, lease=self.lease, here=self._writes_here()
        )
        if self.stored is not None:
            finite = metric if metric is not None and math.isfinite(metric) else None
            self.stored.checkpoints.saved(path, step, finite, self.keep, self.always)
        if is_rank_zero():
            self._prune()
        return path

    def _writes_here(self) -> bool | None:
        """Whether this rank makes the folder on its node: with a store each node has its own."""
        return self.stored.carries if self.stored is not None else None

    def try_out(self, *, model: Any, tokenizer: Any, optimizer: Any, state: Mapping[str, Any]) -> None:
        """Save a checkpoint aside, and remove it. With several ranks every rank calls it."""
        path = self.root / f"{_UNFINISHED}first"
        parts = {"model": model, "tokenizer": tokenizer, "optimizer": optimizer}
        here = self._writes_here()
        write_checkpoint(path, 0, **parts, state=state, lease=self.lease, here=here)
        if is_rank_zero() or here:
            shutil.rmtree(path)
        _barrier()

    def checkpoints(self) -> list[Checkpoint]:
        """All complete checkpoints, by rising step."""
        return find_checkpoints(self.run_dir)

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None."""
        return max(self.checkpoints(), key=lambda c: c.step, default=None)

    def best(self) -> Checkpoint | None:
        """The complete checkpoint with the highest metric; without metrics the newest; or None."""
        if self.stored is not None:
            self.stored.checkpoints.wait()
            name = self.stored.checkpoints.best()
            brought = self.stored.checkpoints.bring([name, *self.stored.checkpoints.newest()]) if name else None
            return read_checkpoint(self.root / brought) if brought else None
        return best_of(self.checkpoints())

    def settle(self) -> None:
        """Until what was saved is where it is kept. Raises what went wrong there."""
        if self.stored is not None:
            self.stored.checkpoints.wait()

    def shown(self, path: Path) -> str:
        """A checkpoint as people find it: its address in the store, or its path."""
        return (self.stored.checkpoints.checkpoint_uri(path.name) if self.stored is not None else None) or str(path)

    def latest_path(self) -> Path | None:
        checkpoint = self.latest()
        return checkpoint.path if checkpoint else None

    def best_path(self) -> Path | None:
        checkpoint = self.best()
        return checkpoint.path if checkpoint else None

    def load_model_weights(self, checkpoint: Checkpoint, model: Any) -> None:
        """Copy the checkpoint's weights into `model`, in place and exactly; into a LoRA model its adapter alone."""
        load_into(checkpoint, model)

    def load_optimizer(self, checkpoint: Checkpoint, optimizer: Any) -> None:
        """Bring back the optimizer's state, in place and exactly; works with another number of ranks than saved it."""
        from nemo_rl.run.checkpoint_tensors import load_optimizer

        load_optimizer(checkpoint.path / TRAINER_STATE, checkpoint.optimizer_groups, optimizer)

    def _prune(self) -> None:
        best = self._point_out()
        for checkpoint in self.checkpoints()[: -self.keep]:
            if best and checkpoint.path != best.path and checkpoint.path.name not in self.always:
                _remove(checkpoint.path, self.lease)

    def _point_out(self) -> Checkpoint | None:
        """Moves `latest` and `best` to what they are; returns the best one."""
        complete = self.checkpoints()
        best = best_of(complete)
        if best is not None:
            _point(self.root / LATEST, complete[-1].path.name, self.lease)
            _point(self.root / BEST, best.path.name, self.lease)
        return best

    def _clear_leftovers(self) -> None:
        """What a killed save left: half-written directories go, a checkpoint that was about to be replaced returns."""
        kept = self.lease.staging.glob(f"{REPLACED}*") if self.lease else ()
        for path in kept:
            original = self.root / path.name.removeprefix(REPLACED)
            if original.exists():
                shutil.rmtree(path)
            elif self.lease:
                self.root.mkdir(parents=True, exist_ok=True)
                self.lease.publish(path, original)
        for path in self.root.glob(f"{_REPLACED}*"):
            original = path.with_name(path.name.removeprefix(_REPLACED))
            if original.exists():
                shutil.rmtree(path)
            else:
                path.rename(original)
        for path in self.root.glob(f"{_UNFINISHED}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _point(link: Path, target: str, lease: Lease | None) -> None:
    """Make `link` name its sibling `target`, in one rename. A file with the name where links are not supported."""
    aside = lease.staging / link.name if lease else link.with_name(f"{_UNFINISHED}{link.name}")
    with guarded(lease):
        aside.unlink(missing_ok=True)
        try:
            aside.symlink_to(target)
        except OSError:
            aside.write_text(target + "\n", encoding="utf-8")
        aside.replace(link)
    _fsync(link.parent)


def _remove(path: Path, lease: Lease | None) -> None:
    """Remove a checkpoint; a kill in between leaves a leftover, never a half checkpoint under its name."""
    aside = lease.staging / f"old-{path.name}" if lease else path.with_name(f"{_UNFINISHED}old-{path.name}")
    with guarded(lease):
        path.rename(aside)
        shutil.rmtree(aside)


# --- writing --------------------------------------------------------------------------------------------------------


def write_checkpoint(
    path: Path,
    step: int,
    *,
    model: Any,
    tokenizer: Any,
    optimizer: Any = None,
    state: Mapping[str, Any],
    metric: float | None = None,
    texts: Mapping[str, str] = NO_TEXTS,
    lease: Lease | None = None,
    here: bool | None = None,
) -> Path:
    """Write one checkpoint as directory `path`: a kill at any moment leaves the whole of it, or what was there before.

    Weights are saved in the dtype that the model was loaded with (`nemo_rl.run.dtypes`), else in that which they have; what
    a narrower dtype leaves out is in the optimizer's state. `texts`: further files by name. With several ranks every rank calls it. `here`: nodes share no
    folder, and this rank makes the one of its node; default the first rank makes it for all.
    """
    from nemo_rl.run.checkpoint_tensors import optimizer_groups, save_model, save_optimizer

    path = Path(path)
    if path.exists() and not any((path / name).exists() for name in (STATE_FILE, TRAINER_STATE)):
        raise FileExistsError(f"{path} exists and is not a checkpoint; give a path that does not exist")
    aside = lease.staging / path.name if lease else path.with_name(f"{_UNFINISHED}{path.name}")
    groups = optimizer_groups(optimizer)
    if metric is not None and not math.isfinite(metric):
        metric = None
    record = {"format": FORMAT, "step": step, "metric": metric, "state": dict(state), "optimizer_groups": groups}
    json.dumps(record)  # what is not JSON-able fails here, before gigabytes are written
    makes = is_rank_zero() if here is None else here
    try:
        if makes:
            if aside.exists():
                shutil.rmtree(aside)
            aside.mkdir(parents=True)
        _barrier()
        save_model(aside, model)
        save_optimizer(aside / TRAINER_STATE, optimizer, model)
        _barrier()
        if is_rank_zero():
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            for name, text in texts.items():
                # half of a surrogate pair, which no file can hold, is written as \\uXXXX
                (aside / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        if makes:
            _seal(aside, record)
            _publish(aside, path, lease)
        _barrier()
    except BaseException as error:
        if lease and isinstance(error, Exception) and not isinstance(error, LeaseLost) and not lease.held():
            raise lease.lost() from error
        written = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file()) if aside.is_dir() else 0
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        if makes:
            shutil.rmtree(aside, ignore_errors=True)
        cause = no_room(error)
        if cause is not None:
            size = _bytes_of(model, optimizer)
            full = OSError(
                cause,
                f"no room for the checkpoint of step {step} in {path.parent}: it takes about {_size(size)}, {_size(written)} "
                f"could be written and {_size(free)} of the disk are free ({os.strerror(cause)}); free some, lower "
                "keep_checkpoints, or give another output_dir",
            )
            full.add_note(f"while saving the checkpoint of step {step} to {path}")
            raise full from None
        error.add_note(f"while saving the checkpoint of step {step} to {path}")
        raise
    return path


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def no_room(error: BaseException) -> int | None:
    """The error number if a disk, a quota or a limit on files is at the root of an error, however libraries wrap it."""
    pending, seen = [error], set()
    while pending:
        found = pending.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno in _NO_ROOM:
            return found.errno
        for number in _NO_ROOM:  # safetensors and torch tell in words only
            if f"os error {number})" in str(found) or os.strerror(number) in str(found):
                return number
        failures = getattr(found, "failures", None)  # of torch.distributed.checkpoint: by rank, with tracebacks
        pending += [item[0] for item in failures.values()] if isinstance(failures, dict) else []
        pending += [inner for inner in (found.__cause__, found.__context__) if inner is not None]
    return None


def _bytes_of(model: Any, optimizer: Any) -> int:
    """What a checkpoint takes: all weights, and of each parameter that the optimizer has two moments, and itself if the
    weights are saved in a narrower dtype."""
    from nemo_rl.run.dtypes import dtypes_of

    dtypes = dtypes_of(model)
    saved = {name: dtypes.saved(name) or p.dtype for name, p in model.named_parameters()}
    weights = sum(p.numel() * saved[name].itemsize for name, p in model.named_parameters())
    each = 12 if dtypes.narrow else 8
    moments = sum(each * p.numel() for group in optimizer.param_groups for p in group["params"]) if optimizer else 0
    return int(weights + moments)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _seal(aside: Path, record: dict[str, Any]) -> None:
    """Bring every file to the disk, then write state.json, which lists them."""
    entries = sorted(aside.rglob("*"))
    files = {str(p.relative_to(aside)): p.stat().st_size for p in entries if p.is_file()}
    for entry in entries:
        _fsync(entry)
    with open(aside / STATE_FILE, "w", encoding="utf-8") as stream:
        json.dump({**record, "files": files}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    _fsync(aside)


def _publish(aside: Path, path: Path, lease: Lease | None) -> None:
    """Rename `aside` to `path`; one that is there already steps aside first and returns if we are killed between."""
    replaced = lease.staging / f"{REPLACED}{path.name}" if lease else path.with_name(f"{_REPLACED}{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with guarded(lease):
        if path.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            path.rename(replaced)
        aside.rename(path)
    _fsync(path.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- loading --------------------------------------------------------------------------------------------------------


def load_into(checkpoint: Checkpoint, model: Any, optimizer: Any = None) -> None:
    """Bring back weights and, where an optimizer is given, its state: in place and exactly.

    Raises ValueError when they are not of the model or the optimizer that was saved, and for files that hold anything
    but tensors: nothing in them is run.
    """
    from nemo_rl.run.checkpoint_tensors import load_model, load_optimizer

    load_model(checkpoint.path, model)
    if optimizer is not None:
        load_optimizer(checkpoint.path / TRAINER_STATE, checkpoint.optimizer_groups, optimizer)


# --- ranks ----------------------------------------------------------------------------------------------------------


def _barrier() -> None:
    if is_distributed():
        import torch.distributed as dist

        dist.barrier()
