"""Folders and files between a store and this machine: in parallel, with bounded memory, checked by size and digest, resumable."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_rl.errors import StorageError
from nemo_rl.storage.errors import Conflict
from nemo_rl.storage.store import PART_BYTES, Store

FILES_AT_ONCE = 2
RANGES_AT_ONCE = 8
_PART = ".part"

Progress = Callable[[int, int], None]
"""Told (bytes that are there, bytes in all)."""


@dataclass(frozen=True)
class File:
    """A file of a folder: its path below it, its size in bytes, and the SHA-256 of its content (empty where not known)."""

    path: str
    size: int
    sha256: str = ""


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checked(entries: Any, what: str) -> list[File]:
    """The files that a manifest names. StorageError for what is none, or names a path that leads out of its folder."""
    try:
        found = [File(str(e["path"]), int(e["size"]), str(e["sha256"])) for e in entries]
    except (TypeError, KeyError, ValueError):
        raise StorageError(f"{what}: found no list of files with path, size and sha256; it was damaged") from None
    for file in found:
        name = PurePosixPath(file.path)
        if name.is_absolute() or not name.parts or ".." in name.parts or file.size < 0 or "\\" in file.path:
            raise StorageError(f"{what} names {file.path!r}, which is not in its folder; somebody else wrote it")
    return found


def upload(store: Store, files: Iterable[tuple[str, Path]], stop: Callable[[], None] = lambda: None) -> list[File]:
    """Writes local files below a store's address; returns each with its digest. `stop` is called between them, to raise."""

    def one(name: str, path: Path) -> File:
        stop()
        size, found = path.stat().st_size, digest(path)
        stop()
        store.write(name, path)
        return File(name, size, found)

    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="nemo-rl-upload") as pool:
        return [done.result() for done in [pool.submit(one, name, path) for name, path in files]]


def download(store: Store, files: list[File], folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Fetches these files into `folder`. What is there and right is kept; half a file goes on where it broke off.

    StorageError for a file of another size or digest than named, and then nothing of that name stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.size for file in files)
    there = sum(p.stat().st_size for file in files for p in _places(folder / file.path) if p.is_file())
    free = shutil.disk_usage(folder).free
    if total - there > free:
        raise StorageError(
            f"{total / 1e9:.1f} GB are to be fetched from {store.uri}, but {folder} has {free / 1e9:.1f} GB free; free some, or "
            "ask for more (on a cluster: resources.ephemeralStorage)"
        )
    begin = 0
    for file in files:
        _fetch(store, file, folder / file.path, lambda size, begin=begin: progress(begin + size, total))  # type: ignore[misc]
        begin += file.size
        progress(begin, total)


def _places(target: Path) -> tuple[Path, Path]:
    return target, target.with_name(f"{target.name}{_PART}")


def _fetch(store: Store, file: File, target: Path, progress: Callable[[int], None]) -> None:
    if target.is_file() and target.stat().st_size == file.size and file.sha256 and digest(target) == file.sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _places(target)[1]
    if part.exists() and (part.is_symlink() or part.stat().st_size > file.size):
        part.unlink()
    for attempt in range(2):
        resumed = part.stat().st_size if part.exists() else 0
        found = store.stat(file.path)
        if found is None:
            raise StorageError(f"{store.uri}/{file.path} is missing")
        if found.size != file.size:
            raise StorageError(f"{store.uri}/{file.path} has {found.size} bytes, but was saved with {file.size}")
        try:
            _ranges(store, file, found.version, part, resumed, progress)
        except Conflict:
            raise StorageError(f"{store.uri}/{file.path} was written anew while it was read; read it again") from None
        if not file.sha256 or digest(part) == file.sha256:
            os.replace(part, target)
            return
        part.unlink()  # what was resumed may be of an older version; what was read in one go is not
        if not resumed or attempt:
            break
    raise StorageError(
        f"{store.uri}/{file.path} is damaged: its content is not the one that was saved (another SHA-256)"
    )


def _ranges(store: Store, file: File, version: str, part: Path, begin: int, progress: Callable[[int], None]) -> None:
    """Reads [begin, size) into `part`, several ranges at once. After an error `part` ends where nothing before is missing."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    done: set[int] = set()
    whole, arrived, lock = begin, begin, threading.Lock()

    def one(start: int) -> int:
        content = store.read_range(file.path, start, min(start + PART_BYTES, file.size), version)
        os.pwrite(descriptor, content, start)
        return start

    def settle(future: Future[int]) -> None:
        nonlocal whole, arrived
        with lock:
            start = future.result()
            done.add(start)
            arrived += min(PART_BYTES, file.size - start)
            while whole in done:
                done.remove(whole)
                whole = min(whole + PART_BYTES, file.size)
            progress(arrived)

    starts = iter(range(begin, file.size, PART_BYTES))
    try:
        with ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="nemo-rl-download") as pool:
            pending = {pool.submit(one, start) for start in islice(starts, RANGES_AT_ONCE)}
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    settle(future)
                    if (start := next(starts, None)) is not None:
                        pending.add(pool.submit(one, start))
    except BaseException:
        os.ftruncate(descriptor, whole)
        raise
    finally:
        os.close(descriptor)
