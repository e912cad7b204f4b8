"""Fetches the output of a job through its file server: resumable, checked by digest, and never outside the folder it is for."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import quote

from nemo_rl.backends.kubernetes.errors import DownloadError

MAX_MANIFEST_BYTES = 32 * 1024 * 1024
MAX_FILES = 20_000
_TRIES = 8
"""Connections in a row that bring nothing, until it is given up."""
_BLOCK = 1 << 20
_PART = ".part"
_READ_SECONDS = 120.0
"""Without a byte. Digests of large files take a while before the list of them goes on."""
_SHA256 = re.compile(r"[0-9a-f]{64}")

Connect = Callable[[], Any]
"""Opens a connection to the file server: a socket, or what http.client takes for one."""


@dataclass(frozen=True)
class RemoteFile:
    """One file as the server names it: its path from the claim's root, its size in bytes and its digest."""

    path: str
    size: int
    sha256: str


class Progress(Protocol):
    """Told about each piece that arrives."""

    def __call__(self, done: int, total: int) -> None: ...


class FileClient:
    """Reads from the file server of a job (nemo_rl.worker.files). Nothing it says is trusted."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()

    def manifest(self, path: str) -> list[RemoteFile]:
        """The files below a path, checked: all lie below it, none twice. [] where there is nothing."""
        for attempt in range(_TRIES):
            try:
                response = self._get(f"/manifest?path={quote(path, safe='/')}", {})
                if response.status == 404:
                    response.read(_BLOCK)
                    return []
                text = response.read(MAX_MANIFEST_BYTES + 1)
                break
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if attempt == _TRIES - 1:
                    raise DownloadError(f"the list of {path} cannot be read: {error}") from None
        if response.status != 200 or len(text) > MAX_MANIFEST_BYTES:
            raise DownloadError(f"the list of {path}: the pod answered {response.status} with {len(text)} bytes")
        return checked_manifest(text, path)

    def read(self, file: RemoteFile, begin: int) -> Iterator[bytes]:
        """The bytes from `begin` on, never more than the list said. OSError or HTTPException for a cut."""
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        response = self._get(f"/files/{quote(file.path, safe='/')}", headers)
        if response.status not in (200, 206):
            text = response.read(300).decode(errors="replace").strip()
            raise DownloadError(f"{file.path}: the pod answered {response.status}: {text}")
        if begin and response.status != 206:
            raise http.client.HTTPException("the pod does not resume")
        left = file.size - begin
        while left > 0:
            piece = response.read1(min(_BLOCK, left))  # read() would lose what came before a cut
            if not piece:
                raise http.client.HTTPException(f"{left} bytes are missing")
            left -= len(piece)
            yield piece
        if response.read1(1):
            self.close()
            raise DownloadError(f"{file.path}: the pod sends more than the {file.size} bytes it named")

    def _get(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        if self._connection is None:
            connection = http.client.HTTPConnection("localhost")
            connection.sock = self._connect()
            connection.sock.settimeout(_READ_SECONDS)
            self._connection = connection
        self._connection.request("GET", path, headers=headers)
        return self._connection.getresponse()


def checked_manifest(text: bytes, path: str) -> list[RemoteFile]:
    """The entries of a manifest. DownloadError for what is no manifest, or names a path outside of the one asked for."""
    try:
        entries = json.loads(text)
        found = [RemoteFile(e["path"], e["size"], e["sha256"]) for e in entries]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DownloadError(
            f"the list of {path}: found what is no list of files; is another program in the pod?"
        ) from None
    if len(found) > MAX_FILES:
        raise DownloadError(f"the list of {path} has {len(found)} files; at most {MAX_FILES} are fetched")
    seen: set[str] = set()
    for file in found:
        if type(file.size) is not int or file.size < 0 or not _SHA256.fullmatch(str(file.sha256)):
            raise DownloadError(f"the list of {path}: {file.path!r} has no valid size or digest")
        relative_to(file.path, path)
        folded = file.path.casefold()
        if folded in seen:
            raise DownloadError(f"the list of {path} names {file.path!r} twice")
        seen.add(folded)
    return found


def relative_to(path: object, root: str) -> PurePosixPath:
    """The path of a file as seen from `root`. DownloadError unless it is plainly below it (or `root` itself)."""
    if not isinstance(path, str) or not path or any(c in path for c in "\\:\0") or not path.isprintable():
        raise DownloadError(f"the pod names a path that is not safe to write: {path!r}")
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(part.endswith((".", " ")) for part in parts):
        raise DownloadError(f"the pod names a path that is not safe to write: {path!r}")
    found = PurePosixPath(path)
    if root and not found.is_relative_to(root):
        raise DownloadError(f"the pod names {path!r}, which is not below {root!r}")
    return found.relative_to(root) if root else found


def download(
    files: list[RemoteFile], client: FileClient, folder: Path, root: str, progress: Progress = lambda done, total: None
) -> None:
    """Fetches the files below `root` into `folder`, where they keep their paths from `root`.

    What is there already and has the right digest is kept; half a file goes on where it broke off. DownloadError for
    what cannot be fetched, does not fit the disk, or is not what its digest says, and then nothing of that name stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.size for file in files)
    free = shutil.disk_usage(folder).free
    if total > free + _present(files, folder, root):
        raise DownloadError(
            f"{total / 1e9:.1f} GB are to be fetched, but {folder} has {free / 1e9:.1f} GB free; free some, or give "
            f"another output_dir"
        )
    done = 0
    for file in files:
        target = _target(folder, relative_to(file.path, root), file)
        begin = done
        _fetch(file, client, target, lambda size, begin=begin: progress(begin + size, total))  # type: ignore[misc]
        done += file.size
        progress(done, total)


def _present(files: list[RemoteFile], folder: Path, root: str) -> int:
    found = 0
    for file in files:
        for path in _places(folder / relative_to(file.path, root)):
            with contextlib.suppress(OSError):
                found += path.stat().st_size
    return found


def _places(target: Path) -> tuple[Path, Path]:
    return target, target.with_name(f"{target.name}{_PART}")


def _target(folder: Path, relative: PurePosixPath, file: RemoteFile) -> Path:
    """Where a file goes. No link on the way is followed: it could lead anywhere."""
    here = folder
    for part in relative.parts or (PurePosixPath(file.path).name,):
        here = here / part
        if here.is_symlink():
            here.unlink()
    here.parent.mkdir(parents=True, exist_ok=True)
    return here


def _fetch(file: RemoteFile, client: FileClient, target: Path, progress: Callable[[int], None]) -> None:
    if target.is_file() and target.stat().st_size == file.size and _digest(target) == file.sha256:
        return
    part = _places(target)[1]
    if part.is_symlink() or (part.exists() and part.stat().st_size > file.size):
        part.unlink()
    idle = wrong = 0
    while True:
        begin = part.stat().st_size if part.exists() else 0
        try:
            with open(part, "ab") as out:
                for piece in client.read(file, begin) if begin < file.size else ():
                    out.write(piece)
                    progress(out.tell())
        except (OSError, http.client.HTTPException) as error:
            client.close()
            idle = idle + 1 if part.stat().st_size == begin else 0
            if idle == _TRIES:
                raise DownloadError(f"{file.path}: {error}; call again to go on where it broke off") from None
            continue
        if _digest(part) == file.sha256:
            os.replace(part, target)
            return
        # What was resumed may be of an older version; what was read in one go is not.
        part.unlink()
        wrong += 1
        if begin == 0 or wrong > 1:
            raise DownloadError(f"{file.path}: its digest is not the one in the list; nothing of it was kept")


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
