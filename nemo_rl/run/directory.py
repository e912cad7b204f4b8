"""The directory of a run: which folder a call trains in, whether an earlier run goes on there, and who may write."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from nemo_rl.run.checkpoint import CHECKPOINTS, find_checkpoints
from nemo_rl.run.lease import Lease, guarded

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
TENSORBOARD_DIR = "tensorboard"
RUN_ENTRIES = (CHECKPOINTS, METRICS_FILE, COMPLETIONS_FILE, TENSORBOARD_DIR, RUN_FILE)
"""What a run writes into its directory."""

FORMAT = 2
DIGEST = "sha256:"
"""How a value of the settings begins that stands for something too long to show."""
STREAMED = " of rows "
"""What stands in such a value before the number of rows that were read of a stream."""

_open_here: set[Path] = set()
"""Directories that runs of this process hold: the lock on the file keeps out other processes only."""


class RunBusyError(RuntimeError):
    """Another process, or another call in this one, trains the same run at this moment."""


class Kept(Protocol):
    """Where runs are kept beside their folders (nemo_rl.run.stored.runs.StoredRuns); what is there decides."""

    def uri_of(self, place: Path) -> str:
        """The address that a folder stands for."""

    def look(self, place: Path) -> None:
        """Makes the folder show whether there is a run."""

    def take(self, place: Path, *, begin: bool) -> bool:
        """Takes the run for this process, with what it needs to go on; False where somebody else began it first."""

    def publish(self, place: Path) -> None:
        """Publishes the folder's record."""


@dataclass
class Run:
    """An open run: `dir` is ours until `finish` or `close`. A context manager that closes.

    `resuming`: the directory holds a run of the same settings, which goes on from its newest checkpoint (from the
    start when it has none); `lengthened`: that run had finished, with fewer steps. `notice`: one line for the user
    about what was found, or None. `started`: when the run first began, for templates that write the date.
    `first_total_steps`: the steps that it was to take when it began. `kept`: names of checkpoints that earlier results
    of the run point to, which are never pruned.
    """

    dir: Path
    resuming: bool
    notice: str | None
    settings: dict[str, Any] = field(repr=False)
    total_steps: int
    first_total_steps: int
    started: datetime.datetime
    lengthened: bool = False
    kept: tuple[str, ...] = ()
    _lock: int | None = field(default=None, repr=False)
    lease: Lease | None = field(default=None, repr=False)
    stored: Kept | None = field(default=None, repr=False)

    def finish(self, checkpoint: str | os.PathLike[str] | None = None) -> None:
        """Record that the run is complete, with the checkpoint of its result, and let go of the directory."""
        if checkpoint is not None and (name := Path(checkpoint).name) not in self.kept:
            self.kept = (*self.kept, name)
        self._write("finished")
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

    def _write(self, status: str) -> None:
        record = {
            "format": FORMAT,
            "status": status,
            "sha256": _digest(self.settings),
            "started": self.started.isoformat(),
            "total_steps": self.total_steps,
            "first_total_steps": self.first_total_steps,
            "kept": list(self.kept),
            "settings": self.settings,
        }
        aside = self.lease.staging / RUN_FILE if self.lease else self.dir / f".{RUN_FILE}.tmp"
        with guarded(self.lease):
            with open(aside, "w", encoding="utf-8") as stream:
                json.dump(record, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(self.dir / RUN_FILE)
        if self.stored is not None:
            self.stored.publish(self.dir)


def open_run(
    output_dir: Path,
    settings: Mapping[str, Any],
    resume: Literal["auto", "required", "never"],
    *,
    total_steps: int = 0,
    inside: bool = False,
    started: datetime.datetime | None = None,
    lease: Lease | None = None,
    stored: Kept | None = None,
) -> Run:
    """Take `output_dir`, or a folder beside it, for a run of these settings (JSON-able: the run's identity).

    auto: a run of the same settings goes on if it is unfinished, or finished with fewer than `total_steps`; anything
    else stays as it is, and the run begins beside it. required: ValueError, naming the differences field by field, when
    there is no such run with a checkpoint. never: begins beside whatever is there. A run that begins is recorded to have
    `started` then, default now. The folders beside `out` are
    `out-2`, `out-3`, …; with `inside` (and where `out` is a mount point) `out/run-2`, …. Nothing is ever moved or
    overwritten, and no two calls share a folder: RunBusyError when the run that would go on is being trained. With a
    lease, no lock is asked for: a lost node may keep one for ever. `stored`: the runs are kept there, and the folders stand
    for them.
    """
    directory = check_output_dir(output_dir).resolve()
    settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists, keys are strings
    obstacles: list[str] = []
    done: list[str] = []
    candidates: list[tuple[Path, dict[str, Any]]] = []
    for place in _family(directory, inside, stored):
        if not place.is_dir() or not _holds_run(place):
            break
        record = _read_record(place)
        obstacle = _obstacle(place, record, settings, total_steps, stored)
        if record is not None and obstacle is None:
            candidates.append((place, record))
        elif obstacle is not None:
            same = record is not None and record["sha256"] == _digest(settings)
            (done if same else obstacles).append(obstacle)
    obstacles += done  # a run of these settings says more than one of others
    if resume != "never" and candidates:
        return _go_on(*candidates[-1], settings, total_steps, resume, lease, stored)
    if resume == "required":
        reason = obstacles[-1] if obstacles else "there is no run there; use resume='auto' to begin one"
        if obstacles and not done:
            reason += "; give the same settings, or use resume='auto' to begin a run beside it"
        raise ValueError(f"resume=True cannot go on in {_named(directory, stored)}: {reason}")
    started = started or datetime.datetime.now().astimezone()
    return _begin(directory, inside, settings, total_steps, started, obstacles, lease, stored)


def _go_on(
    place: Path,
    record: dict[str, Any],
    settings: dict[str, Any],
    total_steps: int,
    resume: str,
    lease: Lease | None,
    stored: Kept | None,
) -> Run:
    lock = _take_lock(place) if lease is None else None
    if lock is None and lease is None:
        raise RunBusyError(
            f"the run in {_from_here(place)} is being trained by another call at this moment; wait until it ends, or give "
            "resume=False to begin another one beside it"
        )
    try:
        if stored is not None:
            stored.take(place, begin=False)
        if resume == "required" and not find_checkpoints(place):
            raise ValueError(
                f"resume=True cannot go on in {_named(place, stored)}: the run there has no complete checkpoint; "
                "use resume='auto' to begin it anew"
            )
        record = _read_record(place) or record  # as the holder before left it
        finished = record["status"] == "finished"
        here = _named(place, stored)
        if finished:
            notice = f"the run in {here} had finished its {record['total_steps']} steps; it goes on to {total_steps}"
        else:
            notice = f"continuing the unfinished run in {here}"
            if record["total_steps"] != total_steps:
                notice += f", to {total_steps} steps instead of {record['total_steps']}"
        run = Run(
            place,
            True,
            notice,
            settings,
            total_steps,
            record["first_total_steps"],
            datetime.datetime.fromisoformat(record["started"]),
            finished,
            tuple(record["kept"]),
            lock,
            lease,
            stored,
        )
        run._write("unfinished")
        return run
    except BaseException:
        _unlock(place, lock)
        raise


def _begin(
    directory: Path,
    inside: bool,
    settings: dict[str, Any],
    total_steps: int,
    started: datetime.datetime,
    obstacles: list[str],
    lease: Lease | None,
    stored: Kept | None,
) -> Run:
    """Begin in the first folder of the family that nobody has: another call may take one at the same moment."""
    for place in _family(directory, inside, stored):
        if place.is_dir() and _holds_run(place):
            continue
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"output_dir: the folder {str(place)!r} cannot be made ({error.strerror or error}); give another output_dir"
            ) from error
        lock = _take_lock(place) if lease is None else None
        if lock is None and lease is None:
            obstacles.append(f"{_from_here(place)} is being trained in by another call")
            continue
        try:
            taken = stored is None or stored.take(place, begin=True)
            if not taken or _holds_run(place):  # begun, and perhaps ended, by another call since we looked
                _unlock(place, lock)
                continue
            notice = None
            if place != directory:
                reason = obstacles[-1] if obstacles else f"{_named(directory, stored)} holds another run"
                notice = f"{reason}; this run begins beside it, in {_named(place, stored)}"
            run = Run(place, False, notice, settings, total_steps, total_steps, started, _lock=lock, lease=lease)
            run.stored = stored
            run._write("unfinished")
            return run
        except BaseException:
            with contextlib.suppress(OSError):
                _unlock(place, lock)
            raise
    raise AssertionError("a family of folders has no end")


def _family(directory: Path, inside: bool, stored: Kept | None = None) -> Iterator[Path]:
    """The folders that runs of this output_dir may take, in order. Of those beside it, none that holds other things."""
    if stored is not None:
        stored.look(directory)
    yield directory
    inside = inside or os.path.ismount(directory)
    number = 2
    while True:
        place = directory / f"run-{number}" if inside else directory.with_name(f"{directory.name}-{number}")
        number += 1
        if stored is not None:
            stored.look(place)
        if not os.path.lexists(place) or (
            place.is_dir() and (_holds_run(place) or set(os.listdir(place)) <= {LOCK_FILE})
        ):
            yield place


def _holds_run(place: Path) -> bool:
    return any((place / name).exists() for name in RUN_ENTRIES)


# --- which folder -----------------------------------------------------------------------------------------------------


def default_output_dir(model: Any) -> Path:
    """./outputs/{name}: the last part of the model's name; of a live model, of what it was loaded from or its class.

    The checkpoint of a run gives the name of the run: outputs/tiny/checkpoints/step-00000010 is "tiny".
    """
    if isinstance(model, str | os.PathLike):
        reference = os.fspath(model)
    else:
        loaded_from = getattr(getattr(model, "config", None), "name_or_path", "") or getattr(model, "name_or_path", "")
        reference = str(loaded_from or type(model).__name__)
    parts = [part for part in re.split(r"[/\\]", reference) if part not in ("", ".")]
    if len(parts) >= 3 and parts[-2] == CHECKPOINTS:
        parts = parts[:-2]
    last = re.sub(r"[^\w.-]", "-", parts[-1]) if parts else ""
    return Path("outputs") / (last if last.strip(".") else "model")


def nearby(path: str | os.PathLike[str] | None) -> str:
    """A path as people read it: from the current folder where it lies below that, else whole."""
    if path is None:
        return "None"
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def check_output_dir(given: str | os.PathLike[str]) -> Path:
    """The folder that `output_dir` names, `~` expanded. ValueError for what is no folder and cannot become one."""
    if not isinstance(given, str | os.PathLike):
        raise TypeError(
            f"output_dir={given!r} is of type {type(given).__name__}; expected the path of a folder as text or Path"
        )
    text = os.fspath(given)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"output_dir={given!r} is empty; expected a folder, or None for ./outputs/NAME")
    if re.match(r"[A-Za-z][A-Za-z0-9+]+:/", text):
        raise ValueError(
            f"output_dir={text!r} looks like an address, but is none; expected a folder, or an address such as "
            "s3://bucket/folder; write two slashes after the colon"
        )
    if "\0" in text or any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        raise ValueError(f"output_dir={text[:60]!r} is no name that a folder can have; expected a shorter, plain path")
    directory = Path(text).expanduser()
    for place in (directory, *directory.parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(
                    f"output_dir={text!r}: the folder {str(place)!r} cannot be written by this user; give another output_dir"
                )
            break
        if os.path.lexists(place):
            what = "a link to nothing" if place.is_symlink() and not place.exists() else "a file, not a folder"
            raise ValueError(
                f"output_dir={text!r}: {str(place)!r} is {what}; expected a folder; give another output_dir"
            )
    return directory


def finished_run(output_dir: Path, settings: Mapping[str, Any]) -> Path | None:
    """The folder, `output_dir` or one beside it, that holds a finished run of exactly these settings; None without."""
    for place in _family(Path(output_dir).expanduser().resolve(), inside=False):
        if not place.is_dir() or not _holds_run(place):
            return None
        record = _read_record(place)
        if record and record["status"] == "finished" and record["sha256"] == _digest(json.loads(json.dumps(settings))):
            return place
    return None


def unfinished_runs(output_dir: Path, *, inside: bool = False) -> list[Path]:
    """The folders, `output_dir` and those beside it, that hold an unfinished run."""
    found = []
    for place in _family(Path(output_dir).expanduser().resolve(), inside):
        if not place.is_dir() or not _holds_run(place):
            break
        record = _read_record(place)
        if record is not None and record["status"] == "unfinished":
            found.append(place)
    return found


# --- what is found ----------------------------------------------------------------------------------------------------


def _obstacle(
    directory: Path, record: dict[str, Any] | None, settings: dict[str, Any], total_steps: int, stored: Kept | None
) -> str | None:
    """Why the run that `directory` holds cannot go on with `settings`; None when it can."""
    here = _named(directory, stored)
    if record is None:
        return f"{here} holds no readable {RUN_FILE}"
    if record["sha256"] != _digest(settings):
        return f"{here} holds a run of other settings: {'; '.join(differences(record['settings'], settings))}"
    if record["status"] == "finished" and total_steps <= record["total_steps"]:
        more = f" of {record['total_steps']} steps (a larger max_steps or max_epochs lengthens it)"
        return f"{here} holds a finished run{more if record['total_steps'] else ''}"
    return None


def _named(place: Path, stored: Kept | None) -> str:
    """A folder as messages show it: the address that it stands for, or the path as seen from here."""
    return stored.uri_of(place) if stored is not None else str(_from_here(place))


def _from_here(directory: Path) -> Path:
    """As seen from the current folder, where it lies below that."""
    here = Path.cwd()
    return directory.relative_to(here) if directory.is_relative_to(here) else directory


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One phrase for each field that differs between the settings of two runs, by dotted name.

    Between two algorithms these are the fields that both have.
    """
    old, new = dict(_leaves(there)), dict(_leaves(here))
    phrases = []
    algorithms = {leaves["algorithm"] for leaves in (old, new) if isinstance(leaves.get("algorithm"), str)}
    for name in sorted(old.keys() & new.keys() if len(algorithms) == 2 else old.keys() | new.keys()):
        if name in old and name in new and old[name] == new[name]:
            continue
        if name == "uid" and name in old and name in new:
            phrases.append("it is of another job of that name")
        elif all(isinstance(leaves.get(name), str) and leaves[name].startswith(DIGEST) for leaves in (old, new)):
            phrases.append(f"{name} has changed{_streamed(old[name], new[name])}")
        else:
            phrases.append(f"{name} was {_shown(old, name)}, now {_shown(new, name)}")
    return phrases


def _streamed(old: str, new: str) -> str:
    """Why the rows of a stream are others, although the stream may be the same."""
    (_, was, before), (_, reads, now) = old.partition(STREAMED), new.partition(STREAMED)
    if not (was or reads) or before == now:
        return ""
    return (
        f" ({before or 'all'} rows of a stream were read, now {now or 'all'}: a longer run reads further, and all rows then "
        "have another order; a run of a list of rows, or with streaming=False, can be lengthened)"
    )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(leaves: dict[str, Any], name: str) -> str:
    if name not in leaves:
        return "absent"
    value = leaves[name]
    if isinstance(value, str) and value.startswith(DIGEST):
        return "there"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_record(directory: Path) -> dict[str, Any] | None:
    """run.json; None when it is absent or is not one of ours."""
    try:
        record: dict[str, Any] = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
        intact = record["format"] == FORMAT and record["sha256"] == _digest(record["settings"])
        intact = intact and record["status"] in ("finished", "unfinished") and isinstance(record["kept"], list)
        datetime.datetime.fromisoformat(record["started"])
        int(record["total_steps"]), int(record["first_total_steps"])
        return record if intact else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- one run at a time ------------------------------------------------------------------------------------------------


def _take_lock(directory: Path) -> int | None:
    """Lock the directory for this process; returns the descriptor that holds the lock, None where another one has it.

    A POSIX record lock, not flock(2): it works on NFS, the kernel drops it when the process dies, and workers that
    were forked from a killed trainer do not keep it.
    """
    while True:
        if directory in _open_here:
            return None
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return None
            raise
        if _is_current(descriptor, directory / LOCK_FILE):
            _open_here.add(directory)
            return descriptor
        os.close(descriptor)  # somebody removed the directory between the opening and the locking


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _unlock(directory: Path, descriptor: int | None) -> None:
    if descriptor is None:
        return
    _open_here.discard(directory)
    os.close(descriptor)
