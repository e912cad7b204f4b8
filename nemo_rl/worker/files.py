"""The file server of the `x-files` pod: reads the output of one job, on the loopback only, with the standard library alone.
Of a job that writes to a store the output is read from there (`worker.stored_files`).

    GET /manifest?path=NAME/checkpoints/best   [{"path": …, "size": bytes, "sha256": hex}, …]: all files below, by path
    GET /files/NAME/metrics.jsonl              the bytes; Range and If-Range (by ETag) resume a broken download

Paths count from the root of the output claim, as those in the job's status do. Clients come through the API server's
port-forward, whose authorisation guards what is served here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedReader
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from nemo_rl.job import names
from nemo_rl.worker.digest import check_digest
from nemo_rl.worker.served import Content, Refused, Served

MANIFEST = "/manifest"
FILES = "/files/"
ADDRESS = "127.0.0.1"
IDLE_SECONDS = 60.0
"""A connection without a request, or a client that takes no bytes, is dropped after this."""
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Tree:
    """The files that may be read: those below `root`/`only`, and nothing that a link outside of it names."""

    def __init__(self, root: Path, only: str = "") -> None:
        self.root = root.resolve()
        self.only = self.root / only
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}
        self._lock = threading.Lock()

    def find(self, name: str) -> Path:
        """The real path of a name; Refused for what is not there, and alike for what is not to be read."""
        missing = Refused(404, f"found nothing to read at {name!r}; paths count from the output claim's root")
        try:
            path = (self.root / name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise missing from None
        if not path.is_relative_to(self.only):
            raise missing
        return path

    def open(self, name: str) -> BufferedReader:
        """A plain file, to be read."""
        path = self.find(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise Refused(404, f"{name!r} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Refused(404, f"{name!r} is not a file; {MANIFEST}?path= lists a folder")
        return os.fdopen(descriptor, "rb")

    @contextlib.contextmanager
    def content(self, name: str) -> Iterator[Content]:
        """A plain file, to be sent."""
        with self.open(name) as file:
            found = os.fstat(file.fileno())
            tag = f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"
            # sendfile sends less of a file that was cut meanwhile
            yield Content(found.st_size, tag, lambda to, begin, end: to.sendfile(file, begin, end - begin))

    def manifest(self, name: str) -> Iterator[dict[str, object]]:
        """Path, size in bytes and SHA-256 of the file, or of each file below the folder. Links below it are left out."""
        top = self.find(name) if name else self.only
        for path in [top] if top.is_file() else _files_below(top):
            relative = str(path.relative_to(self.root))
            try:
                with self.open(relative) as file:
                    size, digest = self._digest(path, file)
            except Refused:
                continue  # removed since it was listed, as old checkpoints are
            yield {"path": relative, "size": size, "sha256": digest}

    def _digest(self, path: Path, file: BufferedReader) -> tuple[int, str]:
        """Kept until the file changes: checkpoints are large, and asked for again after a broken download."""
        found = os.fstat(file.fileno())
        state = (found.st_ino, found.st_size, found.st_mtime_ns)
        with self._lock:
            known = self._digests.get(path)
        if known is None or known[0] != state:
            known = (state, hashlib.file_digest(file, "sha256").hexdigest())
            with self._lock:
                self._digests[path] = known
        return found.st_size, known[1]


def _files_below(folder: Path) -> list[Path]:
    found = []
    for parent, _, files in os.walk(folder):
        found += [path for name in files if not (path := Path(parent, name)).is_symlink() and path.is_file()]
    return sorted(found)


class FileServer(ThreadingHTTPServer):
    """Serves a tree on the loopback. Port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, tree: Served, port: int = names.FILES_PORT) -> None:
        self.tree = tree
        super().__init__((ADDRESS, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"  # a new connection through a port-forward costs several round trips
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        try:
            if url.path == MANIFEST:
                self._manifest(parse_qs(url.query).get("path", [""])[0])
            elif url.path.startswith(FILES):
                self._file(unquote(url.path.removeprefix(FILES), errors="surrogateescape"))
            else:
                raise Refused(404, f"expected {MANIFEST} or {FILES}…")
        except Refused as error:
            self._refuse(error)

    def _other_method(self) -> None:
        self.close_connection = True  # a body that was sent along is not read
        self._refuse(Refused(405, "files are read by GET alone"))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _other_method

    def _manifest(self, name: str) -> None:
        """Sent entry by entry, because the digests of large files take a while. A cut answer is no valid JSON."""
        entries = self.server.tree.manifest(name)
        first = next(entries, None)  # a name that is refused is refused before the answer begins
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b"[" + (json.dumps(first).encode() if first else b""))
        for entry in entries:
            self._chunk(b",\n" + json.dumps(entry).encode())
        self._chunk(b"]\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _file(self, name: str) -> None:
        with self.server.tree.content(name) as found:
            tag = f'"{found.tag}"'
            span = self._range(found.size, tag)
            begin, end = span or (0, found.size)
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{found.size}")
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", tag)
            self.end_headers()
            if end > begin and found.send(self.connection, begin, end) != end - begin:
                self.close_connection = True  # the client sees too few bytes, and asks again

    def _range(self, size: int, tag: str) -> tuple[int, int] | None:
        """The asked bytes as (begin, end), or None for all: also for several ranges, and for those of another version."""
        match = _RANGE.fullmatch(self.headers.get("Range", "").replace(" ", ""))
        if match is None or not any(match.groups()) or self.headers.get("If-Range", tag) != tag:
            return None
        first, last = match.groups()
        if not first:  # the last n bytes
            begin, end = max(0, size - int(last)), size
        else:
            begin, end = int(first), min(size, int(last) + 1) if last else size
        if begin >= end:
            raise Refused(416, f"the file has {size} bytes")
        return begin, end

    def _refuse(self, error: Refused) -> None:
        body = f"{error}\n".encode(errors="backslashreplace")
        self.send_response(error.status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if error.status == 405:
            self.send_header("Allow", "GET")
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """What is fetched is no news."""


def job_of(path: Path) -> tuple[str, str | None]:
    """The name in the frozen job, whose folder alone is served, and the store that it writes to; an empty name where there is
    no such job: then all of the root is.

    ValueError where the frozen job is not the one that the operator made.
    """
    wanted = os.environ.get(names.JOB_DIGEST_VARIABLE)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if wanted:
            raise
        return "", None
    check_digest(content, wanted)
    job = json.loads(content)
    return str(job["metadata"]["name"]), (job.get("spec", {}).get("output") or {}).get("uri")


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {names.FILES_MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(names.OUTPUT_DIR), help="root of the output claim")
    parser.add_argument("--job", type=Path, default=Path(names.JOB_FILE), help="frozen job, whose folder is served")
    parser.add_argument("--port", type=int, default=names.FILES_PORT, help="0 takes a free one")
    options = parser.parse_args()
    # Process 1 has no default action for SIGTERM. Nothing is written here, so nothing can be lost.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    name, uri = job_of(options.job)
    tree: Served = Tree(options.root, name)
    if uri is not None:
        from nemo_rl.worker.stored_files import StoredTree

        tree = StoredTree(uri, name)
    server = FileServer(tree, options.port)
    print(f"serving {server.tree.only} on {ADDRESS}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
