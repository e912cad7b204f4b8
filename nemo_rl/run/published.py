"""Brings a run's checkpoint and records from an object store to a folder of this machine. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nemo_rl.errors import StorageError
from nemo_rl.run.stored.head import CHECKPOINTS, MANIFEST, TEXTS, read_text
from nemo_rl.storage.store import Store
from nemo_rl.storage.transfer import Progress, checked, download

TRAINER_STATE = "trainer_state"


def fetch(uri: str, folder: Path, progress: Progress, say: Callable[[str], None]) -> Path | None:
    """The checkpoint at `uri` (RUN/checkpoints/NAME) without the optimizer's state, with the run's records, in `folder`;
    returns where it is. Of a run without a checkpoint, whose address `uri` is then, the records alone: None.

    What is there already and right is kept, half a file goes on. StorageError for what is damaged or cannot be read.
    """
    run, _, name = uri.partition(f"/{CHECKPOINTS}/")
    folder.mkdir(parents=True, exist_ok=True)
    records = Store(run)
    for text in TEXTS:
        content = read_text(records, text)
        if content:
            (folder / text).write_bytes(content)
    if not name:
        return None
    store = Store(uri)
    manifest = store.read(MANIFEST)
    if manifest is None:
        raise StorageError(f"the checkpoint {uri} is not there any more, or not complete: it has no {MANIFEST}")
    try:
        entries = json.loads(manifest[0])["files"]
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{uri}/{MANIFEST} is damaged") from None
    # The optimizer's state is larger than the model, and only a run in the store goes on from it.
    files = [file for file in checked(entries, f"{uri}/{MANIFEST}") if not file.path.startswith(f"{TRAINER_STATE}/")]
    size = sum(file.size for file in files)
    say(f"fetching {len(files)} files ({size / 1e6:.1f} MB) from {uri} to {folder}")
    target = folder / CHECKPOINTS / name_on_disk(name)
    download(store, files, target, progress)
    return target


def name_on_disk(name: str) -> str:
    """The name of a checkpoint's folder without the generation of its writer, which it has in a store alone."""
    return name.rpartition("-g")[0] or name
