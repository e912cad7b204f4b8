"""Folders and files between a store and this machine: in parallel, with bounded memory, checked by size and digest, resumable."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_rl.errors import StorageError
from nemo_rl.storage.errors import Conflict, Damaged, NoRanges
from nemo_rl.storage.store import PART_BYTES, Store

logger = logging.getLogger(__name__)

FILES_AT_ONCE = 2
RANGES_AT_ONCE = 8
RANGES_AHEAD = 12
"""Ranges of a download that are asked for or wait for an earlier one: each is in memory, for the digest is made in order."""
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
    """SHA-256 of a file; in few large pieces, for after each of them the interpreter is asked for again."""
    return _digest_of_beginning(path, path.stat().st_size).hexdigest()


def checked(entries: Any, what: str) -> list[File]:
    """The files that a manifest names. Damaged for what is none, or names a path that leads out of its folder."""
    try:
        found = [File(str(e["path"]), int(e["size"]), str(e["sha256"])) for e in entries]
    except (TypeError, KeyError, ValueError):
        raise Damaged(f"{what}: found no list of files with path, size and sha256; it was damaged") from None
    for file in found:
        name = PurePosixPath(file.path)
        if name.is_absolute() or not name.parts or ".." in name.parts or file.size < 0 or "\\" in file.path:
            raise Damaged(f"{what} names {file.path!r}, which is not in its folder; somebody else wrote it")
    return found


def upload(store: Store, files: Iterable[tuple[str, Path]], stop: Callable[[], None] = lambda: None) -> list[File]:
    """Writes local files below a store's address; returns each with its digest, which is made meanwhile. `stop` is called
    between them, to raise."""

    def one(name: str, path: Path) -> File:
        stop()
        size, found = path.stat().st_size, digests.submit(digest, path)
        store.write(name, path)
        return File(name, size, found.result())

    with (
        ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="nemo-rl-digest") as digests,
        ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="nemo-rl-upload") as pool,
    ):
        return [done.result() for done in [pool.submit(one, name, path) for name, path in files]]


def download(store: Store, files: list[File], folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Fetches these files into `folder`. What is there and right is kept; half a file goes on where it broke off.

    A server that gives no ranges gives each file in one go.
    Damaged for a file that is missing or of another size or digest than named, and then nothing of that name stays.
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
            raise Damaged(f"{store.uri}/{file.path} is missing")
        if found.size != file.size:
            raise Damaged(f"{store.uri}/{file.path} has {found.size} bytes, but was saved with {file.size}")
        try:
            read = _ranges(store, file, found.version, part, resumed, progress)
        except NoRanges as error:
            logger.warning("%s; it is read in one go, and from its beginning after each break", error)
            read = store.read_into(file.path, part, progress)
        except Conflict:
            raise StorageError(f"{store.uri}/{file.path} was written anew while it was read; read it again") from None
        if not file.sha256 or read == file.sha256:
            os.replace(part, target)
            return
        part.unlink()  # what was resumed may be of an older version; what was read in one go is not
        if not resumed or attempt:
            break
    raise Damaged(f"{store.uri}/{file.path} is damaged: its content is not the one that was saved (another SHA-256)")


def _ranges(store: Store, file: File, version: str, part: Path, begin: int, progress: Callable[[int], None]) -> str:
    """Reads [begin, size) into `part`, several ranges at once; returns the SHA-256 of the whole where the file names one.

    After an error `part` ends where nothing before is missing.
    """
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    found, whole = _digest_of_beginning(part, begin if file.sha256 else 0), begin

    def one(start: int) -> memoryview:
        content = store.read_range(file.path, start, min(start + PART_BYTES, file.size), version)
        written = 0
        while written < len(content):  # a disk that is nearly full takes a part, and refuses the rest
            written += os.pwrite(descriptor, content[written:], start + written)
        return content

    starts = iter(range(begin, file.size, PART_BYTES))
    pool = ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="nemo-rl-download")
    try:
        ahead = deque(pool.submit(one, start) for start in islice(starts, RANGES_AHEAD))
        while ahead:
            content = ahead.popleft().result()
            if file.sha256:
                found.update(content)
            whole += len(content)
            ahead.extend(pool.submit(one, start) for start in islice(starts, 1))
            progress(whole)
        return found.hexdigest()
    finally:
        pool.shutdown(cancel_futures=True)
        os.ftruncate(descriptor, whole)
        os.close(descriptor)


def _digest_of_beginning(path: Path, size: int) -> Any:
    """SHA-256 of the first bytes of a file, to go on with."""
    found, piece = hashlib.sha256(), memoryview(bytearray(min(size, PART_BYTES)))
    with open(path, "rb", buffering=0) as stream:
        while size > 0 and (count := stream.readinto(piece[:size])):
            found.update(piece[:count])
            size -= count
    return found
