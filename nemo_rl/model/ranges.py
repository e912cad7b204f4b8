"""Weights that are read from a store by ranges: of each tensor the part that this rank holds, straight into it.

transformers opens files of weights by `safetensors.safe_open` and takes of each tensor the slice that a rank holds; a file that is
left in a store (`storage.left`) is opened by what stands in for that here. Values that are read are compared with plain safetensors
in tests/storage/test_ranges.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from nemo_rl.storage.left import FilesInStore, left_in_store
from nemo_rl.storage.store import PART_BYTES

Key = Any
Bounds = list[tuple[int, int]]


@contextmanager
def weights_from_store(folder: str, *, values: bool = True) -> Iterator[None]:
    """Within it transformers reads files of weights that are left in a store. Raises the StorageError of the first read that failed.

    With `values=False` nothing is read: tensors are on the meta device.
    """
    source = left_in_store(folder)
    if source is None:
        yield
        return
    from transformers import modeling_utils

    found: Any = modeling_utils
    plain = found.safe_open

    def opened(file: Any, *arguments: Any, **options: Any) -> Any:
        place, name = left_in_store(Path(file).parent), Path(file).name
        if place is None or name not in place.files:
            return plain(file, *arguments, **options)
        return WeightsInStore(place, Path(file), values)

    found.safe_open = opened
    try:
        yield
    except BaseException:
        if source.failure is not None:
            raise source.failure from None
        raise
    finally:
        found.safe_open = plain
        source.close()


class WeightsInStore:
    """A file of weights as `safetensors.safe_open` shows it; `path` has its header alone."""

    def __init__(self, place: FilesInStore, path: Path, values: bool = True) -> None:
        content = path.read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        self._tensors: dict[str, Any] = json.loads(content[8:size])
        self._metadata = self._tensors.pop("__metadata__", None)
        self._place, self._name, self._begin, self._values = place, path.name, size, values

    def __enter__(self) -> WeightsInStore:
        return self

    def __exit__(self, *error: object) -> None: ...

    def metadata(self) -> dict[str, str] | None:
        return dict(self._metadata) if self._metadata is not None else None

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> Slice:
        about = self._tensors[name]
        first, last = about["data_offsets"]
        begin = self._begin + first
        found = Slice(self._place if self._values else None, self._name, begin, about["shape"], about["dtype"])
        if found.nbytes != last - first:
            raise ValueError(
                f"the header of {self._name} is damaged: {name} of shape {about['shape']} in {about['dtype']} takes {found.nbytes} bytes, "
                f"and has {last - first}"
            )
        return found

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[...]


class Slice:
    """A tensor of a file, of which a part is read by `[...]`, as of safetensors' own. Without a place it has no values."""

    def __init__(self, place: FilesInStore | None, file: str, begin: int, shape: Sequence[int], dtype: str) -> None:
        from transformers.modeling_utils import str_to_torch_dtype

        self._place, self._file, self._begin = place, file, begin
        self._shape, self._name, self._dtype = list(shape), dtype, str_to_torch_dtype[dtype]

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._name

    @property
    def nbytes(self) -> int:
        return math.prod(self._shape) * self._dtype.itemsize

    def __getitem__(self, key: Key) -> Tensor:
        """The part of the tensor that plain indexing gives: by slices with positive steps, whole numbers and one `...`."""
        bounds, rest = _bounds(key, self._shape)
        device = "cpu" if self._place is not None else "meta"
        found = torch.empty([stop - start for start, stop in bounds], dtype=self._dtype, device=device)
        if self._place is not None and found.numel():
            self._place.each(list(self._reads(self._place, found, bounds, self._shape, self._begin)))
        return found[rest] if any(part != slice(None) for part in rest) else found

    def _reads(
        self, place: FilesInStore, target: Tensor, bounds: Bounds, shape: list[int], begin: int
    ) -> Iterator[Callable[[], None]]:
        """What fills `target`: of a block of this shape that begins there in the file the part within the bounds."""
        item = target.element_size()
        row = math.prod(shape[1:]) * item
        start, stop = bounds[0] if bounds else (0, 1)
        if all(part == (0, size) for part, size in zip(bounds[1:], shape[1:], strict=True)):
            into = memoryview(target.reshape(-1).view(torch.uint8).numpy())
            yield from place.read_into(self._file, begin + start * row, into)
        elif row <= PART_BYTES:
            count = PART_BYTES // row
            for first in range(start, stop, count):
                last = min(first + count, stop)
                part = target[first - start : last - start]
                yield (
                    lambda first=first, last=last, part=part: self._cut(  # type: ignore[misc]
                        place, part, begin + first * row, [last - first, *shape[1:]], bounds[1:]
                    )
                )
        else:
            for i in range(start, stop):
                yield from self._reads(place, target[i - start], bounds[1:], shape[1:], begin + i * row)

    def _cut(self, place: FilesInStore, target: Tensor, begin: int, shape: list[int], bounds: Bounds) -> None:
        """Reads whole rows, of which `target` has a part."""
        size = math.prod(shape) * target.element_size()
        content = bytearray(place.read(self._file, begin, begin + size))
        rows = torch.frombuffer(content, dtype=self._dtype).reshape(shape)
        target.copy_(rows[(slice(None), *(slice(*part) for part in bounds))])


def _bounds(key: Key, shape: list[int]) -> tuple[Bounds, tuple[Any, ...]]:
    """The bounds of each dimension that hold what a key asks for, and the key for what lies within them."""
    parts = list(key) if isinstance(key, tuple) else [key]
    places = [i for i, part in enumerate(parts) if isinstance(part, EllipsisType)]
    place = places[0] if places else len(parts)
    missing = len(shape) - (len(parts) - len(places))
    if missing < 0 or len(places) > 1:
        raise IndexError(f"{key!r} does not fit a tensor of shape {shape}")
    parts[place : place + len(places)] = [slice(None)] * missing
    bounds, rest = Bounds(), []
    for part, size in zip(parts, shape, strict=True):
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            if step < 1:
                raise IndexError(f"{key!r} has the step {step}; expected a positive one")
            bounds.append((start, max(start, stop)))
            rest.append(slice(None, None, step if step > 1 else None))
        else:
            index = range(size)[part]  # IndexError for one that is not there
            bounds.append((index, index + 1))
            rest.append(0)
    return bounds, tuple(rest)
