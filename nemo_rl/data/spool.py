"""Lists of rows that do not grow in memory: what there is beyond the first thousands lies in a file without a name."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

log = logging.getLogger("nemo_rl")

T = TypeVar("T")

HELD = 8192
"""Items that are held as Python objects before the first are written; a multiple of GROUP."""
GROUP = 64
"""Items that are written, and read again, together."""


def cache_home() -> Path:
    """The folder of nemo-rl in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo-rl"


class Spool(Sequence[T], Generic[T]):
    """Items that are appended one by one and read as of a list: each time another object, equal to the one that was given.

    Items that cannot be pickled, or that no disk takes, stay in memory. The file is gone when the spool is, and when the
    process ends.
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._groups: list[tuple[int, int]] = []
        """Place and size in the file of each group that was written."""
        self._held: list[T] = []
        self._file: Any = None
        self._size = 0
        self._writes = True
        self._last: tuple[int, list[T]] = (-1, [])
        self.extend(items)

    def append(self, item: T) -> None:
        self._held.append(item)
        if self._writes and len(self._held) >= (GROUP if self._groups else HELD):
            self._write()

    def extend(self, items: Iterable[T]) -> None:
        for item in items:
            self.append(item)

    def _write(self) -> None:
        written = 0
        try:
            if self._file is None:
                folder = cache_home()
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            while len(self._held) - written >= GROUP:
                data = pickle.dumps(self._held[written : written + GROUP], pickle.HIGHEST_PROTOCOL)
                if self._file.write(data) != len(data):
                    raise OSError("the disk took a part only")
                self._groups.append((self._size, len(data)))
                self._size += len(data)
                written += GROUP
        except OSError as error:
            log.warning("rows are kept in memory, for they cannot be kept on disk: %s", error)
            self._writes = False
        except Exception:  # rows of the user's own objects, which may fail to be pickled in any way
            self._writes = False
        finally:
            del self._held[:written]

    def __len__(self) -> int:
        return len(self._groups) * GROUP + len(self._held)

    def __iter__(self) -> Iterator[T]:
        for number in itertools.count():
            if number >= len(self._groups):
                break
            yield from self._read(number)
        yield from self._held

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            first = start // GROUP
            groups = [self._read(n) for n in range(first, min(-(-stop // GROUP), len(self._groups)))]
            found = [item for group in groups for item in group]
            begin = len(self._groups) * GROUP
            rest = self._held[max(start - begin, 0) : max(stop - begin, 0)]
            return found[start - first * GROUP : stop - first * GROUP] + rest
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"found index {index}; there are {len(self)} items")
        number, offset = divmod(place, GROUP)
        if number >= len(self._groups):
            return self._held[place - len(self._groups) * GROUP]
        if self._last[0] != number:
            self._last = (number, self._read(number))
        return self._last[1][offset]

    def _read(self, number: int) -> list[T]:
        place, size = self._groups[number]
        group: list[T] = pickle.loads(os.pread(self._file.fileno(), size, place))  # nobody else can write there
        return group

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def like(rows: Sequence[Any]) -> list[Any] | Spool[Any]:
    """An empty collection to append to, for what is made of these rows: a spool where they are one, else a list."""
    return Spool() if isinstance(rows, Spool) else []
