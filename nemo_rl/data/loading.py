"""Reading rows from wherever they are: the hub, a local file, a list, a `datasets` object, a `DataModule`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nemo_rl.data.files import SUFFIXES, is_local, read_file
from nemo_rl.data.helpsteer import PREFERENCE_COLUMNS
from nemo_rl.data.module import DataModule
from nemo_rl.data.spool import Spool
from nemo_rl.data.tables import rows_of_table
from nemo_rl.errors import DatasetError
from nemo_rl.job.spec import DatasetSpec

# Sets of which nobody wants the whole: only the rows that the run needs are read.
HUGE = frozenset({"nvidia/OpenMathInstruct-2"})

_SLICE = re.compile(r"^(?P<split>[\w.-]+)\[(?P<start>\d*):(?P<stop>\d*)\]$")


@dataclass
class RowStream:
    """Rows that are read no further than asked. `lazy` says that reading everything may be endless or too much, `held` that
    all of them are in memory anyway.
    """

    rows: Iterator[Any]
    lazy: bool
    name: str
    unbounded: bool = False
    position: int = 0
    held: bool = False

    def read(self, count: int | None = None) -> list[dict[str, Any]] | Spool[dict[str, Any]]:
        """The next `count` rows (fewer at the end; None: all that are left). Raises `DatasetError` for no mapping."""
        found: list[dict[str, Any]] | Spool[dict[str, Any]] = [] if self.held else Spool()
        for row in islice(self.rows, count):
            if not isinstance(row, Mapping):
                raise DatasetError(
                    f"found {type(row).__name__} ({repr(row)[:60]}) as row {self.position} of {self.name}; expected "
                    "a mapping "
                    'of column to value such as {"prompt": "2+2=", "answer": "4"}; wrap each row in a dict'
                )
            for column, value in row.items():
                if (broken := half_pair(value)) is not None:
                    raise DatasetError(
                        f"found half of a surrogate pair (such as half an emoji) in column {column!r} of row "
                        f"{self.position} of {self.name}: {broken!r}; expected whole characters; cut the text between "
                        'characters, or repair it with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
                    )
            found.append(row if isinstance(row, dict) else dict(row))
            self.position += 1
        return found

    def ended(self) -> bool:
        """Whether no row is left."""
        first = list(islice(self.rows, 1))
        self.rows = chain(first, self.rows)
        return not first

    def empty(self) -> DatasetError:
        """The error for a source without rows."""
        return DatasetError(
            f"found no rows in {self.name}; expected at least one; check the source, its split and max_rows"
        )

    def without_limit(self) -> DatasetError:
        """The error for reading all of a data set that is known to be huge."""
        return DatasetError(
            f"found no limit for {self.name}, which holds millions of rows; expected one; set max_rows, or a split "
            "such "
            "as train_1M[:10000]"
        )


def half_pair(value: Any) -> str | None:
    """A piece of the first text in a cell that no tokenizer can read, for half of a surrogate pair is in it; else None."""
    if isinstance(value, str):
        if value.isascii():
            return None
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return value[max(0, error.start - 20) : error.start + 1]
        return None
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for item in inner if (found := half_pair(item)) is not None), None)


def load_rows(source: Any, *, needed: int | None = None) -> list[dict[str, Any]]:
    """The rows of a source, unchanged.

    `source` is a `DatasetSpec`; a hub name or the path of a .jsonl, .json, .parquet or .csv file, compressed with gzip or
    not (all cells of a .csv are text, but for conversations written as JSON), or of a folder that `save_to_disk` wrote;
    a list of rows or another iterable of them; a table of pandas, polars or pyarrow; an object of the `datasets`
    library; or a `DataModule`, of which the training rows are read. Of a source that is read as a stream only the first `needed` rows are taken,
    of any other all. Raises `DatasetError` if it cannot be read, is empty, or holds what is no row.
    """
    stream = open_rows(source)
    if needed is None and stream.unbounded:
        raise stream.without_limit()
    rows = stream.read(needed if stream.lazy else None)
    if not rows:
        raise stream.empty()
    return list(rows)


def open_rows(source: Any) -> RowStream:
    """The rows of a source, as in `load_rows`, to be read bit by bit."""
    if isinstance(source, DataModule):
        source.setup()
        return open_rows(source.train_rows())
    if isinstance(source, str):
        source = DatasetSpec(path=source) if is_local(source) else DatasetSpec(name=source)
    if isinstance(source, Path):
        source = DatasetSpec(path=str(source))
    if isinstance(source, DatasetSpec):
        stream = _open_spec(source)
        stream.rows = islice(stream.rows, source.max_rows)
        return stream
    if isinstance(source, Mapping):
        cure = 'pass one of its splits, such as dataset["train"], or wrap a single row in a list'
        if source and all(isinstance(value, list | tuple) and not _is_conversation(value) for value in source.values()):
            cure = "columns become rows by datasets.Dataset.from_dict(...), or [dict(zip(d, values)) for values in zip(*d.values())]"
        raise DatasetError(
            f"found a {type(source).__name__} with the keys {', '.join(map(repr, list(source)[:10]))}; expected a list of "
            f"rows; {cure}"
        )
    if isinstance(source, (list, tuple)):
        _refuse_list_of_sources(source)
        return RowStream(iter(source), lazy=False, name="the list of rows", held=True)
    if (table := rows_of_table(source)) is not None:
        return RowStream(table, lazy=False, name=f"the {type(source).__name__}")
    if hasattr(source, "to_list") and hasattr(source, "column_names"):
        # Formats of arrays are taken off; a function of the user's (with_transform) makes the rows that are meant.
        own = getattr(source, "format", {}).get("type") == "custom"
        return RowStream(iter(source if own else source.with_format(None)), lazy=False, name="the data set")
    if isinstance(source, Iterable):
        # A generator or a streamed data set may never end.
        return RowStream(iter(source), lazy=True, name=f"the {type(source).__name__}")
    raise DatasetError(
        f"found {type(source).__name__} as the data set; expected a hub name, a file, a list of rows, "
        "an iterable of rows, a datasets.Dataset or a DataModule; pass one of them"
    )


def _is_conversation(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(message, Mapping) for message in value)


def _refuse_list_of_sources(source: Sequence[Any]) -> None:
    """Several files or data sets at once, which no list of rows is."""
    first = source[0] if source else None
    if isinstance(first, Path) or (isinstance(first, str) and is_local(first)):
        raise DatasetError(
            f"found a list of files ({first!s}, ...); expected one file or a list of rows; read them one after the "
            "other into one list, or write them into one file"
        )
    if first is not None and not isinstance(first, (str, Mapping)) and hasattr(first, "column_names"):
        raise DatasetError(
            f"found a {type(source).__name__} of {len(source)} data sets; expected one; pass the second as "
            "validation_dataset=, or join them with datasets.concatenate_datasets"
        )


def _open_spec(spec: DatasetSpec) -> RowStream:
    if spec.inline is not None:
        return RowStream(iter(spec.inline), lazy=False, name="the inline rows", held=True)
    if spec.path is not None:
        return RowStream(read_file(spec.path), lazy=False, name=spec.path)
    assert spec.name is not None
    return _open_hub(spec, spec.name)


# --- the hub


def _open_hub(spec: DatasetSpec, name: str) -> RowStream:
    split, keep = spec.split, None
    if name == "nvidia/HelpSteer2" and spec.data_dir == "preference":
        # The hub knows one split here; a column tells training from validation.
        base, bracket, rest = split.partition("[")
        keep = {"train": "train", "validation": "val", "val": "val"}.get(base)
        split = f"train{bracket}{rest}" if keep else split
    cut = _SLICE.match(split)
    streaming = spec.streaming if spec.streaming is not None else name in HUGE and ("[" not in split or bool(cut))
    start, stop = 0, None
    if streaming and cut:
        # A stream knows no slices, so they are taken here.
        split, start = cut["split"], int(cut["start"] or 0)
        stop = int(cut["stop"]) if cut["stop"] else None
    dataset = _load(spec, name, split, streaming)
    rows: Iterator[Any] = islice(_reraised(iter(dataset), name), start, stop)
    if keep is not None:
        rows = (row for row in rows if not row.keys() >= PREFERENCE_COLUMNS or row.get("split", keep) == keep)
    endless = streaming and name in HUGE and stop is None and spec.max_rows is None
    return RowStream(rows, lazy=streaming, name=name, unbounded=endless)


def _load(spec: DatasetSpec, name: str, split: str, streaming: bool) -> Iterable[Any]:
    import datasets

    try:
        rows: Iterable[Any] = datasets.load_dataset(
            name, spec.subset, split=split, data_dir=spec.data_dir, streaming=streaming
        )
        return rows
    except Exception as error:  # The library raises some thirty kinds, many of them undocumented.
        where = ", ".join(
            f"{field} {value!r}"
            for field, value in (("subset", spec.subset), ("split", split), ("data_dir", spec.data_dir))
            if value
        )
        for field, value, said in (
            ("split", split, "Unknown split|Bad split"),
            ("subset", spec.subset, "BuilderConfig .* not found"),
        ):
            if isinstance(error, ValueError) and re.search(said, str(error)):
                raise DatasetError(
                    f"found no {field} {value!r} in the data set {name!r}: {error}; set {field} to one of these"
                ) from error
        if Path(name).is_dir():
            files = "no file of data" if not any(Path(name).rglob("*.*")) else f"{type(error).__name__}: {error}"
            raise DatasetError(
                f"found a folder at {name} that cannot be read as a data set ({files}); expected a {SUFFIXES} file, or a folder "
                "of such files or one that save_to_disk wrote; name one of its files"
            ) from error
        raise DatasetError(
            f"found no way to load {name!r} from the hub ({where}): {type(error).__name__}: {error}; expected the "
            "name of a data set "
            "on the hub or the path of a local file; check the name, subset and split, the network, and HF_TOKEN "
            "for a gated data set"
        ) from error


def _reraised(rows: Iterator[Any], name: str) -> Iterator[Any]:
    """The rows of a data set; what goes wrong while they are streamed is a `DatasetError` too."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DatasetError(
                f"found {name!r} unreadable midway: {type(error).__name__}: {error}; expected rows; check the "
                "network and run "
                "the same call again"
            ) from error
        yield row
