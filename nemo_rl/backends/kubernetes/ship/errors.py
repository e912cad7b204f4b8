"""The error of everything that cannot travel to the cluster, and the one that only ends an attempt."""

from __future__ import annotations


class ShipError(ValueError):
    """Code or data of the user cannot travel to the cluster. Says what was found, where, and the cure."""


class NotSource(Exception):  # noqa: N818 (a step of the ladder, no error to the user)
    """An object cannot be written as source; the next rung of the ladder is tried.

    `what` names it as the user knows it ("global `db` of reward: an open sqlite3.Connection").
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
