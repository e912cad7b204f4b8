"""Runs that are kept in an object store: this machine works in a folder, and what is whole there is published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rl.errors import StorageError
from nemo_rl.job import uris
from nemo_rl.run.stored.checkpoints import PublishedCheckpoints
from nemo_rl.run.stored.head import HEAD, head_of
from nemo_rl.run.stored.lease import HeadLease, replace_file
from nemo_rl.run.stored.writer import Writer
from nemo_rl.storage.cache import runs_folder
from nemo_rl.storage.store import Store


@dataclass
class StoredRuns:
    """The runs at one address. One of them is taken; `folder` stands in for the address on this machine.

    One process of each node carries files (`carries`), the first rank writes the head.
    """

    uri: str
    writer: Writer = field(default_factory=Writer)
    folder: Path = Path()
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    carries: bool = field(default_factory=lambda: os.environ.get("LOCAL_RANK", "0") == "0")
    say: Callable[[str], None] = lambda sentence: None

    def __post_init__(self) -> None:
        if (wrong := uris.problem(self.uri)) is not None:
            raise ValueError(f"output {self.uri!r}: {wrong}")
        self.uri = self.uri.rstrip("/")
        parent, _, self._name = self.uri.rpartition("/")
        if parent.endswith("/"):  # s3://bucket alone
            raise ValueError(
                f"output {self.uri!r} is a whole bucket; expected a folder in it, such as {self.uri}/my-run"
            )
        self._parent = parent
        self._lock: int | None = None
        self._taken: tuple[HeadLease, PublishedCheckpoints] | None = None

    # --- where it is

    def open(self, root: Path | None = None) -> Path:
        """Takes a working folder on this machine that no other process has; returns it. Proves that the store can be used."""
        self.prove()
        if root is None:
            root, self._lock = runs_folder(self.uri)
        self.folder = root / self._name
        return self.folder

    def prove(self) -> None:
        """StorageError, in words, unless objects can be written there, also conditionally."""
        Store(self.uri, patience=min(30.0, Store(self.uri).patience)).probe()

    def uri_of(self, place: Path) -> str:
        """The address that a folder of this machine stands for."""
        below = place.relative_to(self.folder.parent).as_posix()
        return uris.joined(self._parent, below)

    @property
    def place(self) -> Path | None:
        """The folder of this machine that stands for the run that was taken; None before."""
        return self._taken[0].place if self._taken is not None else None

    @property
    def lease(self) -> HeadLease:
        """The head of the run that was taken. StorageError before."""
        return self._opened()[0]

    @property
    def checkpoints(self) -> PublishedCheckpoints:
        """The checkpoints of the run that was taken. StorageError before."""
        return self._opened()[1]

    def _opened(self) -> tuple[HeadLease, PublishedCheckpoints]:
        if self._taken is None:
            raise StorageError(f"no run is open at {self.uri}")
        return self._taken

    def _lease_of(self, place: Path) -> HeadLease:
        return HeadLease(self.uri_of(place), place, self.writer, self.say)

    def _hold(self, lease: HeadLease) -> None:
        self._taken = lease, PublishedCheckpoints(lease, self.rank, self.carries)

    # --- what decides which run it is

    def look(self, place: Path) -> None:
        """Makes `place` show whether there is a run at its address: run.json is there, or the folder is empty."""
        if place == self.place:
            return
        found = Store(self.uri_of(place)).read(HEAD)
        if found is None:
            shutil.rmtree(place, ignore_errors=True)
            return
        record = head_of(found[0], self.uri_of(place)).get("record")
        if record is None:  # somebody begins there, or was killed before it was a run
            shutil.rmtree(place, ignore_errors=True)
            return
        place.mkdir(parents=True, exist_ok=True)
        replace_file(place / HEAD, json.dumps(record).encode())

    def take(self, place: Path, *, begin: bool) -> bool:
        """Takes the run at this address for this process, and brings what it needs to go on. False: it is to `begin`, and
        somebody else began there first.

        RunHeldError where a living process writes there, LeaseLost where a later attempt of the job does.
        """
        lease = self._lease_of(place)
        if not lease.take(begin=begin):
            return False
        self._hold(lease)
        lease.fence_small_files(begin=begin)
        if not begin:
            self.checkpoints.tidy()
            self.checkpoints.forget_local()
            self.checkpoints.bring(self.checkpoints.newest())
        lease.keep()
        return True

    # --- the run that was taken

    def publish(self, place: Path) -> None:
        """Publishes run.json of the folder, with the small files as they are."""
        if self.rank == 0:
            self.lease.publish(json.loads((place / HEAD).read_text(encoding="utf-8")))

    def leave_note(self, name: str, value: Any) -> None:
        """Keeps a value beside the record of the run that was let go. LeaseLost where another process has taken it since."""
        self.lease.leave_note(name, value)

    def check(self) -> None:
        """Raises LeaseLost once another process has taken the run."""
        self.lease.check()

    def close(self) -> None:
        """Publishes what is left, and lets the run go. What cannot be published any more is said, not raised."""
        if self._taken is not None:
            self.checkpoints.end()
            self.lease.let_go()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- several nodes

    def told(self) -> dict[str, Any]:
        """What processes on other nodes need to carry their part."""
        lease = self.lease
        return {
            "place": str(lease.place),
            "folder": str(self.folder),
            "generation": lease.generation,
            "head": lease.head,
        }

    def follow(self, told: dict[str, Any], node: int, nodes: int, root: Path | None) -> tuple[int, str | None]:
        """Joins what the first rank took; returns the number of this node and, where this rank carries, its folder.

        On another node the newest checkpoint is fetched, into a folder of that node.
        """
        if self.rank != 0:
            place, self.folder = Path(told["place"]), Path(told["folder"])
            lease = self._lease_of(place)
            lease.generation, lease.head = told["generation"], told["head"]
            self._hold(lease)
            if self.carries and node > 0:
                below = place.relative_to(self.folder.parent)
                if root is None:
                    root, self._lock = runs_folder(self.uri)
                self.folder, place = root / self.folder.name, root / below
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                lease.place = place
                self.checkpoints.bring(self.checkpoints.newest())
        self.checkpoints.node, self.checkpoints.nodes = node, nodes
        return node, str(self.place) if self.carries else None

    def settle_in(self, places: list[tuple[int, str | None]]) -> Path:
        """The folder of this rank's node, of those that all ranks told."""
        here = next(Path(place) for node, place in places if node == self.checkpoints.node and place is not None)
        self.lease.place = here
        self.folder = self.folder if here.is_relative_to(self.folder) else self._parent_of(here)
        return here

    def _parent_of(self, place: Path) -> Path:
        """The folder that stands for the address itself: `place` is it, or one beside or within it."""
        return place.parent if place.parent.name == self._name else place.parent / self._name
