"""Large files that are left in a store: a folder of this machine has the beginning of each, and says where the rest is read.

Who opens such a file as if it were whole finds that it ends too early; nothing in it stands for bytes that are not there. Loads no torch.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemo_rl.errors import StorageError
from nemo_rl.storage.errors import Conflict
from nemo_rl.storage.store import PART_BYTES, Object, Store
from nemo_rl.storage.transfer import RANGES_AT_ONCE

LIST = ".in-store.json"


class FilesInStore:
    """The files of a folder that are left in a store. They are read by ranges, of the version that was found at first."""

    def __init__(self, uri: str, files: Iterable[Object]) -> None:
        self.store, self.files = Store(uri), {file.path: file for file in files}
        self._pool: ThreadPoolExecutor | None = None
        self._guard = threading.Lock()
        self.failure: StorageError | None = None

    def read(self, name: str, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of a file. StorageError where it is another one by now; after one failure every read fails."""
        if self.failure is not None:
            raise self.failure
        file = self.files[name]
        try:
            return self.store.read_range(name, begin, end, file.version)
        except Conflict:
            self.failure = StorageError(f"{self.store.uri}/{name} was written anew while it was read; start again")
            raise self.failure from None
        except StorageError as error:
            self.failure = error
            raise

    def each(self, works: list[Callable[[], None]]) -> None:
        """Does these works, several at once. Raises what the first raised that failed."""
        if len(works) == 1:
            works[0]()
            return
        with self._guard:
            self._pool = self._pool or ThreadPoolExecutor(RANGES_AT_ONCE, thread_name_prefix="nemo-rl-ranges")
        for done in [self._pool.submit(work) for work in works]:
            done.result()

    def close(self) -> None:
        """Ends the threads; they come again with the next work."""
        with self._guard:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool = None

    def read_into(self, name: str, begin: int, target: memoryview) -> list[Callable[[], None]]:
        """What fills `target` with the bytes from `begin` on, range by range, for `each`."""

        def fill(start: int, stop: int) -> None:
            target[start:stop] = self.read(name, begin + start, begin + stop)

        size = target.nbytes
        return [
            lambda start=start: fill(start, min(start + PART_BYTES, size))  # type: ignore[misc]
            for start in range(0, size, PART_BYTES)
        ]


def leave(folder: Path, store: Store, files: list[Object], beginning: Callable[[Object], memoryview]) -> None:
    """Makes `folder` one whose `files` are left in the store, with the `beginning` of each."""
    for file in files:
        _replace(folder / file.path, beginning(file))
    told = {"uri": store.uri, "files": [asdict(file) for file in files]}
    _replace(folder / LIST, json.dumps(told).encode())
    _opened.cache_clear()


def left_in_store(folder: str | os.PathLike[str]) -> FilesInStore | None:
    """The files of this folder that are left in a store; None where all are here."""
    path = Path(folder) / LIST
    try:
        return _opened(path.read_text(encoding="utf-8"))
    except OSError:
        return None


@lru_cache(maxsize=4)
def _opened(text: str) -> FilesInStore:
    told: dict[str, Any] = json.loads(text)
    return FilesInStore(told["uri"], [Object(**file) for file in told["files"]])


def _replace(path: Path, content: memoryview | bytes) -> None:
    """Several ranks of a node write the same."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, path)
