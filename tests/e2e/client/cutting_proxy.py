"""A way to the API server on which every connection is cut again and again."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import yaml


class CuttingProxy:
    """Passes bytes on, TLS untouched, and breaks all connections off every `seconds`. A context manager."""

    def __init__(self, kubeconfig: Path, seconds: float) -> None:
        self.config = yaml.safe_load(kubeconfig.read_text())
        self.upstream = urlsplit(self.config["clusters"][0]["cluster"]["server"])
        self.seconds = seconds
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> CuttingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._cut, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.close()
        self._cut_now()

    def write_kubeconfig(self, path: Path) -> Path:
        """A kubeconfig that goes this way; the server's certificate is still checked for its own name."""
        cluster = self.config["clusters"][0]["cluster"]
        cluster |= {"server": f"https://127.0.0.1:{self._listener.getsockname()[1]}"}
        cluster |= {"tls-server-name": self.upstream.hostname}
        path.write_text(yaml.safe_dump(self.config))
        path.chmod(0o600)
        return path

    def _accept(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                server = socket.create_connection((self.upstream.hostname or "", self.upstream.port or 443))
                with self._lock:
                    self._open |= {client, server}
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                target.sendall(piece)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._open.discard(one)

    def _cut(self) -> None:
        while not self._ended.wait(self.seconds):
            self._cut_now()

    def _cut_now(self) -> None:
        with self._lock:
            cut, self._open = self._open, set()
        self.cuts += bool(cut)
        for one in cut:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
