"""A server that answers as the XML API of Google Cloud Storage is documented to: generations, and conditions on them.

There is no real one to run here: of its emulators none knows x-goog-if-generation-match in this API, which runs in a store need.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from storage.server import Local

DATE = "Sun, 29 Nov 2026 12:00:00 GMT"


def digest(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Gcs(Local):
    """One bucket in memory. `objects`: name to (generation, content)."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.without_conditions = False
        generations, guard, server = itertools.count(1_700_000_000_000_000), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _name(self) -> str:
                return unquote(urlsplit(self.path).path).removeprefix("/bucket").lstrip("/")

            def do_PUT(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                wanted = self.headers.get("x-goog-if-generation-match")
                with guard:
                    there = server.objects.get(self._name(), (0, b""))[0]
                    if wanted is not None and int(wanted) != there and not server.without_conditions:
                        return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                    server.objects[self._name()] = (next(generations), content)
                    self._answer(200, b"", self._about())

            def do_GET(self) -> None:
                if not self._name():
                    return self._list(parse_qs(urlsplit(self.path).query).get("prefix", [""])[0])
                if self._name() not in server.objects:
                    return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
                about, (_, content) = self._about(), server.objects[self._name()]
                if self.headers.get("If-Match", about["ETag"]) != about["ETag"]:
                    return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                if (asked := self.headers.get("Range")) is None:
                    return self._answer(200, content, about)
                begin, end = (int(number) for number in asked.removeprefix("bytes=").split("-"))
                part = content[begin : end + 1]
                about["Content-Range"] = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
                self._answer(206, part, about)

            do_HEAD = do_GET

            def do_DELETE(self) -> None:
                found = server.objects.pop(self._name(), None)
                self._answer(204 if found else 404, b"")

            def _about(self) -> dict[str, str]:
                generation, content = server.objects[self._name()]
                return {"ETag": f'"{digest(content)}"', "x-goog-generation": str(generation), "Last-Modified": DATE}

            def _list(self, prefix: str) -> None:
                found = "".join(
                    f"<Contents><Key>{escape(name)}</Key><Generation>{generation}</Generation>"
                    f"<LastModified>2026-11-29T12:00:00.000Z</LastModified><ETag>&quot;{digest(content)}&quot;</ETag><Size>{len(content)}</Size></Contents>"
                    for name, (generation, content) in sorted(server.objects.items())
                    if name.startswith(prefix)
                )
                self._answer(
                    200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()
                )

            def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        self._serve(Handler)

    def write_account(self, path: Path) -> None:
        """A service account's file that leads to this server: GOOGLE_SERVICE_ACCOUNT names it."""
        keys = {"client_email": "", "private_key": "", "private_key_id": ""}
        path.write_text(json.dumps({"gcs_base_url": self.url, "disable_oauth": True, **keys}))
