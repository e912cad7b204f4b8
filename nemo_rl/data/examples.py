"""Examples as a trainer takes them, and the arrays of numbers in which a data set keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from nemo_rl.data.rows import PromptRow

PARTS = {"grpo": 1, "sft": 1, "dpo": 3}
"""Stretches of tokens of one example: the prompt; the whole text; prompt, chosen and rejected."""


@dataclass(frozen=True)
class PromptExample:
    """A GRPO prompt. `index` is its place among the examples; `ids` end where the completion begins."""

    index: int
    ids: list[int]
    row: PromptRow


@dataclass(frozen=True)
class TextExample:
    """An SFT example. mask[i] is True where token i is to be predicted from those before it; never for i = 0."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class PairExample:
    """A DPO pair. The answers follow the same prompt and end with their end tokens. `index` is its place among the
    examples.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    index: int = field(compare=False)


Example = PromptExample | TextExample | PairExample


@dataclass
class TokenArrays:
    """The tokens of n examples of k parts each, T in all: 4 bytes a token, and 1 more with a mask.

    ids (T,) int32. lengths (n, k) int32. mask (T,) uint8, or None. kept (n,) int64: the row that each was made of.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    mask: NDArray[np.uint8] | None
    kept: NDArray[np.int64]

    def __post_init__(self) -> None:
        self._starts = np.concatenate([[0], np.cumsum(self.lengths.reshape(-1), dtype=np.int64)])

    @classmethod
    def pack(
        cls, parts: Sequence[Sequence[Sequence[int]]], masks: Sequence[Sequence[bool]] | None, k: int
    ) -> TokenArrays:
        """Arrays of examples given as lists of token ids; `masks` of each example as a whole."""
        lengths = np.array([[len(part) for part in example] for example in parts], dtype=np.int32).reshape(-1, k)
        total = int(lengths.sum())
        ids = np.fromiter((i for example in parts for part in example for i in part), np.int32, total)
        mask = None if masks is None else np.fromiter((m for flags in masks for m in flags), np.uint8, total)
        return cls(ids, lengths, mask, np.arange(len(parts), dtype=np.int64))

    def part(self, index: int, number: int) -> list[int]:
        """The token ids of one part of an example."""
        place = index * self.lengths.shape[1] + number
        found: list[int] = self.ids[self._starts[place] : self._starts[place + 1]].tolist()
        return found

    def flags(self, index: int) -> list[bool]:
        """The mask of an example of one part."""
        assert self.mask is not None
        found: list[bool] = self.mask[self._starts[index] : self._starts[index + 1]].astype(bool).tolist()
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together, in memory or in the files that they are mapped from."""
        own = (self.ids, self.lengths, self.mask, self.kept, self._starts)
        return sum(array.nbytes for array in own if array is not None)

    _FILES = ("ids", "lengths", "mask", "kept")

    def save(self, folder: Path) -> None:
        """Writes the arrays as files of a folder that exists."""
        for name in self._FILES:
            if (array := getattr(self, name)) is not None:
                np.save(folder / f"{name}.npy", array)

    @classmethod
    def open(cls, folder: Path) -> TokenArrays:
        """The arrays of such a folder, mapped: processes of a machine share them, and memory holds what is used."""
        mask = folder / "mask.npy"
        ids, lengths, kept = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "lengths", "kept"))
        return cls(ids, lengths, np.load(mask, mmap_mode="r") if mask.exists() else None, kept)

    @classmethod
    def join(cls, arrays: Sequence[TokenArrays]) -> TokenArrays:
        """All of them, one after the other, in memory."""
        masks = [a.mask for a in arrays if a.mask is not None]
        return cls(
            np.concatenate([a.ids for a in arrays]),
            np.concatenate([a.lengths for a in arrays]),
            np.concatenate(masks) if masks else None,
            np.concatenate([a.kept for a in arrays]),
        )


class Examples(Sequence[Any]):
    """The examples of a data set. Each is made of the arrays when it is asked for, so that lists of Python numbers, some
    forty bytes a token, are there for the examples of a step only.
    """

    def __init__(self, algorithm: str, arrays: TokenArrays, rows: Sequence[PromptRow] = ()) -> None:
        """`rows`: of prompts, those that `arrays.kept` counts."""
        self.algorithm = algorithm
        self.arrays = arrays
        self._rows = rows

    def __len__(self) -> int:
        return len(self.arrays.lengths)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"found index {index}; there are {len(self)} examples")
        arrays = self.arrays
        if self.algorithm == "grpo":
            return PromptExample(place, arrays.part(place, 0), self._rows[int(arrays.kept[place])])
        if self.algorithm == "sft":
            return TextExample(arrays.part(place, 0), arrays.flags(place))
        return PairExample(*(arrays.part(place, part) for part in range(3)), index=place)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Iterable) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def longest(self) -> int:
        """Tokens of the longest example: of a pair, of its prompt and its longer answer."""
        lengths = self.arrays.lengths
        whole = lengths[:, 0] + lengths[:, 1:].max(axis=1) if lengths.shape[1] > 1 else lengths[:, 0]
        return int(whole.max(initial=0))

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return int(self.arrays.ids.max(initial=0))
