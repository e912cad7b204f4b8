"""Bundles of data: rows as JSON lines, a file, or a small model directory."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl.backends.kubernetes.ship.archive import Archive, pack
from nemo_rl.backends.kubernetes.ship.errors import ShipError
from nemo_rl.job import names
from nemo_rl.worker.bundles import TIMES_UNPACKED

ROWS_FILE = "rows.jsonl"


@dataclass(frozen=True)
class DataBundle:
    """An archive, and the file in it that the job refers to ("" for the whole folder)."""

    archive: Archive
    file: str

    def uri(self, bundle: str) -> str:
        """bundle://name/file, as dataset.path and model take it."""
        return f"bundle://{bundle}/{self.file}".rstrip("/")


def ship_rows(
    rows: Iterable[Mapping[str, Any]], what: str = "the dataset", limit: int = names.MAX_BUNDLE_BYTES
) -> DataBundle:
    """Rows as JSON lines that read back exactly equal. ShipError names the row, column and type that JSON lacks."""
    out = io.BytesIO()
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ShipError(f"{what}, row {number}: found {type(row).__name__}, expected a dict of column to value")
        for column, value in row.items():
            if type(column) is not str:
                raise ShipError(f"{what}, row {number}: found a column named by {type(column).__name__}, expected str")
            _check(value, what, number, column)
        out.write(json.dumps(dict(row), ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass"))
        out.write(b"\n")
        if out.tell() > TIMES_UNPACKED * limit:
            break  # pack says it, with the alternatives
    if not out.tell():
        raise ShipError(f"{what}: found no rows, expected at least one")
    return DataBundle(pack({ROWS_FILE: out.getvalue()}, what, limit), ROWS_FILE)


def _check(value: Any, what: str, row: int, column: str) -> None:
    if value is None or type(value) in (bool, int):
        return
    if type(value) is str:
        if value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value):
            return
        found = "text with half of a surrogate pair"
    elif type(value) is float:
        if math.isfinite(value):
            return
        found = f"the float {value}"
    elif type(value) is list:
        for item in value:
            _check(item, what, row, column)
        return
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ShipError(
                    f"{what}, row {row}, column {column!r}: found a dict with a key of type {type(key).__name__}, "
                    f"which JSON would turn into text; use str keys"
                )
            _check(item, what, row, f"{column}.{key}")
        return
    else:
        kind = type(value)
        found = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    raise ShipError(
        f"{what}, row {row}, column {column!r}: found {found}, expected what JSON holds exactly (str, int, finite "
        f"float, bool, None, list, dict); convert it before, for example by .item(), .tolist(), list() or str()"
    )


def ship_file(path: str | Path, what: str = "the dataset", limit: int = names.MAX_BUNDLE_BYTES) -> DataBundle:
    """One local file of a kind that the trainer reads. ShipError if it is missing, of another kind, or too large."""
    file = Path(path)
    if not file.is_file():
        raise ShipError(f"{what}: found no file at {path}; give an existing file, a hub name, or pvc://claim/path")
    if not file.name.lower().endswith(names.DATA_FILE_NAMES):
        raise ShipError(f"{what}: found {file.name}, expected a file that ends in {', '.join(names.DATA_SUFFIXES)}")
    return DataBundle(pack({file.name: file}, f"{what} {path}", limit), file.name)


def ship_directory(path: str | Path, what: str = "the model", limit: int = names.MAX_BUNDLE_BYTES) -> DataBundle:
    """A local model directory, without hidden files; links are followed. ShipError if it holds no files or too much."""
    folder = Path(path)
    if not folder.is_dir():
        raise ShipError(f"{what}: found no directory at {path}; give an existing one, a hub name, or pvc://claim/path")
    files: dict[str, bytes | Path] = {}
    for place, folders, found in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(found):
            file = Path(place, name)
            if name.startswith(".") or not file.is_file():
                continue
            files[file.relative_to(folder).as_posix()] = file
    if not files:
        raise ShipError(f"{what}: found no files in {path}, expected config.json and weights")
    return DataBundle(pack(files, f"{what} {path}", limit), "")
