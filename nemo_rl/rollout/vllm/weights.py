"""The trainer's side of a weight update: writes a version as safetensors shards, slice by slice, and serves them by HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_rl.run.gathering import GatheredWeights, adapter_weights

KEPT = 2
"""Versions that stay: servers may still fetch the one before the newest."""
SHARD_BYTES = 2 * 2**30
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_CHUNK = 4 * 2**20


@dataclass(frozen=True)
class Published:
    """One version of the weights on disk. `name` holds a digest of the content: two versions of one number never share it."""

    version: int
    name: str
    folder: Path
    files: list[dict[str, Any]]
    """Of each its name, sha256 and size in bytes."""
    tied: dict[str, str] = field(default_factory=dict)
    """Names of weights that no shard holds by the names of those that they are the same as."""
    adapter: bool = False


class Publisher:
    """Writes versions below a folder of this machine and keeps the two newest. Every rank makes one; only the first has a folder."""

    def __init__(self, folder: Path | None, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._kept: list[Path] = []

    def publish(self, model: Any, version: int, *, adapter: bool = False) -> Published | None:
        """Writes the model's weights, or its LoRA adapter alone; None on ranks without a folder.

        Every rank calls it: sharded weights are gathered slice by slice, never all at once.
        """
        target = self.folder / f"version-{version}" if self.folder is not None else None
        if target is not None:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        tied: dict[str, str] = {}
        if adapter:
            weights = adapter_weights(model)
            if target is not None:
                model.save_pretrained(target, state_dict=weights, save_embedding_layers=False)
                for extra in set(target.iterdir()) - {target / name for name in ADAPTER_FILES}:
                    extra.unlink()
        else:
            tied = self._write_shards(model, target)
        if target is None:
            return None
        files = files_in(target)
        digest = hashlib.sha256(repr([(f["name"], f["sha256"]) for f in files]).encode()).hexdigest()[:16]
        self._kept = [*(path for path in self._kept if path != target), target]
        for old in self._kept[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        self._kept = self._kept[-KEPT:]
        return Published(version, f"{version}-{digest}", target, files, tied, adapter)

    def write_base(self, model: Any) -> None:
        """Writes the weights below the LoRA adapter to the folder `model`, from which a server is started."""
        target = self.folder / "model" if self.folder is not None else None
        if target is not None:
            target.mkdir(exist_ok=True)
        self._write_shards(model, target, merged=False)

    def _write_shards(self, model: Any, target: Path | None, merged: bool = True) -> dict[str, str]:
        shard: dict[str, Tensor] = {}
        size = number = 0
        failure: OSError | None = None

        def write() -> None:
            nonlocal shard, size, number, failure
            number += 1
            try:
                if failure is None and target is not None:
                    save_file(shard, target / f"model-{number:05d}.safetensors")
            except OSError as error:  # the other ranks go on gathering, and so must this one
                failure = error
            shard, size = {}, 0

        slices, tied = checkpoint_slices(model, merged)
        for part in slices:
            if target is None:
                continue
            for name, tensor in part.items():
                value = tensor.to("cpu", self.dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
                shard[name] = value.clone() if value.data_ptr() == tensor.data_ptr() else value
                size += value.numel() * value.element_size()
            if size >= SHARD_BYTES:
                write()
        if shard:
            write()
        if failure is not None:
            failure.add_note(f"while writing weights for the rollout servers to {target}")
            raise failure
        return tied


def checkpoint_slices(model: Any, merged: bool = True) -> tuple[Iterator[dict[str, Tensor]], dict[str, str]]:
    """Returns the weights as a checkpoint names them, one layer after the other, and the names of tied weights by what they are.

    Of a LoRA model those of its base, `merged` with the adapter or without it. On every rank: each slice of a sharded model is gathered by all.
    """
    from transformers.core_model_loading import revert_weight_conversion

    weights = GatheredWeights(model, merged)

    def read() -> Iterator[dict[str, Tensor]]:
        for members in weights.by_block():
            with torch.no_grad():
                yield revert_weight_conversion(weights.model, {name: weights.whole(name) for name in members})

    def renamed(name: str, as_name: str) -> str:
        return next(iter(revert_weight_conversion(weights.model, {as_name: weights.whole(name)})))

    tied = {renamed(original, copy): renamed(original, original) for copy, original in weights.tied.items()}
    return read(), tied


def files_in(folder: Path) -> list[dict[str, Any]]:
    """Of each file of a folder its name, sha256 and size in bytes."""
    return [_about(path) for path in sorted(folder.iterdir()) if path.is_file()]


def _about(path: Path) -> dict[str, Any]:
    with open(path, "rb") as stream:
        return {
            "name": path.name,
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
            "size": path.stat().st_size,
        }


# --- by HTTP --------------------------------------------------------------------------------------------------------


class _DualStack(ThreadingHTTPServer):
    """Listens on all addresses of this machine, of both families where it has them."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()  # without a look-up of its name, which may take seconds
        self.server_name, self.server_port = "", self.server_address[1]


class ShardServer:
    """Serves the files of published versions, and of the model's folder, to whoever has the token, with ranges, from a thread."""

    def __init__(self, folder: Path, token: str, host: str = "127.0.0.1") -> None:
        """`host`: the address of this machine by which the rollout servers reach it; empty: all of them."""
        self.folder = folder
        expected = f"Bearer {token}".encode()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                given = self.headers.get("Authorization", "").encode("latin-1", "replace")
                if not hmac.compare_digest(given, expected):
                    self.send_error(401)
                    return
                found = re.fullmatch(r"/(version-\d+|model)/([A-Za-z0-9][\w.-]*)", self.path)
                try:
                    stream = open(folder / found[1] / found[2], "rb") if found else None  # noqa: SIM115 - closed below
                except OSError:
                    stream = None
                if stream is None:
                    self.send_error(404)
                    return
                with stream:
                    size = stream.seek(0, 2)
                    asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                    start = int(asked[1]) if asked else 0
                    if start > size:
                        self.send_error(416)
                        return
                    self.send_response(206 if asked else 200)
                    self.send_header("Content-Length", str(size - start))
                    if asked:
                        self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                    self.end_headers()
                    stream.seek(start)
                    with contextlib.suppress(OSError):  # the other side has had enough
                        shutil.copyfileobj(stream, self.wfile, _CHUNK)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _DualStack((host, 0), Handler) if not host else ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self._host, self.port = host, int(self._server.server_address[1])
        self.url = f"http://{host or '127.0.0.1'}:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def url_for(self, peer: str) -> str:
        """Where the rollout server with this address finds the files."""
        parts = urlsplit(peer)
        host = self._host or own_address(parts.hostname or "127.0.0.1", parts.port or 80)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def own_address(peer: str, port: int) -> str:
    """The address of this machine on the way to a peer."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect((peer, port))
        return str(way.getsockname()[0])
    return "127.0.0.1"
