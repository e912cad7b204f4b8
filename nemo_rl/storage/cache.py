"""What this machine keeps of stores: objects that were read once, checked by ETag and size, and the folders in which runs work."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_rl.job.names import CACHE_VARIABLE
from nemo_rl.storage.store import Object, Store
from nemo_rl.storage.transfer import File, Progress, download

MANIFEST = "manifest.json"
_VERSIONS = ".versions.json"


def cache_root() -> Path:
    """The folder of the cache: by default ~/.cache/nemo-rl, in a pod the claim of `cache.claim` or its emptyDir."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/nemo-rl").expanduser()


def runs_folder(uri: str) -> tuple[Path, int]:
    """A folder for runs at this address that no other process has, and the descriptor that holds it."""
    root = cache_root() / "runs" / _short(uri)
    number = 1
    while True:
        place = root / str(number)
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return place, descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            number += 1


def cached(
    uri: str,
    files: list[Object],
    progress: Progress = lambda done, total: None,
    *,
    digests: dict[str, str] | None = None,
    keep_others: bool = False,
    within: str = "objects",
) -> Path:
    """The folder of this machine that holds these objects of the address `uri`, as they are in the store now.

    Those that are there with the same version (ETag) and size are not read again. Of several processes that want the same,
    one reads and the others wait. `digests`: SHA-256 of files that a manifest names. Other files of the folder are removed,
    unless `keep_others`. `within`: of the folders of the cache the one that it is in.
    """
    folder = cache_root() / within / _short(uri)
    with _locked(folder):
        known = _versions(folder)
        fresh = {
            o.path
            for o in files
            if known.get(o.path) == [o.version, o.size]
            and (folder / o.path).is_file()
            and (folder / o.path).stat().st_size == o.size
        }
        wanted = [o for o in files if o.path not in fresh]
        for o in wanted:
            known.pop(o.path, None)
        _keep(folder, known)
        for name in wanted:
            (folder / name.path).unlink(missing_ok=True)
        named = [File(o.path, o.size, (digests or {}).get(o.path, "")) for o in wanted]
        download(Store(uri), named, folder, progress)
        _keep(folder, known | {o.path: [o.version, o.size] for o in wanted})
        listed = {o.path for o in files} | {_VERSIONS, ".lock"}
        for path in list(folder.rglob("*")) if not keep_others else ():
            if path.is_file() and path.relative_to(folder).as_posix() not in listed:
                path.unlink()
    return folder


def room() -> int:
    """Bytes that are free where the cache is."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(root).free


def _short(uri: str) -> str:
    name = re.sub(r"[^\w.-]+", "-", uri.partition("://")[2]).strip("-")[-60:]
    return f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _versions(folder: Path) -> dict[str, list[object]]:
    try:
        found = json.loads((folder / _VERSIONS).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _keep(folder: Path, known: dict[str, list[object]]) -> None:
    aside = folder / f"{_VERSIONS}.tmp"
    aside.write_text(json.dumps(known), encoding="utf-8")
    os.replace(aside, folder / _VERSIONS)
