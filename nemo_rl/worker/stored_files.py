"""What the `x-files` pod serves of a job that writes to a store, for machines that cannot read the store themselves.

Names are those of the output claim: NAME/metrics.jsonl, NAME/checkpoints/step-00000100-g1/config.json. Nothing is kept on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator

from nemo_rl.errors import StorageError
from nemo_rl.job import uris
from nemo_rl.run.stored.head import CHECKPOINTS, FOLDER, MANIFEST, TEXTS, read_text
from nemo_rl.storage.store import PART_BYTES, Store
from nemo_rl.storage.transfer import File, checked
from nemo_rl.worker.served import Content, Refused

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
"""Less than clients wait for a byte."""
_PLACE = re.compile(
    rf"((?:run-\d+/)?)(?:({'|'.join(map(re.escape, TEXTS))})|{CHECKPOINTS}/({FOLDER.pattern})(?:/(.+))?)",
    re.ASCII,
)


class StoredTree:
    """The records of the runs of one job, and the files of their complete checkpoints, as the manifests there name them."""

    def __init__(self, uri: str, job: str) -> None:
        self.only = uris.joined(uri, job)
        self._job, self._store = job, Store(self.only, PATIENCE_SECONDS)
        self._texts: dict[str, bytes] = {}
        self._files: dict[str, dict[str, File]] = {}
        self._lock = threading.Lock()

    def manifest(self, name: str) -> Iterator[dict[str, object]]:
        """Path, size in bytes and SHA-256 of a record, or of each file of a checkpoint."""
        run, text, folder, path = self._place(name)
        if text:
            content = self._read_text(name, run, text)
            yield {"path": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            return
        files = self._named(name, run, folder).values()
        below = [file for file in files if not path or file.path == path or file.path.startswith(f"{path}/")]
        if not below:
            raise _missing(name)
        for file in below:
            full = f"{self._job}/{run}{CHECKPOINTS}/{folder}/{file.path}"
            yield {"path": full, "size": file.size, "sha256": file.sha256}

    @contextlib.contextmanager
    def content(self, name: str) -> Iterator[Content]:
        """A record as it was listed last, or a file that the manifest of its checkpoint names."""
        run, text, folder, path = self._place(name)
        if text:
            with self._lock:
                content = self._texts.get(name)
            if content is None:
                content = self._read_text(name, run, text)
            yield Content(len(content), hashlib.sha256(content).hexdigest(), _sender(content))
            return
        file = self._named(name, run, folder).get(path)
        if file is None:
            raise _missing(name)
        key = f"{run}{CHECKPOINTS}/{folder}/{path}"
        yield Content(file.size, file.sha256, lambda to, begin, end: self._send(key, to, begin, end))

    def _place(self, name: str) -> tuple[str, str, str, str]:
        """The run below the job's folder, and the record or the checkpoint's folder and the file in it."""
        match = _PLACE.fullmatch(name.removeprefix(f"{self._job}/")) if name.startswith(f"{self._job}/") else None
        if match is None:
            raise _missing(name)
        return match[1], match[2] or "", match[3] or "", match[match.re.groups] or ""

    def _read_text(self, name: str, run: str, text: str) -> bytes:
        with _refusing():
            content = read_text(self._store, f"{run}{text}")
        if content is None:
            raise _missing(name)
        with self._lock:
            self._texts[name] = content
        return content

    def _named(self, name: str, run: str, folder: str) -> dict[str, File]:
        place = f"{run}{CHECKPOINTS}/{folder}"
        with self._lock:
            known = self._files.get(place)
        if known is None:
            with _refusing():
                found = self._store.read(f"{place}/{MANIFEST}")
                if found is None:
                    raise _missing(name)
                try:
                    entries = json.loads(found[0])["files"]
                except (ValueError, KeyError, TypeError):
                    raise Refused(502, f"the {MANIFEST} of {name!r} in the store is damaged") from None
                known = {file.path: file for file in checked(entries, f"{place}/{MANIFEST}")}
            with self._lock:
                self._files[place] = known
        return known

    def _send(self, key: str, to: socket.socket, begin: int, end: int) -> int:
        sent = 0
        try:
            for start in range(begin, end, PART_BYTES):
                piece = self._store.read_range(key, start, min(start + PART_BYTES, end))
                to.sendall(piece)
                sent += len(piece)
        except StorageError as error:
            logger.warning("%s", error)
        return sent


def _sender(content: bytes) -> Callable[[socket.socket, int, int], int]:
    def send(to: socket.socket, begin: int, end: int) -> int:
        to.sendall(content[begin:end])
        return end - begin

    return send


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with the store is said to who asks."""
    try:
        yield
    except StorageError as error:
        raise Refused(502, str(error)) from None


def _missing(name: str) -> Refused:
    return Refused(404, f"found nothing to read at {name!r}; records and complete checkpoints of the job are served")
