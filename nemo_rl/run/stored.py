"""Runs that are kept in an object store: this machine works in a folder, and what is whole there is published.

    s3://bucket/run/run.json                       the head: who writes, the run's record, every complete checkpoint with the
                                                   names, sizes and digests of its files
                    metrics.jsonl, completions.jsonl, run.log
                    latest, best                   which checkpoint they are
                    checkpoints/step-00000100-g1/  as on a disk, and manifest.json; g1: written under the first lease

Publishing is one conditional write of the head, which names the version that it replaces: compare and swap. The lease is the
head's `generation`, the fence. Who takes it writes the head, and from then on every publication of an earlier holder is
refused by the store, whenever it wakes up. Files of a checkpoint have the generation in their folder's name, so that two
holders never write the same object; the small files that are written again and again end in blanks that spell the generation,
so that their versions (on S3: digests of the content) differ between holders, and are written conditionally as well. What a
killed writer left behind is in no head, and is cleared away by the next one.

Nobody can ask a machine that is silent whether it is dead. A holder writes its head every few seconds; one of another machine
that did so for half a minute no more gives way. An attempt of a job gives way to later ones at once. Loads no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rl.errors import LeaseLost, StorageError
from nemo_rl.job import uris
from nemo_rl.storage.cache import runs_folder
from nemo_rl.storage.errors import Conflict, Unavailable
from nemo_rl.storage.store import Store, walk
from nemo_rl.storage.transfer import File, checked, digest, download, upload

logger = logging.getLogger(__name__)

HEAD = "run.json"
FORMAT = 3
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
LOG = "run.log"
TEXTS = ("metrics.jsonl", "completions.jsonl", LOG)
"""Files of a run's folder that grow, and go along every few seconds."""
POINTERS = ("latest", "best")
BOARD = "tensorboard"
FLUSH_SECONDS = 5.0
FLUSH_SHARE = 20
"""Between two flushes pass at least so many times the seconds that the last one took."""
BEAT_SECONDS = 10.0
SILENT_SECONDS = 35.0
"""A holder on another machine that wrote nothing for this long gives way."""
PARTS = "parts"
_STEP = re.compile(r"step-\d+")
_FOLDER = re.compile(r"(step-\d+)-g(\d+)")

_held_here: set[str] = set()
"""Tokens of the leases that this process holds."""


class RunHeldError(RuntimeError):
    """Another process that lives writes to this run."""


@dataclass(frozen=True)
class Writer:
    """Who writes. Of one `owner` (a job's uid) the highest number wins; without an owner the one that lives does."""

    owner: str = ""
    number: int = 0
    name: str = ""
    """For people: which pod it is."""

    def record(self, token: str) -> dict[str, Any]:
        return {
            "owner": self.owner,
            "number": self.number,
            "name": self.name or f"{socket.gethostname()}, process {os.getpid()}",
            "machine": _machine(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "token": token,
        }


@dataclass
class StoredRuns:
    """The runs at one address. One of them is taken; `folder` stands in for the address on this machine.

    One process of each node carries files (`carries`), the first rank writes the head.
    """

    uri: str
    writer: Writer = Writer()
    folder: Path = Path()
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    carries: bool = field(default_factory=lambda: os.environ.get("LOCAL_RANK", "0") == "0")
    nodes: int = 1
    node: int = 0
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
        self._store: Store | None = None
        self._lock: int | None = None
        self.place: Path | None = None
        self.generation = 0
        self._head: dict[str, Any] = {}
        self._version = ""
        self._versions: dict[str, str] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        self._guard = threading.RLock()
        self._lost: LeaseLost | None = None
        self._stopping = threading.Event()
        self._beat: threading.Thread | None = None
        self._saving: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._token = uuid.uuid4().hex
        self._whole: set[str] = set()
        self._news = False

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

    def store(self, place: Path | None = None) -> Store:
        place = place or self.place
        if place is None:
            raise StorageError(f"no run is open at {self.uri}")
        return Store(self.uri_of(place))

    # --- what decides which run it is

    def look(self, place: Path) -> None:
        """Makes `place` show whether there is a run at its address: run.json is there, or the folder is empty."""
        if place == self.place:
            return
        found = self.store(place).read(HEAD)
        if found is None:
            shutil.rmtree(place, ignore_errors=True)
            return
        record = _head_of(found[0], self.uri_of(place)).get("record")
        if record is None:  # somebody begins there, or was killed before it was a run
            shutil.rmtree(place, ignore_errors=True)
            return
        place.mkdir(parents=True, exist_ok=True)
        _write(place / HEAD, json.dumps(record).encode())

    def take(self, place: Path, *, begin: bool) -> bool:
        """Takes the run at this address for this process, and brings what it needs to go on. False: it is to `begin`, and
        somebody else began there first.

        RunHeldError where a living process writes there, LeaseLost where a later attempt of the job does.
        """
        store = self.store(place)
        if begin:
            head = {"format": FORMAT, "generation": 1, "beat": 0, "checkpoints": [], "record": None}
            head["holder"] = self.writer.record(self._token)
            try:
                version = store.create(HEAD, _encoded(head))
            except Conflict:
                found = store.read(HEAD)
                if found is None or _head_of(found[0], store.uri).get("record") is not None:
                    return False
                try:
                    head, version = self._take_over(store)
                except RunHeldError:
                    return False
                if head.get("record") is not None:
                    store.swap(HEAD, _encoded({**head, "holder": None}), version)
                    return False
        else:
            head, version = self._take_over(store)
        self.place, self._store, self._head, self._version = place, store, head, version
        self.generation = head["generation"]
        _held_here.add(self._token)
        self._fence_small_files(store, begin)
        if not begin:
            self._tidy(store)
            self._forget_local(place)
            self.bring(self.newest())
        self._beat = threading.Thread(target=self._keep_beating, name="nemo-rl-store", daemon=True)
        self._beat.start()
        return True

    def _take_over(self, store: Store) -> tuple[dict[str, Any], str]:
        seen, since, told = None, time.monotonic(), False
        while True:
            found = store.read(HEAD)
            if found is None:
                raise StorageError(f"{store.uri}/{HEAD} has gone; somebody deleted the run while it was taken up")
            head = _head_of(found[0], store.uri)
            holder = head.get("holder")
            if holder and not self._may_replace(holder, store.uri):
                if seen is None:
                    seen, since = head["beat"], time.monotonic()
                elif seen != head["beat"]:
                    raise RunHeldError(
                        f"the run in {store.uri} is being trained by another call at this moment ({holder.get('name')}); wait "
                        "until it ends, or give resume=False to begin another one beside it"
                    )
                if time.monotonic() - since < SILENT_SECONDS:
                    if not told:
                        self.say(
                            f"{store.uri} was last written by {holder.get('name')}, which did not say that it ended; waiting "
                            f"{SILENT_SECONDS:.0f} s for a sign of it"
                        )
                        told = True
                    time.sleep(1.0)
                    continue
            taken = {**head, "generation": head["generation"] + 1, "beat": head["beat"] + 1}
            taken["holder"] = self.writer.record(self._token)
            try:
                return taken, store.swap(HEAD, _encoded(taken), found[1])
            except Conflict:
                continue

    def _may_replace(self, holder: dict[str, Any], uri: str) -> bool:
        """Whether a holder gives way at once. RunHeldError and LeaseLost where it never does."""
        if self.writer.owner and holder.get("owner") == self.writer.owner:
            if int(holder.get("number") or 0) > self.writer.number:
                raise LeaseLost(
                    f"attempt {self.writer.number} came too late: attempt {holder['number']} (pod {holder.get('name')}) writes to "
                    f"{uri}, so this one writes nothing"
                )
            return True
        if holder.get("machine") != _machine():
            return False
        if holder.get("pid") == os.getpid():
            lives = holder.get("token") in _held_here
        else:
            lives = holder.get("born") is not None and holder["born"] == _born(int(holder.get("pid") or 0))
        if lives:
            raise RunHeldError(
                f"the run in {uri} is being trained by another call at this moment ({holder.get('name')}); wait until it ends, "
                "or give resume=False to begin another one beside it"
            )
        return True

    def _fence_small_files(self, store: Store, begin: bool) -> None:
        """Writes every small file anew, so that an earlier holder's version is no longer the one there; fetches the texts."""
        assert self.place is not None
        self.place.mkdir(parents=True, exist_ok=True)
        for name in (*TEXTS, *POINTERS):
            while True:
                found = None if begin else store.read(name)
                content = _unmarked(found[0]) if found else b""
                with contextlib.suppress(Conflict):
                    marked = self._marked(content)
                    self._versions[name] = store.swap(name, marked, found[1]) if found else store.create(name, marked)
                    break
                begin = False
            if name in TEXTS:
                path = self.place / name
                if content:
                    _write(path, content)
                    self._sent[name] = _stamp(path)
                else:
                    path.unlink(missing_ok=True)

    def _tidy(self, store: Store) -> None:
        """Removes what is in no head: what killed writers left, and what was about to be removed."""
        known = {entry["folder"] for entry in self._head["checkpoints"]}
        strays: dict[str, list[str]] = {}
        present = set()
        for entry in store.list(CHECKPOINTS):
            folder = entry.path.removeprefix(f"{CHECKPOINTS}/").partition("/")[0]
            present.add(entry.path)
            match = _FOLDER.fullmatch(folder)
            if match and folder not in known and int(match[2]) < self.generation:
                strays.setdefault(folder, []).append(entry.path)
        for paths in strays.values():
            store.delete(sorted(paths, key=lambda path: not path.endswith(f"/{MANIFEST}")))
        for entry in self._head["checkpoints"]:
            path = f"{CHECKPOINTS}/{entry['folder']}/{MANIFEST}"
            if path not in present:
                with contextlib.suppress(Conflict):
                    store.create(path, _encoded(_manifest(entry)))

    def _forget_local(self, place: Path) -> None:
        """Removes checkpoints of this machine that are not those in the store: they were never published, or made anew."""
        known = {entry["name"]: entry for entry in self._head["checkpoints"]}
        for folder in (place / CHECKPOINTS).glob("*"):
            entry = known.get(folder.name)
            state = next((f for f in entry["files"] if f["path"] == "state.json"), None) if entry else None
            local = folder / "state.json"
            if state is None or not local.is_file() or digest(local) != state["sha256"]:
                shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink(missing_ok=True)

    # --- checkpoints

    def entries(self) -> list[dict[str, Any]]:
        """The complete checkpoints in the store, by rising step."""
        return sorted(self._head.get("checkpoints", []), key=lambda entry: entry["step"])

    def newest(self) -> list[str]:
        """Names of the complete checkpoints, the newest first."""
        return [entry["name"] for entry in reversed(self.entries())]

    def best(self) -> str | None:
        """The name of the one with the highest metric (the first to reach it); where none has a metric, the latest."""
        return _best_name(self.entries())

    def checkpoint_uri(self, name: str) -> str | None:
        """Where the complete checkpoint of this name is in the store; None where it is not there."""
        folder = next((entry["folder"] for entry in self.entries() if entry["name"] == name), None)
        return uris.joined(self.uri_of(self.place), CHECKPOINTS, folder) if folder and self.place else None

    def bring(self, names: list[str]) -> str | None:
        """Fetches the first of these checkpoints that is whole; one that is damaged is passed over with a warning."""
        assert self.place is not None
        for name in names:
            entry = next((e for e in self.entries() if e["name"] == name), None)
            if entry is None:
                continue
            target = self.place / CHECKPOINTS / name
            if name in self._whole and target.is_dir():
                return name
            try:
                _fetch(self.store().at(f"{CHECKPOINTS}/{entry['folder']}"), entry, target)
                self._whole.add(name)
                return name
            except Unavailable:
                raise
            except StorageError as error:
                logger.warning("passed over the checkpoint %s in %s: %s", name, self.uri_of(self.place), error)
                for path in (target, _aside(target)):
                    shutil.rmtree(path, ignore_errors=True)
        return None

    def saved(self, path: Path, step: int, metric: float | None, keep: int, always: Collection[str]) -> None:
        """Begins to publish a checkpoint that is whole in `path`; returns at once. `wait` says how it went."""
        if not self.carries:
            return
        self.wait()
        arguments = (path, step, metric, keep, frozenset(always))
        self._saving = threading.Thread(target=self._publish_safely, args=arguments, name="nemo-rl-save", daemon=True)
        self._saving.start()

    def finish_save(self, keep: int, always: Collection[str]) -> None:
        """What a save of a killed process left to do, once its checkpoint was named: the pointers, and what is over the limit.

        Nothing is removed while the newest one has not been seen to be whole.
        """
        entries = self.entries()
        if self.rank != 0 or not entries:
            return
        self._point()
        if entries[-1]["name"] in self._whole:
            self._prune(keep, frozenset(always), [])

    def wait(self) -> None:
        """Until the checkpoint that is being published is. Raises what went wrong: StorageError, LeaseLost."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        self.check()

    def _publish_safely(self, *arguments: Any) -> None:
        try:
            self._publish(*arguments)
        except BaseException as error:
            self._failure = error

    def _publish(self, path: Path, step: int, metric: float | None, keep: int, always: frozenset[str]) -> None:
        folder = f"{path.name}-g{self.generation}"
        store = self.store().at(f"{CHECKPOINTS}/{folder}")
        if self.rank == 0:
            self._flush()  # what a checkpoint has behind it is in the metrics before it is there
        files = list(walk(path))
        if self.rank != 0:
            files = [(name, file) for name, file in files if name != "state.json"]
        sent = upload(store, files, self.check)
        if self.rank != 0:
            store.write(f"{PARTS}/{self.node}.json", _encoded([vars(file) for file in sent]))
            shutil.rmtree(path, ignore_errors=True)  # another node's folder would only fill up
            return
        parts = self._parts_of_other_nodes(store)
        entry = {"name": path.name, "folder": folder, "step": step, "metric": metric}
        entry["metrics"] = {k: v for k, v in _metrics_of(path).items() if k.startswith("validation_")}
        entry["files"] = [vars(file) for file in sorted((*sent, *parts), key=lambda file: file.path)]

        def change(head: dict[str, Any]) -> None:
            head["checkpoints"] = [e for e in head["checkpoints"] if e["name"] != path.name] + [entry]

        self._whole.add(path.name)
        replaced = [e for e in self._head["checkpoints"] if e["name"] == path.name]
        self._swap(change)
        store.create(MANIFEST, _encoded(_manifest(entry)))
        store.delete([f"{PARTS}/{node}.json" for node in range(1, self.nodes)])
        self._point()
        self._prune(keep, always, replaced)
        self._news = True

    def _parts_of_other_nodes(self, store: Store) -> list[File]:
        """What the other nodes wrote of this checkpoint; each says so last."""
        found: list[File] = []
        for node in range(1, self.nodes):
            end = time.monotonic() + max(600.0, store.patience)
            while (told := store.read(f"{PARTS}/{node}.json")) is None:
                self.check()
                if time.monotonic() > end:
                    raise StorageError(f"node {node} did not write its part of the checkpoint to {store.uri} in time")
                time.sleep(0.5)
            found += checked(json.loads(told[0]), f"{store.uri}/{PARTS}/{node}.json")
        return found

    def _point(self) -> None:
        entries = self.entries()
        folders = {entry["name"]: entry["folder"] for entry in entries}
        for name, target in zip(POINTERS, (entries[-1]["name"], _best_name(entries)), strict=True):
            told = {"checkpoint": f"{CHECKPOINTS}/{folders[target]}", "generation": self.generation}
            self._swap_small(name, _encoded(told))

    def _prune(self, keep: int, always: frozenset[str], replaced: list[dict[str, Any]]) -> None:
        entries = self.entries()
        best = _best_name(entries)
        over = [e for e in entries[:-keep] if e["name"] != best and e["name"] not in always]
        names = {e["name"] for e in over}
        if over:
            self._swap(lambda head: head.update(checkpoints=[e for e in head["checkpoints"] if e["name"] not in names]))
        for entry in (*over, *replaced):
            store = self.store().at(f"{CHECKPOINTS}/{entry['folder']}")
            if entry["folder"] not in {e["folder"] for e in self.entries()}:
                store.delete([MANIFEST, *(file["path"] for file in entry["files"])])

    # --- the record and the small files

    def publish(self, place: Path) -> None:
        """Publishes run.json of the folder, with the small files as they are."""
        if self.rank != 0:
            return
        record = json.loads((place / HEAD).read_text(encoding="utf-8"))
        self._flush()
        self._swap(lambda head: head.update(record=record))

    def leave_note(self, name: str, value: Any) -> None:
        """Keeps a value beside the record of the run that was let go. LeaseLost where another process has taken it since."""
        store = self.store()
        found = store.read(HEAD)
        head = _head_of(found[0], store.uri) if found else {}
        if not found or head.get("generation") != self.generation:
            raise LeaseLost(f"the right to write to {self.uri} was lost; nothing was published since")
        head["notes"] = {**(head.get("notes") or {}), name: value}
        try:
            store.swap(HEAD, _encoded(head), found[1])
        except Conflict:
            raise LeaseLost(f"the right to write to {self.uri} was lost; nothing was published since") from None

    def take_news(self) -> bool:
        """Whether a checkpoint was published since it was last asked."""
        news, self._news = self._news, False
        return news

    def check(self) -> None:
        """Raises LeaseLost once another process has taken the run."""
        if self._lost is not None:
            raise LeaseLost(str(self._lost))

    def close(self) -> None:
        """Publishes what is left, and lets the run go. What cannot be published any more is said, not raised."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        self._stopping.set()
        if self._beat is not None:
            self._beat.join()
        if self._store is not None and self.rank == 0 and self._lost is None:
            try:
                self._flush()
                self._swap(lambda head: head.update(holder=None))
            except (StorageError, LeaseLost) as error:
                logger.warning("the end of the run could not be written to %s: %s", self.uri, error)
        if self._failure is not None:
            logger.warning("the last checkpoint could not be written to %s: %s", self.uri, self._failure)
        _held_here.discard(self._token)
        self._store = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _keep_beating(self) -> None:
        next_flush = next_beat = time.monotonic()
        while not self._stopping.wait(0.5):
            now = time.monotonic()
            try:
                if now >= next_flush:
                    self._flush()
                    took = time.monotonic() - now
                    next_flush = time.monotonic() + max(FLUSH_SECONDS, FLUSH_SHARE * took)
                if now >= next_beat:
                    self._swap(lambda head: None)
                    next_beat = time.monotonic() + BEAT_SECONDS
            except LeaseLost:
                return
            except StorageError as error:
                logger.warning("cannot reach %s for the moment: %s", self.uri, error)
                next_flush = next_beat = time.monotonic() + BEAT_SECONDS
            except OSError as error:
                logger.warning("cannot read what is to be published: %s", error)

    def _flush(self) -> None:
        """Publishes the small files that have changed."""
        assert self.place is not None and self._store is not None
        with self._guard:
            for name in TEXTS:
                path = self.place / name
                if not path.exists() or self._sent.get(name) == (stamp := _stamp(path)):
                    continue
                content = path.read_bytes()
                self._swap_small(name, content[: content.rfind(b"\n") + 1])
                self._sent[name] = stamp
            for name, path in walk(self.place / BOARD) if (self.place / BOARD).is_dir() else ():
                if self._sent.get(f"{BOARD}/{name}") != (stamp := _stamp(path)):
                    self.check()
                    self._store.write(f"{BOARD}/{name}", path.read_bytes())
                    self._sent[f"{BOARD}/{name}"] = stamp

    def _swap_small(self, name: str, content: bytes) -> None:
        assert self._store is not None
        with self._guard:
            self.check()
            try:
                self._versions[name] = self._store.swap(name, self._marked(content), self._versions[name])
            except Conflict:
                self._give_up()

    def _swap(self, change: Callable[[dict[str, Any]], None]) -> None:
        """The head, changed: visible to all at once, or LeaseLost."""
        assert self._store is not None
        with self._guard:
            self.check()
            head = json.loads(json.dumps(self._head))
            change(head)
            head["beat"] += 1
            try:
                self._version = self._store.swap(HEAD, _encoded(head), self._version)
            except Conflict:
                self._give_up()
            self._head = head

    def _give_up(self) -> None:
        assert self._store is not None
        with contextlib.suppress(StorageError):
            found = self._store.read(HEAD)
            holder = (_head_of(found[0], self.uri).get("holder") if found else None) or {}
            by = holder.get("name") or "somebody who changed or deleted its files"
            if holder.get("number"):
                by = f"attempt {holder['number']} (pod {by})"
            self._lost = LeaseLost(
                f"the right to write to {self.uri} was lost to {by}: this process or its node was taken for lost. Nothing of it "
                "was published since; it ends here"
            )
        self._lost = self._lost or LeaseLost(f"the right to write to {self.uri} was lost; nothing was published since")
        raise LeaseLost(str(self._lost))

    def _marked(self, content: bytes) -> bytes:
        return content + f"{self.generation:b}".translate({48: " ", 49: "\t"}).encode() + b"\n"

    # --- several nodes

    def told(self) -> dict[str, Any]:
        """What processes on other nodes need to carry their part."""
        return {"place": str(self.place), "folder": str(self.folder), "generation": self.generation, "head": self._head}

    def follow(self, told: dict[str, Any], node: int, nodes: int, root: Path | None) -> tuple[int, str | None]:
        """Joins what the first rank took; returns the number of this node and, where this rank carries, its folder.

        On another node the newest checkpoint is fetched, into a folder of that node.
        """
        self.node, self.nodes = node, nodes
        if self.rank != 0:
            place, self.folder = Path(told["place"]), Path(told["folder"])
            self.generation, self._head = told["generation"], told["head"]
            if self.carries and node > 0:
                below = place.relative_to(self.folder.parent)
                if root is None:
                    root, self._lock = runs_folder(self.uri)
                self.folder, place = root / self.folder.name, root / below
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                self.place = place
                self.bring(self.newest())
            self.place = place
        return node, str(self.place) if self.carries else None

    def settle_in(self, places: list[tuple[int, str | None]]) -> Path:
        """The folder of this rank's node, of those that all ranks told."""
        self.place = next(Path(place) for node, place in places if node == self.node and place is not None)
        self.folder = self.folder if self.place.is_relative_to(self.folder) else self._parent_of(self.place)
        return self.place

    def _parent_of(self, place: Path) -> Path:
        """The folder that stands for the address itself: `place` is it, or one beside or within it."""
        return place.parent if place.parent.name == self._name else place.parent / self._name


# --- reading the runs of others -----------------------------------------------------------------------------------


def read_head(store: Store) -> dict[str, Any] | None:
    """The head of the run at a store's address; None where there is none. StorageError for what is no head."""
    found = store.read(HEAD)
    return _head_of(found[0], store.uri) if found else None


def notes_of(uri: str, name: str, patience: float | None = None) -> Iterator[Any]:
    """What runs at this address and within it left under a name, in order; a store is asked for `patience` seconds."""
    for number in itertools.count(1):
        head = read_head(Store(uri if number == 1 else uris.joined(uri, f"run-{number}"), patience))
        if head is None:
            return
        if name in (head.get("notes") or {}):
            yield head["notes"][name]


def read_text(store: Store, name: str) -> bytes | None:
    """One of the small files of a run, without the blanks at its end."""
    found = store.read(name)
    return _unmarked(found[0]) if found else None


def _head_of(content: bytes, uri: str) -> dict[str, Any]:
    try:
        head = json.loads(content)
        if head["format"] != FORMAT:
            raise StorageError(f"{uri}/{HEAD} has format {head['format']!r}; this version of nemo-rl reads {FORMAT}")
        if not isinstance(head["generation"], int) or not isinstance(head["beat"], int):
            raise TypeError
        for entry in head["checkpoints"]:
            if not _STEP.fullmatch(entry["name"]) or not _FOLDER.fullmatch(entry["folder"]):
                raise ValueError(entry["name"])
            checked(entry["files"], f"{uri}/{HEAD}")
            int(entry["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StorageError(
            f"{uri}/{HEAD} is not the record of a run of nemo-rl; expected a folder of ours or an empty one; give another output"
        ) from None
    return dict(head)


def best_entry(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The checkpoint with the highest metric (the first to reach it); where none has a metric, the latest."""
    measured = [entry for entry in entries if entry["metric"] is not None]
    if measured:
        return max(measured, key=lambda entry: (entry["metric"], -entry["step"]))
    return max(entries, key=lambda entry: entry["step"], default=None)


def _best_name(entries: list[dict[str, Any]]) -> str | None:
    best = best_entry(entries)
    return best["name"] if best else None


def _manifest(entry: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "step": entry["step"], "files": entry["files"]}


def _metrics_of(path: Path) -> dict[str, Any]:
    """What the trainer measured at a checkpoint, as its state.json says."""
    try:
        found = json.loads((path / "state.json").read_text(encoding="utf-8"))["state"].get("metrics")
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _fetch(store: Store, entry: dict[str, Any], target: Path) -> None:
    """A checkpoint into a folder of this name, whole or not at all."""
    aside = _aside(target)
    if target.is_dir() and not aside.exists():
        os.rename(target, aside)  # what is there and right is kept
    files = checked(entry["files"], store.uri)
    download(store, files, aside)
    wanted = {file.path for file in files}
    for name, path in list(walk(aside)):
        if name not in wanted:
            path.unlink()
    shutil.rmtree(target, ignore_errors=True)
    os.rename(aside, target)


def _aside(target: Path) -> Path:
    return target.with_name(f".fetch-{target.name}")


def _encoded(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def _unmarked(content: bytes) -> bytes:
    text = content.rstrip(b" \t\n")
    return text + b"\n" if text else b""


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


def _machine() -> str:
    """This machine since it was started; a pod is a machine of its own, for its processes are not seen from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, space = "", ""
    return hashlib.sha256(f"{socket.gethostname()} {boot} {space}".encode()).hexdigest()[:24]


def _born(pid: int) -> str | None:
    """When the process with this id began, in the kernel's own ticks; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
