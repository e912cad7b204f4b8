"""Models in object stores: which files an address means, checked for completeness, and their copy on this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from nemo_rl.errors import StorageError
from nemo_rl.job import uris
from nemo_rl.run.stored.head import CHECKPOINTS, HEAD, MANIFEST, POINTERS, best_entry, read_head
from nemo_rl.storage.cache import cached
from nemo_rl.storage.store import Object, Store
from nemo_rl.storage.transfer import Progress, checked

_CHECKPOINT = re.compile(r"step-\d+(?:-g\d+)?")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt")
_INDEX = "model.safetensors.index.json"


def local_model(reference: str, progress: Progress = lambda done, total: None) -> Path:
    """The folder on this machine with the model at an address: a folder of Hugging Face files, a checkpoint of ours, a run
    (its best checkpoint), or RUN/latest and RUN/best.

    Read once per machine, and again only what changed (ETag, size). StorageError for what is no complete model.
    """
    if (wrong := uris.problem(reference)) is not None:
        raise ValueError(f"model {reference!r}: {wrong}")
    store = Store(_followed(Store(reference)))
    found = [o for o in store.list() if "/" not in o.path and o.path not in ("state.json", MANIFEST)]
    digests = _digests(store, found)
    _check_complete(store, found)
    if any(o.path.endswith(".safetensors") for o in found):
        found = [o for o in found if not o.path.endswith(_WEIGHTS) or o.path.endswith(".safetensors")]
    return cached(store.uri, found, progress, digests=digests)


def _followed(store: Store) -> str:
    """Where a run, or one of its pointers, leads; another address is what it is."""
    parent, _, name = store.uri.rpartition("/")
    if name in POINTERS and (pointer := Store(parent).read(name)) is not None:
        told = _json(pointer[0], store.uri)
        folder = str(told.get("checkpoint", ""))
        if not re.fullmatch(rf"{CHECKPOINTS}/{_CHECKPOINT.pattern}", folder):
            raise StorageError(f"{store.uri} names no checkpoint; the run there has none yet, or its file was damaged")
        return uris.joined(parent, folder)
    if store.stat(HEAD) is not None and store.stat("config.json") is None and (head := read_head(store)) is not None:
        best = best_entry(head["checkpoints"])
        if best is None:
            raise StorageError(f"the run at {store.uri} has no complete checkpoint yet")
        return uris.joined(store.uri, CHECKPOINTS, best["folder"])
    return store.uri


def _digests(store: Store, found: list[Object]) -> dict[str, str]:
    """What the manifest of a checkpoint of ours says of its files. StorageError where files lack, or it is not complete."""
    parent, _, name = store.uri.rpartition("/")
    manifest = store.read(MANIFEST)
    if manifest is None:
        if _CHECKPOINT.fullmatch(name) and parent.endswith(f"/{CHECKPOINTS}"):
            raise StorageError(
                f"the checkpoint {store.uri} is not complete: it has no {MANIFEST}, which is written last; give another one (the "
                f"run's {POINTERS[0]} and {POINTERS[1]} name complete ones)"
            )
        return {}
    named = {file.path: file for file in checked(_json(manifest[0], store.uri).get("files"), f"{store.uri}/{MANIFEST}")}
    there = {o.path: o.size for o in found}
    for path, file in named.items():
        if "/" in path or path == "state.json":
            continue
        if path not in there:
            raise StorageError(f"the checkpoint {store.uri} is damaged: {path} is missing; give another one")
        if there[path] != file.size:
            raise StorageError(
                f"the checkpoint {store.uri} is damaged: {path} has {there[path]} bytes, but was saved with {file.size}"
            )
    return {path: file.sha256 for path, file in named.items()}


def _check_complete(store: Store, found: list[Object]) -> None:
    names = {o.path for o in found}
    shown = ", ".join(sorted(names)[:8]) or "nothing"
    if "config.json" not in names:
        raise StorageError(
            f"{store.uri} is no folder of a model: it holds {shown}; expected config.json, tokenizer files and *.safetensors"
        )
    if not any(name.endswith(_WEIGHTS) for name in names):
        raise StorageError(f"{store.uri} is half a model: it has a config.json and no weights; it holds {shown}")
    if _INDEX in names:
        content = store.read(_INDEX)
        wanted = set(_json(content[0] if content else b"", f"{store.uri}/{_INDEX}").get("weight_map", {}).values())
        if missing := sorted(wanted - names):
            raise StorageError(
                f"{store.uri} is half a model: {len(missing)} of the {len(wanted)} files of weights that {_INDEX} names are not "
                f"there ({', '.join(missing[:3])}); upload the rest"
            )


def _json(content: bytes, uri: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise StorageError(f"{uri} is not what it should be: expected JSON with an object; was the upload cut off?")
