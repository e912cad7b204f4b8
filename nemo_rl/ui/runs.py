"""The runs in folders of this machine, read from what training writes there: run.json, metrics.jsonl, completions.jsonl."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import stat
import struct
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_rl.display.phases import PACE_STEPS, Pace
from nemo_rl.job.status import SCORES, duration
from nemo_rl.run.checkpoint import CHECKPOINTS
from nemo_rl.run.directory import COMPLETIONS_FILE, LOCK_FILE, METRICS_FILE, RUN_FILE, TENSORBOARD_DIR, nearby
from nemo_rl.ui.listing import SAMPLES, Details, Json, Listing, Row, SourceError, curves, number, sample, text

DEPTH = 5
"""Folders below the given one in which runs are looked for."""
MAX_FOLDERS = 20_000
MAX_RUNS = 5_000
KEPT_RECORDS = 20_000
"""Of a longer run every second record is let go, and again."""
OPEN_RUNS = 16
"""Runs whose records are kept in memory."""
SHOWN_SETTINGS = ("learning_rate", "batch_size", "seed", "num_generations_per_prompt", "loss_type")
_TAIL_BYTES = 64 * 1024
_SAMPLE_BYTES = 1024 * 1024
_RECENT_SECONDS = 300.0


class Runs:
    """The runs below some folders, as a source of the page. Nothing else on this machine can be read through it."""

    name = "run"

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [folder.expanduser().resolve() for folder in folders]
        self._lock = threading.Lock()
        self._rows: dict[Path, tuple[tuple[Any, ...], Row]] = {}
        self._open: OrderedDict[Path, Records] = OrderedDict()

    def list(self, token: str, namespace: str | None) -> Listing:
        """All runs, the newest first."""
        title = ", ".join(nearby(folder) for folder in self.folders)
        with self._lock:
            found = {place: self._row(key, place) for key, place in self._places()}
            self._rows = {place: self._rows[place] for place in found}
        rows = sorted(found.values(), key=lambda row: (row.created or "", row.name), reverse=True)
        return Listing(title, rows[:MAX_RUNS], more=len(rows) > MAX_RUNS)

    def details(self, token: str, key: str) -> Details:
        """One run. A key that the list does not have is refused, whatever path it spells."""
        with self._lock:
            place = dict(self._places()).get(key)
            if place is None:
                folders = ", ".join(nearby(folder) for folder in self.folders)
                raise SourceError("absent", f"there is no run {text(key, 200)!r} below {folders} any more")
            row = self._row(key, place)
            records = self._open.pop(place, None) or Records(place / METRICS_FILE)
            self._open[place] = records
            while len(self._open) > OPEN_RUNS:
                self._open.popitem(last=False)
            history = records.read()
        newest = history[-1] if history else {}
        completions = _last_records(place / COMPLETIONS_FILE, _SAMPLE_BYTES)[-SAMPLES:]
        found = Details(row, _facts(place, _record(place)))
        found.metrics = {
            name: text(f"{value:.6g}" if isinstance(value, float) else value, 64)
            for name, value in newest.items()
            if value is not None
        }
        found.curves = curves(history)
        found.samples = [sample(record) for record in reversed(completions)]
        if not history:
            found.notes.append("No step is done yet: curves begin with the first one.")
        found.notes.append("The log of a run on this machine is in the terminal or notebook in which it was begun.")
        return found

    def _places(self) -> Iterator[tuple[str, Path]]:
        """Key and folder of each run."""
        for number_, folder in enumerate(self.folders):
            for place in _run_folders(folder):
                yield f"{number_}/{place.relative_to(folder)}", place

    def _row(self, key: str, place: Path) -> Row:
        running = is_locked(place / LOCK_FILE)
        state = (running, *(_state(place / name) for name in (RUN_FILE, METRICS_FILE)))
        known = self._rows.get(place)
        if known is None or known[0] != state or running is None:
            known = (state, _row(f"{self.name}/{key}", place, running))
            self._rows[place] = known
        return known[1]


class Records:
    """The records of one metrics.jsonl, of which only what was added is read again.

    A run that goes on from a checkpoint cuts the file and writes the steps anew: then all of it is read again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reset()

    def _reset(self) -> None:
        self._file: tuple[int, int] | None = None
        self._end = 0
        self._last = b""
        self._records: list[Json] = []

    def read(self) -> list[Json]:
        """The records, each step once, without a torn last line."""
        with _opened(self._path) as stream:
            if stream is None:
                self._reset()
                return []
            about = os.fstat(stream.fileno())
            if self._file != (about.st_dev, about.st_ino) or about.st_size < self._end or not self._goes_on(stream):
                self._reset()
            self._file = (about.st_dev, about.st_ino)
            stream.seek(self._end)
            for line in stream:
                record = _parsed(line)
                if record is None:
                    break
                self._end += len(line)
                self._last = line
                self._records.append(record)
        if len(self._records) > KEPT_RECORDS:
            self._records = self._records[::2]
        return self._records

    def _goes_on(self, stream: Any) -> bool:
        """Whether what was read last is still there."""
        stream.seek(self._end - len(self._last))
        return bool(stream.read(len(self._last)) == self._last)


def is_locked(path: Path) -> bool | None:
    """Whether a process trains there, by its lock, which is not taken for it; None where that cannot be asked here."""
    layouts = {"linux": ("hhqqi4x", 0), "darwin": ("qqihh", 3)}  # struct flock, and where l_type is
    if sys.platform not in layouts:
        return None
    layout, place = layouts[sys.platform]
    with _opened(path) as stream:
        if stream is None:
            return False
        asked = [0] * 5
        asked[place] = fcntl.F_WRLCK
        try:
            told = fcntl.fcntl(stream.fileno(), fcntl.F_GETLK, struct.pack(layout, *asked))
        except OSError:
            return None
    return bool(struct.unpack(layout, told)[place] != fcntl.F_UNLCK)


def _run_folders(top: Path) -> Iterator[Path]:
    """The folders that hold a run, without following links."""
    for seen, (parent, folders, files) in enumerate(os.walk(top)):
        place = Path(parent)
        if RUN_FILE in files or METRICS_FILE in files:
            yield place
        deep = len(place.relative_to(top).parts) >= DEPTH or seen > MAX_FOLDERS
        folders[:] = (
            []
            if deep
            else sorted(f for f in folders if f not in (CHECKPOINTS, TENSORBOARD_DIR) and not f.startswith("."))
        )


def _row(key: str, place: Path, running: bool | None) -> Row:
    record = _record(place)
    settings = record.get("settings") if isinstance(record.get("settings"), dict) else {}
    newest = _last_records(place / METRICS_FILE, _TAIL_BYTES)[-PACE_STEPS:]
    last = newest[-1] if newest else {}
    modified = _modified(place / METRICS_FILE) or _modified(place / RUN_FILE)
    if running is None:
        running = modified is not None and time.time() - modified < _RECENT_SECONDS
    finished = record.get("status") == "finished"
    step = last.get("step")
    total = number(record.get("total_steps"))
    total_steps = int(total) if total else None
    pace = Pace()
    for metrics in newest:
        pace.step(metrics)
    left = pace.left(total_steps - step) if running and total_steps is not None and step is not None else None
    algorithm = settings.get("algorithm")
    score_name = SCORES.get(algorithm) if isinstance(algorithm, str) else None
    score = number(last.get(score_name)) if score_name else None
    model = settings.get("model")
    phase = "Running" if running else "Succeeded" if finished else "Stopped"
    why = "No process trains it now. The same call goes on from its newest checkpoint." if phase == "Stopped" else None
    return Row(
        key=key,
        name=text(place.name, 200),
        where=text(nearby(place.parent), 300),
        phase=phase,
        local=True,
        algorithm=text(algorithm, 64) if algorithm else None,
        model=text(model["name"], 200) if isinstance(model, dict) and model.get("name") else None,
        message=why,
        step=step,
        total_steps=total_steps,
        percent=min(100, 100 * step // total_steps) if step is not None and total_steps else None,
        eta=duration(left) if left is not None else None,
        score=f"{score:.4g}" if score is not None else None,
        score_name=score_name if score is not None else None,
        created=_begun(record) or _moment(modified),
        finished=finished and not running,
    )


def _facts(place: Path, record: Json) -> list[tuple[str, str]]:
    settings = record.get("settings") if isinstance(record.get("settings"), dict) else {}
    facts = [("Folder", text(nearby(place), 400))]
    if "job" in settings and "uid" in settings:
        facts.append(("Fetched from", text(f"job {settings.get('namespace')}/{settings['job']}", 200)))
    for name in SHOWN_SETTINGS:
        if settings.get(name) is not None:
            facts.append((name.replace("_", " ").capitalize(), text(settings[name], 100)))
    return facts


def _record(place: Path) -> Json:
    """run.json, as far as it can be read; {} without."""
    with _opened(place / RUN_FILE) as stream:
        if stream is None:
            return {}
        try:
            found = json.load(stream)
        except (ValueError, RecursionError):
            return {}
    return found if isinstance(found, dict) else {}


def _begun(record: Json) -> str | None:
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
        return datetime.datetime.fromisoformat(record["started"]).astimezone(datetime.UTC).isoformat(timespec="seconds")
    return None


def _last_records(path: Path, size: int) -> list[Json]:
    """The records in the last `size` bytes of a file."""
    with _opened(path) as stream:
        if stream is None:
            return []
        end = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, end - size))
        lines = stream.read(size).splitlines(keepends=True)
    if end > size:
        lines = lines[1:]  # begins in the midst of a line
    return [record for line in lines if (record := _parsed(line)) is not None]


def _parsed(line: bytes) -> Json | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53 else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A plain file to be read, or None: no link and no pipe, which somebody else may have laid there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    with os.fdopen(descriptor, "rb") as stream:
        yield stream if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        about = path.lstat()
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _modified(path: Path) -> float | None:
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def _moment(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
