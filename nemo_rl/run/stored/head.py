"""What the files of a run in an object store say: the head, and the small files beside it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from nemo_rl.errors import StorageError
from nemo_rl.job import uris
from nemo_rl.storage.store import Store
from nemo_rl.storage.transfer import checked

HEAD = "run.json"
FORMAT = 3
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
LOG = "run.log"
TEXTS = ("metrics.jsonl", "completions.jsonl", LOG)
"""Files of a run's folder that grow, and go along every few seconds."""
POINTERS = ("latest", "best")
BOARD = "tensorboard"
FOLDER = re.compile(r"(step-\d+)-g(\d+)")
"""A checkpoint's folder: its name, and the generation that it was written under."""
_STEP = re.compile(r"step-\d+")


def read_head(store: Store) -> dict[str, Any] | None:
    """The head of the run at a store's address; None where there is none. StorageError for what is no head."""
    found = store.read(HEAD)
    return head_of(found[0], store.uri) if found else None


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
    return unmarked(found[0]) if found else None


def head_of(content: bytes, uri: str) -> dict[str, Any]:
    try:
        head = json.loads(content)
        if head["format"] != FORMAT:
            raise StorageError(f"{uri}/{HEAD} has format {head['format']!r}; this version of nemo-rl reads {FORMAT}")
        if not isinstance(head["generation"], int) or not isinstance(head["beat"], int):
            raise TypeError
        for entry in head["checkpoints"]:
            if not _STEP.fullmatch(entry["name"]) or not FOLDER.fullmatch(entry["folder"]):
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


def best_name(entries: list[dict[str, Any]]) -> str | None:
    best = best_entry(entries)
    return best["name"] if best else None


def manifest_of(entry: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "step": entry["step"], "files": entry["files"]}


def encoded(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def marked(content: bytes, generation: int) -> bytes:
    """A small file, ended by blanks that spell the generation: so its version is not that of another holder's."""
    return content + f"{generation:b}".translate({48: " ", 49: "\t"}).encode() + b"\n"


def unmarked(content: bytes) -> bytes:
    text = content.rstrip(b" \t\n")
    return text + b"\n" if text else b""
