"""The error of everything that cannot travel to the cluster, and the one that only ends an attempt."""

from __future__ import annotations


class ShipError(ValueError):
    """Code or data of the user cannot travel to the cluster. Says what was found, where, and the cure."""


class MissingModule(Exception):
    """A bundle does not load for want of the module `name`."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class NotSource(Exception):
    """An object cannot be written as source; the next rung of the ladder is tried.

    `what` names it as the user knows it ("global `db` of reward: an open sqlite3.Connection").
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
