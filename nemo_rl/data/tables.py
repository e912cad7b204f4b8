"""Rows of tables that other libraries hold in memory: pandas, polars, pyarrow. None of them is imported here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from nemo_rl.errors import DatasetError


def rows_of_table(source: Any) -> Iterator[dict[str, Any]] | None:
    """The rows of a pandas or polars data frame or a pyarrow table; None for anything else.

    What pandas writes for a missing value (NaN, NaT, NA) becomes None; an array in a cell becomes a list. Columns
    whose names are no text are named by their text; an index that has a name is a column too. Raises `DatasetError`
    for two columns of one name, of which a row could hold only one.
    """
    library = type(source).__module__.partition(".")[0]
    if library == "pandas" and hasattr(source, "itertuples") and hasattr(source, "columns"):
        named = {name for name in source.index.names if name is not None}
        if named and not named & set(source.columns):
            source = source.reset_index()
        names = _each_once([str(column) for column in source.columns])
        return (
            dict(zip(names, map(_cell, values), strict=True)) for values in source.itertuples(index=False, name=None)
        )
    if library == "polars" and hasattr(source, "iter_rows"):
        return (row for row in source.iter_rows(named=True))
    if library == "pyarrow" and hasattr(source, "to_batches"):
        _each_once(source.schema.names)
        return (row for batch in source.to_batches() for row in batch.to_pylist())
    return None


def _each_once(names: list[str]) -> list[str]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DatasetError(
            f"found the column {twice!r} twice in the table; expected each name once; rename one of them"
        )
    return names


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if type(value).__name__ in ("NaTType", "NAType"):
        return None
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_cell(item) for item in value]
    if isinstance(value, dict):
        return {key: _cell(item) for key, item in value.items()}
    return value
