"""Models in object stores: which files an address means, checked for completeness, and their copy on this machine."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from nemo_rl.errors import StorageError
from nemo_rl.job import names, uris
from nemo_rl.run.stored.head import CHECKPOINTS, HEAD, MANIFEST, POINTERS, best_entry, read_head
from nemo_rl.storage.cache import cached
from nemo_rl.storage.errors import NoRanges
from nemo_rl.storage.left import leave
from nemo_rl.storage.store import Object, Store
from nemo_rl.storage.transfer import Progress, checked

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"step-\d+(?:-g\d+)?")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt")
_INDEX = "model.safetensors.index.json"
_HEADER_BYTES = 1 << 18
_MOST_HEADER_BYTES = 100_000_000
"""As safetensors allows."""


def keeps_models(cache_claim: str | None) -> bool:
    """Whether what is read from a store once is there for later runs: on a machine, and in pods with `cache.claim`."""
    return cache_claim is not None or not os.environ.get(names.ATTEMPT_VARIABLE)


def local_model(reference: str, progress: Progress = lambda done, total: None, *, in_parts: bool = False) -> Path:
    """The folder on this machine with the model at an address: a folder of Hugging Face files, a checkpoint of ours, a run
    (its best checkpoint), or RUN/latest and RUN/best.

    Read once per machine, and again only what changed (ETag, size). StorageError for what is no complete model. `in_parts`: where
    it can be, files of weights are left in the store, to be read by ranges (`storage.left`). Those of a checkpoint of ours are read
    whole: its digests are of whole files.
    """
    if (wrong := uris.problem(reference)) is not None:
        raise ValueError(f"model {reference!r}: {wrong}")
    store = Store(_followed(Store(reference)))
    found = [o for o in store.list() if "/" not in o.path and o.path not in ("state.json", MANIFEST)]
    digests = _digests(store, found)
    _check_complete(store, found)
    if any(o.path.endswith(".safetensors") for o in found):
        found = [o for o in found if not o.path.endswith(_WEIGHTS) or o.path.endswith(".safetensors")]
        if in_parts and not digests and (folder := _without_weights(store, found, progress)) is not None:
            return folder
    return cached(store.uri, found, progress, digests=digests)


def _without_weights(store: Store, found: list[Object], progress: Progress) -> Path | None:
    """The model's folder, in which weights are left in the store; None where the store gives no ranges, which a warning says."""
    weights = [o for o in found if o.path.endswith(".safetensors")]
    others = [o for o in found if not o.path.endswith(".safetensors")]
    try:
        headers = {o.path: _header(store, o) for o in weights}
    except NoRanges as error:
        logger.warning("%s; so each node reads the whole model to its disk", error)
        return None
    folder = cached(store.uri, others, progress, keep_others=True, within="in-parts")
    leave(folder, store, weights, lambda o: headers[o.path])
    known = {o.path for o in found}
    for path in folder.iterdir():
        if path.name not in known and not path.name.startswith("."):
            path.unlink(missing_ok=True)  # of what was at this address before
    return folder


def _header(store: Store, file: Object) -> memoryview:
    """The beginning of a file of safetensors, which says where each tensor is."""
    begun = store.read_range(file.path, 0, min(file.size, _HEADER_BYTES), file.version)
    size = 8 + int.from_bytes(begun[:8], "little")
    if len(begun) < 8 or not 8 < size <= min(file.size, _MOST_HEADER_BYTES):
        raise StorageError(
            f"{store.uri}/{file.path} is no file of safetensors: its header would have {size} bytes, the file has {file.size}; "
            "was the upload cut off?"
        )
    if size > len(begun):
        begun = memoryview(bytes(begun) + bytes(store.read_range(file.path, len(begun), size, file.version)))
    tensors = _json(bytes(begun[8:size]), f"{store.uri}/{file.path}")
    try:
        ends = [int(about["data_offsets"][1]) for name, about in tensors.items() if name != "__metadata__"]
    except (TypeError, KeyError, IndexError, ValueError):
        raise StorageError(f"{store.uri}/{file.path} is no file of safetensors: its header names no tensors") from None
    if size + max(ends, default=0) != file.size:
        raise StorageError(
            f"{store.uri}/{file.path} is half a file: its header names {size + max(ends, default=0)} bytes, and it has {file.size}; "
            "upload it again"
        )
    return begun[:size]


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
    there = {o.path for o in found}
    shown = ", ".join(sorted(there)[:8]) or "nothing"
    if "config.json" not in there:
        raise StorageError(
            f"{store.uri} is no folder of a model: it holds {shown}; expected config.json, tokenizer files and *.safetensors"
        )
    if not any(name.endswith(_WEIGHTS) for name in there):
        raise StorageError(f"{store.uri} is half a model: it has a config.json and no weights; it holds {shown}")
    if _INDEX in there:
        content = store.read(_INDEX)
        wanted = set(_json(content[0] if content else b"", f"{store.uri}/{_INDEX}").get("weight_map", {}).values())
        if missing := sorted(wanted - there):
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
