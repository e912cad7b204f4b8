"""`DataModule`: the user's own way to bring training and validation rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


class DataModule:
    """Subclass it, return rows in any accepted shape, and pass an instance as the data set.

    `setup` is called once, before the rows are asked for; downloads and preprocessing belong there.
    """

    def setup(self) -> None:
        """Prepare whatever the rows need. Does nothing unless overridden."""

    def train_rows(self) -> Iterable[Row]:
        """The training rows: mappings of column to value."""
        raise NotImplementedError(
            f"{type(self).__name__} has no train_rows(); define it to return an iterable of rows (mappings)"
        )

    def validation_rows(self) -> Iterable[Row] | None:
        """The validation rows, or None where there are none."""
        return None


def train_and_validation(source: Any) -> tuple[Any, Any | None]:
    """Split a source into what is trained on and what is only evaluated.

    Of a `DataModule`, calls `setup()` once and returns (train rows, validation rows or None); anything else is
    returned unchanged as (source, None).
    """
    if not isinstance(source, DataModule):
        return source, None
    source.setup()
    return source.train_rows(), source.validation_rows()
