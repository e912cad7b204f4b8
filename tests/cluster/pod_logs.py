"""The part of a kubelet that serves logs, played by the tests: behind the real API server, which checks the viewer's rights."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cluster.api import Api, Object
from lab import pki


class LogNode:
    """A node whose pods have the logs that a test writes: lines with time stamps of whole seconds."""

    def __init__(self, api: Api, name: str, folder: Path) -> None:
        self.api, self.name = api, name
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.asked: list[dict[str, str]] = []
        """The questions, as the API server passes them on."""
        folder.mkdir(parents=True, exist_ok=True)
        pki.Authority(folder).certificate("kubelet", "/CN=kubelet", "serverAuth", ["IP:127.0.0.1"])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "kubelet.crt", folder / "kubelet.key")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, name="log-node", daemon=True).start()
        api.create("nodes", None, {"metadata": {"name": name}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self.server.server_address[1]}},
        }
        api.patch("nodes", None, name, {"status": status}, "status")

    def write(self, pod: str, *lines: str, second: int = 0) -> None:
        """Appends lines to the log of a pod, at this second of some minute."""
        self.logs.setdefault(pod, []).extend((f"2026-11-29T05:00:{second:02d}", line) for line in lines)

    def pod(self, namespace: str, name: str, labels: dict[str, str], phase: str = "Running") -> Object:
        """A pod on this node, with a container that is called trainer."""
        body = {
            "metadata": {"name": name, "labels": labels},
            "spec": {"nodeName": self.name, "containers": [{"name": "trainer", "image": "none"}]},
        }
        self.api.create("pods", namespace, body)
        return self.api.patch("pods", namespace, name, {"status": {"phase": phase}}, "status")

    def text(self, pod: str, query: dict[str, str]) -> str:
        since = query.get("sinceTime", "").removesuffix("Z")
        lines = [(stamp, line) for stamp, line in self.logs.get(pod, []) if stamp >= since]
        lines = lines[-int(query["tailLines"]) :] if "tailLines" in query else lines
        return "".join(f"{stamp}.5Z {line}\n" for stamp, line in lines)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.api.delete("nodes", None, self.name)


@contextmanager
def log_node(api: Api, name: str, folder: Path) -> Iterator[LogNode]:
    node = LogNode(api, name, folder)
    try:
        yield node
    finally:
        node.close()


def _handler(node: LogNode) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            node.asked.append(query)
            content = node.text(url.path.split("/")[3], query).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
