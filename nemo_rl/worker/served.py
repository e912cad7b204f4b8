"""What the file server of a job serves, wherever it lies: names, contents, refusals. Needs the standard library alone."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol


class Refused(Exception):
    """A request that is answered by an error: its status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Content:
    """What is sent of a file: its size in bytes, a tag that changes with it, and what sends a part and returns how much it sent."""

    size: int
    tag: str
    send: Callable[[socket.socket, int, int], int]


class Served(Protocol):
    """What a server gives: files by their names. Both raise Refused."""

    only: Any

    def manifest(self, name: str) -> Iterator[dict[str, object]]: ...
    def content(self, name: str) -> contextlib.AbstractContextManager[Content]: ...
