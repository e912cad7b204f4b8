"""The HTTP server of a trainer pod: /progress for the operator, /metrics for Prometheus, /healthz for probes."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from nemo_rl.job.status import Progress
from nemo_rl.worker.prometheus import CONTENT_TYPE, TrainMetrics
from nemo_rl.worker.report import Report

SOCKET_SECONDS = 5.0
"""A client that neither sends nor reads for this long is dropped."""


class ReportServer(ThreadingHTTPServer):
    """Serves a report from daemon threads. OSError when the port is taken."""

    daemon_threads = True
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, port: int, report: Report, metrics: TrainMetrics, host: str = "") -> None:
        self.report, self.metrics = report, metrics
        if host:
            self.address_family = socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:  # clusters with one or both families
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()  # without a reverse look-up of the name, which may take seconds
        self.server_name, self.server_port = "", self.server_address[1]

    def start(self) -> None:
        """Answers from now on; never blocks the caller."""
        threading.Thread(target=self.serve_forever, name="report-server", daemon=True).start()


def encode(progress: Progress) -> bytes:
    """JSON of a progress, with what a dump of the model leaves to other parts of the status."""
    found = progress.model_dump(mode="json", by_alias=True, exclude_none=True)
    for name in ("checkpoint", "bottleneck"):
        if (part := getattr(progress, name)) is not None:
            found[name] = part.model_dump(mode="json", by_alias=True, exclude_none=True)
    if progress.rollout is not None:
        found["rollout"] = [one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in progress.rollout]
    return json.dumps(found).encode()


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = SOCKET_SECONDS

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/progress":
            self._answer(200, "application/json", encode(self.server.report.progress()))
        elif path == "/metrics":
            self._answer(200, CONTENT_TYPE, self.server.metrics.text())
        elif path == "/healthz":
            healthy, sentence = self.server.report.health()
            self._answer(200 if healthy else 503, "text/plain; charset=utf-8", f"{sentence}\n".encode())
        else:
            self._answer(404, "text/plain; charset=utf-8", b"expected /progress, /metrics or /healthz\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests come every few seconds and would drown the training's own lines."""
