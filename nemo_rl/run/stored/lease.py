"""The write lease of a run in an object store: its head is swapped by the one process that holds it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_rl.errors import LeaseLost, StorageError
from nemo_rl.run.stored.head import BOARD, FORMAT, HEAD, POINTERS, TEXTS, encoded, head_of, marked, unmarked
from nemo_rl.run.stored.writer import RunHeldError, Writer, held_here
from nemo_rl.storage.errors import Conflict
from nemo_rl.storage.store import Store, walk

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
FLUSH_SHARE = 20
"""Between two flushes pass at least so many times the seconds that the last one took."""
BEAT_SECONDS = 10.0
SILENT_SECONDS = 35.0
"""A holder on another machine that wrote nothing for this long gives way."""


class HeadLease:
    """The head of the run at `uri`, whose folder on this machine is `place`, and the right to write it.

    The process that takes it keeps the head alive and publishes the small files of the folder as they grow. Elsewhere it
    is what the first rank told of it.
    """

    def __init__(self, uri: str, place: Path, writer: Writer, say: Callable[[str], None]) -> None:
        self.uri = uri
        self.place = place
        self.generation = 0
        self.head: dict[str, Any] = {}
        self._writer = writer
        self._say = say
        self._store: Store | None = None
        self._version = ""
        self._versions: dict[str, str] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        self._guard = threading.RLock()
        self._lost: LeaseLost | None = None
        self._stopping = threading.Event()
        self._beat: threading.Thread | None = None
        self._token = uuid.uuid4().hex

    # --- taking it

    def take(self, *, begin: bool) -> bool:
        """Takes the right to write. False: the run is to `begin`, and somebody else began there first.

        RunHeldError where a living process writes there, LeaseLost where a later attempt of the job does.
        """
        store = Store(self.uri)
        if begin:
            head = {"format": FORMAT, "generation": 1, "beat": 0, "checkpoints": [], "record": None}
            head["holder"] = self._writer.record(self._token)
            try:
                version = store.create(HEAD, encoded(head))
            except Conflict:
                found = store.read(HEAD)
                if found is None or head_of(found[0], store.uri).get("record") is not None:
                    return False
                try:
                    head, version = self._take_over(store)
                except RunHeldError:
                    return False
                if head.get("record") is not None:
                    store.swap(HEAD, encoded({**head, "holder": None}), version)
                    return False
        else:
            head, version = self._take_over(store)
        self._store, self.head, self._version = store, head, version
        self.generation = head["generation"]
        held_here.add(self._token)
        return True

    def _take_over(self, store: Store) -> tuple[dict[str, Any], str]:
        seen, since, told = None, time.monotonic(), False
        while True:
            found = store.read(HEAD)
            if found is None:
                raise StorageError(f"{store.uri}/{HEAD} has gone; somebody deleted the run while it was taken up")
            head = head_of(found[0], store.uri)
            holder = head.get("holder")
            if holder and not self._writer.may_replace(holder, store.uri):
                if seen is None:
                    seen, since = head["beat"], time.monotonic()
                elif seen != head["beat"]:
                    raise RunHeldError(
                        f"the run in {store.uri} is being trained by another call at this moment ({holder.get('name')}); wait "
                        "until it ends, or give resume=False to begin another one beside it"
                    )
                if time.monotonic() - since < SILENT_SECONDS:
                    if not told:
                        self._say(
                            f"{store.uri} was last written by {holder.get('name')}, which did not say that it ended; waiting "
                            f"{SILENT_SECONDS:.0f} s for a sign of it"
                        )
                        told = True
                    time.sleep(1.0)
                    continue
            taken = {**head, "generation": head["generation"] + 1, "beat": head["beat"] + 1}
            taken["holder"] = self._writer.record(self._token)
            try:
                return taken, store.swap(HEAD, encoded(taken), found[1])
            except Conflict:
                continue

    def fence_small_files(self, *, begin: bool) -> None:
        """Writes every small file anew, so that an earlier holder's version is no longer the one there; fetches the texts."""
        assert self._store is not None
        store = self._store
        self.place.mkdir(parents=True, exist_ok=True)
        for name in (*TEXTS, *POINTERS):
            while True:
                found = None if begin else store.read(name)
                content = unmarked(found[0]) if found else b""
                with contextlib.suppress(Conflict):
                    ended = marked(content, self.generation)
                    self._versions[name] = store.swap(name, ended, found[1]) if found else store.create(name, ended)
                    break
                begin = False
            if name in TEXTS:
                path = self.place / name
                if content:
                    replace_file(path, content)
                    self._sent[name] = _stamp(path)
                else:
                    path.unlink(missing_ok=True)

    # --- what is published

    def publish(self, record: dict[str, Any]) -> None:
        """Publishes the run's record, with the small files as they are."""
        self.flush()
        self.swap(lambda head: head.update(record=record))

    def leave_note(self, name: str, value: Any) -> None:
        """Keeps a value beside the record of the run that was let go. LeaseLost where another process has taken it since."""
        store = Store(self.uri)
        found = store.read(HEAD)
        head = head_of(found[0], store.uri) if found else {}
        if not found or head.get("generation") != self.generation:
            raise LeaseLost(f"the right to write to {self.uri} was lost; nothing was published since")
        head["notes"] = {**(head.get("notes") or {}), name: value}
        try:
            store.swap(HEAD, encoded(head), found[1])
        except Conflict:
            raise LeaseLost(f"the right to write to {self.uri} was lost; nothing was published since") from None

    def flush(self) -> None:
        """Publishes the small files that have changed."""
        assert self._store is not None
        with self._guard:
            for name in TEXTS:
                path = self.place / name
                if not path.exists() or self._sent.get(name) == (stamp := _stamp(path)):
                    continue
                content = path.read_bytes()
                self.swap_small(name, content[: content.rfind(b"\n") + 1])
                self._sent[name] = stamp
            for name, path in walk(self.place / BOARD) if (self.place / BOARD).is_dir() else ():
                if self._sent.get(f"{BOARD}/{name}") != (stamp := _stamp(path)):
                    self.check()
                    self._store.write(f"{BOARD}/{name}", path.read_bytes())
                    self._sent[f"{BOARD}/{name}"] = stamp

    def swap_small(self, name: str, content: bytes) -> None:
        """A small file, replaced, or LeaseLost."""
        assert self._store is not None
        with self._guard:
            self.check()
            try:
                self._versions[name] = self._store.swap(name, marked(content, self.generation), self._versions[name])
            except Conflict:
                self._give_up()

    def swap(self, change: Callable[[dict[str, Any]], None]) -> None:
        """The head, changed: visible to all at once, or LeaseLost."""
        assert self._store is not None
        with self._guard:
            self.check()
            head = json.loads(json.dumps(self.head))
            change(head)
            head["beat"] += 1
            try:
                self._version = self._store.swap(HEAD, encoded(head), self._version)
            except Conflict:
                self._give_up()
            self.head = head

    def _give_up(self) -> None:
        assert self._store is not None
        with contextlib.suppress(StorageError):
            found = self._store.read(HEAD)
            holder = (head_of(found[0], self.uri).get("holder") if found else None) or {}
            by = holder.get("name") or "somebody who changed or deleted its files"
            if holder.get("number"):
                by = f"attempt {holder['number']} (pod {by})"
            self._lost = LeaseLost(
                f"the right to write to {self.uri} was lost to {by}: this process or its node was taken for lost. Nothing of it "
                "was published since; it ends here"
            )
        self._lost = self._lost or LeaseLost(f"the right to write to {self.uri} was lost; nothing was published since")
        raise LeaseLost(str(self._lost))

    def check(self) -> None:
        """Raises LeaseLost once another process has taken the run."""
        if self._lost is not None:
            raise LeaseLost(str(self._lost))

    # --- keeping it, and letting it go

    def keep(self) -> None:
        """Begins to keep the head alive, and to publish the small files as they grow."""
        self._beat = threading.Thread(target=self._keep_beating, name="nemo-rl-store", daemon=True)
        self._beat.start()

    def let_go(self) -> None:
        """Publishes what is left, and lets the run go. What cannot be published any more is said, not raised."""
        self._stopping.set()
        if self._beat is not None:
            self._beat.join()
        if self._store is not None and self._lost is None:
            try:
                self.flush()
                self.swap(lambda head: head.update(holder=None))
            except (StorageError, LeaseLost) as error:
                logger.warning("the end of the run could not be written to %s: %s", self.uri, error)
        held_here.discard(self._token)
        self._store = None

    def _keep_beating(self) -> None:
        next_flush = next_beat = time.monotonic()
        while not self._stopping.wait(0.5):
            now = time.monotonic()
            try:
                if now >= next_flush:
                    self.flush()
                    took = time.monotonic() - now
                    next_flush = time.monotonic() + max(FLUSH_SECONDS, FLUSH_SHARE * took)
                if now >= next_beat:
                    self.swap(lambda head: None)
                    next_beat = time.monotonic() + BEAT_SECONDS
            except LeaseLost:
                return
            except StorageError as error:
                logger.warning("cannot reach %s for the moment: %s", self.uri, error)
                next_flush = next_beat = time.monotonic() + BEAT_SECONDS
            except OSError as error:
                logger.warning("cannot read what is to be published: %s", error)


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file aside and renames it, so that it is whole or as before."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content)
    os.replace(aside, path)
