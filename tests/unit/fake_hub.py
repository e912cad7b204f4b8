"""A hub on this machine that takes uploads, for tests."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload needs: repositories, preupload, Git LFS, commits."""

    files: dict[str, bytes]
    objects: dict[str, bytes]
    tokens: set[str]
    made: list[dict[str, Any]]
    endpoint: str
    refuses: int | None = None
    """Status of the answer to everything that writes."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def do_GET(self) -> None:
        if "/auth-check" in self.path:
            self.answer({}, self.refuses or 200)
        else:
            self.answer({"error": "nothing here"}, 404)

    def do_PUT(self) -> None:
        content = self.content()
        self.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.content()
        self.tokens.add(self.headers.get("Authorization", ""))
        if self.refuses is not None:
            self.answer({"error": "you may not write here"}, self.refuses)
            return
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer({"url": f"{self.root}/me/tiny"})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            self.answer(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": mode[f["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                        }
                        for f in files
                    ]
                }
            )
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.root}/lfs/{o['oid']}"}}}
                for o in objects
            ]
            self.answer({"transfer": "basic", "objects": actions})
        elif path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    self.files[entry["value"]["path"]] = self.objects[entry["value"]["oid"]]
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.root}/me/tiny/commit/{'0' * 40}"})
        else:
            self.answer({"valid": True})


@contextmanager
def serve_hub() -> Iterator[type[FakeHub]]:
    """A hub of its own, whose class tells what it got."""

    class Hub(FakeHub):
        files, objects, tokens, made = {}, {}, set(), []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Hub
    finally:
        server.shutdown()
