"""A real S3 server for tests: versitygw over a folder, as a process of its own, and a fault proxy before it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import S3Store

from lab import programs
from ports import free_port

ACCESS, SECRET = "nemo-rl-tests", "not-a-secret-of-anybody"
BUCKET = "bucket"


@dataclass
class S3:
    """A running server; `data` is the folder in which each bucket is a folder, and each object a file."""

    port: int
    data: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, url: str | None = None) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def objects(self, prefix: str = "", bucket: str = BUCKET) -> list[str]:
        """The names of all objects, as the server's own folder has them."""
        root = self.data / bucket
        found = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        return sorted(name for name in found if name.startswith(prefix) and not name.startswith(".sgwtmp"))


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[S3]:
    """versitygw with the bucket `bucket`; built from its Go module where the cache lacks it."""
    programs.ensure(("versitygw",))
    data = folder / "data"
    (data / BUCKET).mkdir(parents=True)
    port = free_port()
    command = [str(programs.path("versitygw")), "--port", f"127.0.0.1:{port}", "posix", str(data)]
    environment = os.environ | {"ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": SECRET}
    with open(folder / "versitygw.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"versitygw did not start: {(folder / 'versitygw.log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield S3(port, data, process)
    finally:
        process.kill()
        process.wait()


# --- faults -----------------------------------------------------------------------------------------------------------

ANSWERS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "full": (507, "QuotaExceeded", "The quota is used up."),
    "denied": (403, "AccessDenied", "Access Denied."),
    "skewed": (
        403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the server's time is too large.",
    ),
    "region": (400, "AuthorizationHeaderMalformed", "The region is wrong; expecting 'eu-north-1'."),
    "bucket": (404, "NoSuchBucket", "The specified bucket does not exist."),
    "key": (403, "InvalidAccessKeyId", "The access key that was given does not exist."),
}
"""Faults that are an answer in the server's place: status, code and message."""


class Local:
    """An HTTP server of this process, on a port of its own."""

    def _serve(self, handler: type[BaseHTTPRequestHandler]) -> None:
        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exception(), OSError):  # connections that are cut are what this is for
                    super().handle_error(request, client_address)

        class Silent(handler):  # type: ignore[misc,valid-type]
            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = Quiet(("127.0.0.1", 0), Silent)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@dataclass
class Faults(Local):
    """A proxy before an S3 server. `choose` is asked for each request: None passes it on.

    One of ANSWERS: that answer in the server's place; "reset": the connection is cut; "lost": the server does it, and
    its answer is cut; "truncated": half of the answer's body, then a cut; "slow": half a second late; "kill", "killed": as "reset"
    and as "lost", and `kill` is called before the cut; "kept": nothing is deleted, which an answer of 200 says of each object.
    """

    server: S3
    choose: Callable[[str, str], str | None] = lambda method, path: None
    kill: Callable[[], object] = lambda: None
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of each object that were the answer to GET, by its path."""
    unquoted: bool = False
    """Whether ETags in lists have no quotes, as in Azure's."""
    without_ranges: bool = False
    """Whether whole objects are the answer to a request for a part, as of a simple web server."""
    ignored: Collection[str] = ()
    """Conditions (`if-none-match`, `if-match`) that do not hinder a write, as a store does that does not know them."""

    def __post_init__(self) -> None:
        faults = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                fault = faults.choose(self.command, self.path)
                faults.seen.append((self.command, self.path, fault))
                length = int(self.headers.get("Content-Length") or 0)
                if fault in ("reset", "kill"):
                    self.rfile.read(length // 2)
                    if fault == "kill":
                        faults.kill()
                    return self._cut()
                body = self.rfile.read(length)
                if fault in ANSWERS:
                    return self._answer(*ANSWERS[fault])
                if fault == "kept":
                    keys = re.findall(rb"<Key>.*?</Key>", body)
                    told = [
                        b"<Error>%s<Code>AccessDenied</Code><Message>Access Denied</Message></Error>" % key
                        for key in keys
                    ]
                    return self._send(200, b"<DeleteResult>%s</DeleteResult>" % b"".join(told))
                if fault == "slow":
                    time.sleep(0.5)
                headers = dict(self.headers.items())
                if self.command == "PUT" and any(self.headers.get(name) for name in faults.ignored):
                    return self._overwrite(body)
                upstream = HTTPConnection("127.0.0.1", faults.server.port, timeout=60)
                try:
                    upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in headers.items():
                        upstream.putheader(name, value)
                    upstream.endheaders(body)
                    answer = upstream.getresponse()
                    status, content = answer.status, answer.read()
                    if faults.without_ranges and status == 206:
                        status, content = 200, (faults.server.data / self.path.strip("/")).read_bytes()
                    if self.command == "GET":
                        faults.sent[self.path.partition("?")[0]] += len(content)
                    if faults.unquoted and "list-type" in self.path:
                        content = content.replace(b"&#34;", b"").replace(b"&quot;", b"")
                    told = answer.getheaders()
                finally:
                    upstream.close()
                if fault == "killed":
                    faults.kill()
                if fault in ("lost", "killed"):
                    return self._cut()
                dropped = {"transfer-encoding", "connection", "content-length"}
                dropped |= {"content-range"} if status == 200 else set()
                self.send_response(status)
                for name, value in told:
                    if name.lower() not in dropped:
                        self.send_header(name, value)
                size = int(dict((k.lower(), v) for k, v in told).get("content-length", len(content)))
                self.send_header("Content-Length", str(size if self.command == "HEAD" else len(content)))
                self.end_headers()
                if fault == "truncated" and content:
                    self.wfile.write(content[: len(content) // 2])
                    return self._cut()
                self.wfile.write(content)

            def _overwrite(self, content: bytes) -> None:
                """As asked, but for the conditions. They are signed, so it is another request."""
                bucket, _, name = unquote(urlsplit(self.path).path).strip("/").partition("/")
                given = {"endpoint": faults.server.url, "region": "us-east-1"}
                keys = {"access_key_id": ACCESS, "secret_access_key": SECRET}
                store = S3Store(bucket, config={**given, **keys}, client_options={"allow_http": True})
                written = obstore.put(store, name, content)
                self.send_response(200)
                self.send_header("ETag", str(written["e_tag"]))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def _answer(self, status: int, code: str, message: str) -> None:
                self._send(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

            def _send(self, status: int, content: bytes) -> None:
                content = b"" if self.command == "HEAD" else content
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _cut(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

        self._serve(Handler)


class PodIdentity(Local):
    """Gives the server's keys for a few seconds to who asks, as EKS Pod Identity does. `cut`: so many requests get no answer."""

    def __init__(self) -> None:
        self.refuses, self.cut, self.given = False, 0, 0
        identity = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if identity.cut > 0:
                    identity.cut -= 1
                    return self.connection.shutdown(socket.SHUT_RDWR)
                until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
                keys = {"AccessKeyId": ACCESS, "SecretAccessKey": SECRET, "Token": ""}
                told = {"message": "no association"} if identity.refuses else keys
                self.send_response(404 if identity.refuses else 200)
                self.end_headers()
                self.wfile.write(json.dumps({**told, "Expiration": f"{until:%Y-%m-%dT%H:%M:%SZ}"}).encode())
                identity.given += not identity.refuses

        self._serve(Handler)

    @property
    def url(self) -> str:
        return f"{super().url}/v1/credentials"
