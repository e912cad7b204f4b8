"""The complete checkpoints of a run in an object store: published in the background, fetched and pruned."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nemo_rl.errors import StorageError
from nemo_rl.job import uris
from nemo_rl.run.stored.head import (
    CHECKPOINTS,
    FOLDER,
    MANIFEST,
    POINTERS,
    best_name,
    encoded,
    manifest_of,
)
from nemo_rl.run.stored.lease import HeadLease
from nemo_rl.storage.errors import Conflict, Damaged
from nemo_rl.storage.sender import Sender
from nemo_rl.storage.store import Store, walk
from nemo_rl.storage.transfer import File, checked, digest, download

logger = logging.getLogger(__name__)

PARTS = "parts"


class PublishedCheckpoints:
    """The checkpoints that the head of a run names, of which those that were asked for are in the run's folder too."""

    def __init__(self, lease: HeadLease, rank: int, carries: bool) -> None:
        self.rank, self.carries = rank, carries
        self.node, self.nodes = 0, 1
        self._lease = lease
        self._sender = Sender()
        self._saving: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._whole: set[str] = set()
        self._news = False

    def entries(self) -> list[dict[str, Any]]:
        """The complete checkpoints in the store, by rising step."""
        return sorted(self._lease.head.get("checkpoints", []), key=lambda entry: entry["step"])

    def newest(self) -> list[str]:
        """Names of the complete checkpoints, the newest first."""
        return [entry["name"] for entry in reversed(self.entries())]

    def best(self) -> str | None:
        """The name of the one with the highest metric (the first to reach it); where none has a metric, the latest."""
        return best_name(self.entries())

    def checkpoint_uri(self, name: str) -> str | None:
        """Where the complete checkpoint of this name is in the store; None where it is not there."""
        folder = next((entry["folder"] for entry in self.entries() if entry["name"] == name), None)
        return uris.joined(self._lease.uri, CHECKPOINTS, folder) if folder else None

    def take_news(self) -> bool:
        """Whether a checkpoint was published since it was last asked."""
        news, self._news = self._news, False
        return news

    def bring(self, names: list[str]) -> str | None:
        """Fetches the first of these checkpoints that is whole; one that is damaged is passed over with a warning.

        StorageError where it cannot be read: then nobody knows what it is, and a run that went on without it would lose it.
        """
        for name in names:
            entry = next((e for e in self.entries() if e["name"] == name), None)
            if entry is None:
                continue
            target = self._lease.place / CHECKPOINTS / name
            if name in self._whole and target.is_dir():
                return name
            try:
                _fetch(self._store(entry["folder"]), entry, target)
                self._whole.add(name)
                return name
            except Damaged as error:
                logger.warning("passed over the checkpoint %s in %s: %s", name, self._lease.uri, error)
                for path in (target, _aside(target)):
                    shutil.rmtree(path, ignore_errors=True)
        return None

    # --- publishing

    def saved(self, path: Path, step: int, metric: float | None, keep: int, always: Collection[str]) -> None:
        """Begins to publish a checkpoint that is whole in `path`; returns at once. `wait` says how it went."""
        if not self.carries:
            return
        self.wait()
        self._sender.start()
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
        self._lease.check()

    def end(self) -> None:
        """Like `wait`; what went wrong is said, not raised."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        self._sender.close()
        if self._failure is not None:
            logger.warning("the last checkpoint could not be written to %s: %s", self._lease.uri, self._failure)

    def _store(self, folder: str) -> Store:
        return Store(self._lease.uri).at(f"{CHECKPOINTS}/{folder}")

    def _publish_safely(self, *arguments: Any) -> None:
        try:
            self._publish(*arguments)
        except BaseException as error:
            self._failure = error

    def _publish(self, path: Path, step: int, metric: float | None, keep: int, always: frozenset[str]) -> None:
        folder = f"{path.name}-g{self._lease.generation}"
        store = self._store(folder)
        if self.rank == 0:
            self._lease.flush()  # what a checkpoint has behind it is in the metrics before it is there
        files = list(walk(path))
        if self.rank != 0:
            files = [(name, file) for name, file in files if name != "state.json"]
        sent = self._sender.upload(store, files, self._lease.check)
        if self.rank != 0:
            store.write(f"{PARTS}/{self.node}.json", encoded([vars(file) for file in sent]))
            shutil.rmtree(path, ignore_errors=True)  # another node's folder would only fill up
            return
        parts = self._parts_of_other_nodes(store)
        entry = {"name": path.name, "folder": folder, "step": step, "metric": metric}
        entry["metrics"] = {k: v for k, v in _metrics_of(path).items() if k.startswith("validation_")}
        entry["files"] = [vars(file) for file in sorted((*sent, *parts), key=lambda file: file.path)]

        def change(head: dict[str, Any]) -> None:
            head["checkpoints"] = [e for e in head["checkpoints"] if e["name"] != path.name] + [entry]

        self._whole.add(path.name)
        replaced = [e for e in self._lease.head["checkpoints"] if e["name"] == path.name]
        self._lease.swap(change)
        store.create(MANIFEST, encoded(manifest_of(entry)))
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
                self._lease.check()
                if time.monotonic() > end:
                    raise StorageError(f"node {node} did not write its part of the checkpoint to {store.uri} in time")
                time.sleep(0.5)
            found += checked(json.loads(told[0]), f"{store.uri}/{PARTS}/{node}.json")
        return found

    def _point(self) -> None:
        entries = self.entries()
        folders = {entry["name"]: entry["folder"] for entry in entries}
        for name, target in zip(POINTERS, (entries[-1]["name"], best_name(entries)), strict=True):
            told = {"checkpoint": f"{CHECKPOINTS}/{folders[target]}", "generation": self._lease.generation}
            self._lease.swap_small(name, encoded(told))

    def _prune(self, keep: int, always: frozenset[str], replaced: list[dict[str, Any]]) -> None:
        entries = self.entries()
        best = best_name(entries)
        over = [e for e in entries[:-keep] if e["name"] != best and e["name"] not in always]
        names = {e["name"] for e in over}
        if over:
            self._lease.swap(
                lambda head: head.update(checkpoints=[e for e in head["checkpoints"] if e["name"] not in names])
            )
        for entry in (*over, *replaced):
            if entry["folder"] not in {e["folder"] for e in self.entries()}:
                self._store(entry["folder"]).delete([MANIFEST, *(file["path"] for file in entry["files"])])

    # --- what earlier holders left

    def tidy(self) -> None:
        """Removes what is in no head: what killed writers left, and what was about to be removed."""
        store = Store(self._lease.uri)
        known = {entry["folder"] for entry in self._lease.head["checkpoints"]}
        strays: dict[str, list[str]] = {}
        present = set()
        for entry in store.list(CHECKPOINTS):
            folder = entry.path.removeprefix(f"{CHECKPOINTS}/").partition("/")[0]
            present.add(entry.path)
            match = FOLDER.fullmatch(folder)
            if match and folder not in known and int(match[2]) < self._lease.generation:
                strays.setdefault(folder, []).append(entry.path)
        for paths in strays.values():
            store.delete(sorted(paths, key=lambda path: not path.endswith(f"/{MANIFEST}")))
        for entry in self._lease.head["checkpoints"]:
            path = f"{CHECKPOINTS}/{entry['folder']}/{MANIFEST}"
            if path not in present:
                with contextlib.suppress(Conflict):
                    store.create(path, encoded(manifest_of(entry)))

    def forget_local(self) -> None:
        """Removes checkpoints of this machine that are not those in the store: they were never published, or made anew."""
        known = {entry["name"]: entry for entry in self._lease.head["checkpoints"]}
        for folder in (self._lease.place / CHECKPOINTS).glob("*"):
            entry = known.get(folder.name)
            state = next((f for f in entry["files"] if f["path"] == "state.json"), None) if entry else None
            local = folder / "state.json"
            if state is None or not local.is_file() or digest(local) != state["sha256"]:
                shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink(missing_ok=True)


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
