"""The directory of a run: who may write there, whether an earlier run goes on, what steps aside for a new one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemo_rl.run.checkpoint import CHECKPOINTS, find_checkpoints
from nemo_rl.run.lease import Lease, guarded

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
TENSORBOARD_DIR = "tensorboard"
RUN_ENTRIES = (CHECKPOINTS, METRICS_FILE, COMPLETIONS_FILE, TENSORBOARD_DIR, RUN_FILE)
"""What a run writes into its directory. The record comes last: moving entries one by one keeps it until the end."""

FORMAT = 1

_open_here: set[Path] = set()
"""Directories that runs of this process hold: the lock on the file keeps out other processes only."""


class RunBusyError(RuntimeError):
    """Another process, or another run of this one, trains in the same directory."""


@dataclass
class Run:
    """An open run: `dir` is ours until `finish` or `close`. A context manager that closes.

    `resuming`: the directory holds an unfinished run of the same settings, which goes on from its newest checkpoint
    (from the start when it has none). `notice`: one line for the user about what was found, or None.
    """

    dir: Path
    resuming: bool
    notice: str | None
    settings: dict[str, Any] = field(repr=False)
    owns_directory: bool = field(repr=False)
    _lock: int | None = field(repr=False)
    lease: Lease | None = field(default=None, repr=False)

    def finish(self) -> None:
        """Record that the run is complete, and let go of the directory."""
        _write_record(self.dir, self.settings, "finished", self.owns_directory, self.lease)
        self.close()

    def close(self) -> None:
        """Let go of the directory; the run stays unfinished unless `finish` came before."""
        if self._lock is not None:
            _unlock(self.dir, self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_run(
    output_dir: Path,
    settings: dict[str, Any],
    resume: Literal["auto", "required", "never"],
    lease: Lease | None = None,
) -> Run:
    """Take `output_dir` for a run of these settings (JSON-able; two runs are equal when theirs are).

    auto: an unfinished run of the same settings goes on, anything else steps aside. required: ValueError, naming the
    differences field by field, when there is no such run with a checkpoint. never: whatever is there steps aside.
    Stepping aside renames to `<directory>.old-1`, `.old-2`, …: nothing is ever overwritten. RunBusyError when another
    run is active in the directory. With a lease, no lock is asked for: a lost node may keep one for ever.
    """
    directory = Path(output_dir).resolve()
    settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists, keys are strings
    notices: list[str] = []
    while True:
        created = not directory.exists()
        if resume == "required" and created:
            raise ValueError(f'resume="required", but there is no run in {directory}; use resume="auto" to begin one')
        directory.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(directory) if lease is None else None
        try:
            record = _read_record(directory)
            obstacle = _obstacle(directory, record, settings)
            if resume == "required":
                if obstacle is None and not find_checkpoints(directory):
                    obstacle = "the run there has no complete checkpoint"
                if obstacle is not None:
                    raise ValueError(f'resume="required" cannot go on in {directory}: {obstacle}')
            found = any((directory / name).exists() for name in RUN_ENTRIES)
            if found and (resume == "never" or obstacle is not None):
                aside = _step_aside(directory, whole=bool(record and record.get("owns_directory")))
                notices.append(f"{obstacle or 'found a run there'}; moved it to {_from_here(aside)} and begin anew")
                if lock is not None:
                    _unlock(directory, lock)
                continue
            # An empty directory may be one that another caller has just made for the same run: it is the run's own.
            owns = record["owns_directory"] if record else created or os.listdir(directory) == [LOCK_FILE]
            if found:
                notices.append(f"continuing the unfinished run in {_from_here(directory)}")
            else:
                _write_record(directory, settings, "unfinished", owns, lease)
            return Run(directory, found, "; ".join(notices) or None, settings, owns, lock, lease)
        except BaseException:
            if lock is not None:
                with contextlib.suppress(OSError):
                    _unlock(directory, lock)
            raise


# --- what is found --------------------------------------------------------------------------------------------------


def _obstacle(directory: Path, record: dict[str, Any] | None, settings: dict[str, Any]) -> str | None:
    """Why the run that `directory` holds cannot go on with `settings`; None when it can."""
    if record is None:
        return f"{directory} holds no readable {RUN_FILE}"
    if record["status"] == "finished":
        return f"{_from_here(directory)} holds a finished run"
    if record["sha256"] != _digest(settings):
        return f"{_from_here(directory)} holds a run of other settings: {'; '.join(differences(record['settings'], settings))}"
    return None


def _from_here(directory: Path) -> Path:
    """As seen from the current folder, where it lies below that."""
    here = Path.cwd()
    return directory.relative_to(here) if directory.is_relative_to(here) else directory


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """One phrase for each field that differs between the settings of two runs, by dotted name."""
    old, new = dict(_leaves(there)), dict(_leaves(here))
    phrases = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name] != new[name]:
            phrases.append(f"{name} was {_shown(old, name)}, now {_shown(new, name)}")
    return phrases


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(leaves: dict[str, Any], name: str) -> str:
    if name not in leaves:
        return "absent"
    text = json.dumps(leaves[name], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_record(directory: Path) -> dict[str, Any] | None:
    """run.json; None when it is absent or is not one of ours."""
    try:
        record = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
        intact = record["format"] == FORMAT and record["sha256"] == _digest(record["settings"])
        return record if intact and record["status"] in ("finished", "unfinished") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_record(
    directory: Path, settings: dict[str, Any], status: str, owns_directory: bool, lease: Lease | None
) -> None:
    record = {
        "format": FORMAT,
        "status": status,
        "sha256": _digest(settings),
        "owns_directory": owns_directory,
        "settings": settings,
    }
    aside = lease.staging / RUN_FILE if lease else directory / f".{RUN_FILE}.tmp"
    with guarded(lease):
        with open(aside, "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(directory / RUN_FILE)


def _step_aside(directory: Path, whole: bool) -> Path:
    """Move the run in `directory` out of the way; returns where it is now.

    A directory that a run made for itself is renamed as a whole. In one that was there before (a mounted volume,
    the folder of a notebook) only the run's own entries move; out of a mount point nothing can be renamed, so there
    they stay inside.
    """
    mounted = os.path.ismount(directory)
    stem = str(directory / "run") if mounted else str(directory)
    number = 1
    while os.path.lexists(aside := Path(f"{stem}.old-{number}")):
        number += 1
    if whole and not mounted:
        directory.rename(aside)
        return aside
    aside.mkdir()
    for name in RUN_ENTRIES:
        if (directory / name).exists():
            (directory / name).rename(aside / name)
    return aside


# --- one run at a time ----------------------------------------------------------------------------------------------


def _take_lock(directory: Path) -> int:
    """Lock the directory for this process; returns the descriptor that holds the lock.

    A POSIX record lock, not flock(2): it works on NFS, the kernel drops it when the process dies, and workers that
    were forked from a killed trainer do not keep it.
    """
    busy = RunBusyError(f"another run is training in {directory}; wait until it ends or give another output_dir")
    while True:
        if directory in _open_here:
            raise busy
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise busy from None
            raise
        if _is_current(descriptor, directory / LOCK_FILE):
            _open_here.add(directory)
            return descriptor
        os.close(descriptor)  # the directory stepped aside between the opening and the locking


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _unlock(directory: Path, descriptor: int) -> None:
    _open_here.discard(directory)
    os.close(descriptor)
