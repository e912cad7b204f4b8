"""Downloads from the real file server over broken connections, and what a malicious one may try."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.backends.kubernetes import fetch, outputs
from nemo_rl.backends.kubernetes.errors import DownloadError
from nemo_rl.backends.kubernetes.fetch import FileClient, RemoteFile, checked_manifest, download, relative_to
from nemo_rl.job import names
from nemo_rl.run.directory import METRICS_FILE
from nemo_rl.worker.files import FileServer, Tree

DIGEST = "0" * 64


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    """The root of an output claim with the output of the job x."""
    root = tmp_path / "claim"
    step = root / "x" / "checkpoints" / "step-00000003"
    (step / "trainer_state").mkdir(parents=True)
    (step / "config.json").write_text("{}")
    (step / "model.safetensors").write_bytes(random.Random(0).randbytes(3_000_000))
    (step / "state.json").write_text('{"step": 3}')
    (step / "trainer_state" / "moments").write_bytes(b"m" * 1000)
    (root / "x" / "checkpoints" / "best").symlink_to(step.name)
    (root / "x" / METRICS_FILE).write_text("".join(f'{{"step": {i}, "reward": 0.{i}}}\n' for i in (1, 2, 3)))
    return root


@pytest.fixture
def server(claim: Path) -> Iterator[FileServer]:
    served = FileServer(Tree(claim, "x"), 0)
    thread = threading.Thread(target=served.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def connect_to(port: int) -> Callable[[], socket.socket]:
    return lambda: socket.create_connection(("127.0.0.1", port), timeout=10)


class Breaking:
    """A socket that ends after so many bytes, as a port-forward does."""

    def __init__(self, real: socket.socket, limit: int) -> None:
        self._real, self._left = real, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def makefile(self, mode: str, *_: Any, **__: Any) -> Any:
        return io.BufferedReader(_BreakingReader(self))

    def take(self, buffer: memoryview) -> int:
        if self._left <= 0:
            raise ConnectionResetError("broken")
        size = self._real.recv_into(buffer[: self._left])
        self._left -= size
        return size


class _BreakingReader(io.RawIOBase):
    def __init__(self, owner: Breaking) -> None:
        self._owner = owner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._owner.take(memoryview(buffer))


def job(checkpoint: str = "x/checkpoints/step-00000003", **metadata: Any) -> dict[str, Any]:
    kept = {"best": checkpoint, "bestStep": 3, "latest": checkpoint, "latestStep": 3}
    return {
        "metadata": {"name": "x", "uid": "u1", "namespace": "team", **metadata},
        "spec": {"model": "m", "dataset": {"name": "d"}, "reward": {"builtin": "exact_match"}},
        "status": {"phase": "Succeeded", "result": {"totalSteps": 3, "checkpoint": kept}},
    }


class _Cluster:
    namespace = "team"


def collect(output: Path, port: int, resource: dict[str, Any] | None = None, connect: Any = None) -> Any:
    import contextlib

    client = FileClient(connect or connect_to(port))
    opened = contextlib.closing(client)
    return outputs.collect(_Cluster(), resource or job(), output, lambda name: opened, lambda text: None)  # type: ignore[arg-type]


def test_the_result_is_complete_without_the_optimizers_state(server: FileServer, claim: Path, tmp_path: Path) -> None:
    result = collect(tmp_path / "out", server.server_port)
    folder = tmp_path / "out" / "checkpoints" / "step-00000003"
    assert result.checkpoint_path == str(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "state.json"]
    there = claim / "x" / "checkpoints" / "step-00000003" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == there.read_bytes()
    assert (result.total_steps, result.metrics["reward"]) == (3, 0.3)
    assert [row["step"] for row in result.history] == [1, 2, 3]


def test_fetching_again_keeps_the_folder_and_another_job_goes_beside_it(server: FileServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    collect(out, server.server_port)
    collect(out, server.server_port)
    assert [p.name for p in tmp_path.glob("out*")] == ["out"]
    collect(out, server.server_port, job(uid="u2"))
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out", "out-2"]


def test_broken_connections_are_resumed_where_they_broke(server: FileServer, tmp_path: Path) -> None:
    opened: list[int] = []

    def connect() -> Any:
        opened.append(1)
        return Breaking(connect_to(server.server_port)(), 250_000)

    result = collect(tmp_path / "out", 0, connect=connect)
    assert len(opened) >= 12
    assert os.path.getsize(Path(result.checkpoint_path) / "model.safetensors") == 3_000_000


def test_half_a_file_of_another_content_is_thrown_away(server: FileServer, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(b"z" * 1_000_000)
    client = FileClient(connect_to(server.server_port))
    files = client.manifest("x/checkpoints/step-00000003")
    download(files, client, tmp_path / "out", "x")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == next(f.sha256 for f in files if f.path.endswith("model.safetensors"))
    assert not list(folder.glob("*.part"))


def test_nothing_is_written_through_a_link(server: FileServer, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").symlink_to(outside)
    client = FileClient(connect_to(server.server_port))
    download(client.manifest("x/checkpoints/step-00000003"), client, tmp_path / "out", "x")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "../etc/passwd",
        "/etc/passwd",
        "x/../../y",
        "x//y",
        "x/./y",
        "x/",
        "",
        "y/file",
        "xx/file",
        "x\\..\\y",
        "C:/x",
        "x/a\0b",
        "x/a\nb",
        "x/..",
        "x/con. ",
        None,
        7,
        ["x"],
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(path: Any) -> None:
    with pytest.raises(DownloadError):
        relative_to(path, "x")
    entry = {"path": path, "size": 1, "sha256": DIGEST}
    with pytest.raises(DownloadError):
        checked_manifest(json.dumps([entry]).encode(), "x")


@pytest.mark.parametrize("path", ["../out", "/out", "y/checkpoints/step-1", "x/../y"])
def test_a_checkpoint_elsewhere_in_the_status_is_refused(server: FileServer, tmp_path: Path, path: str) -> None:
    with pytest.raises(DownloadError):
        collect(tmp_path / "out", server.server_port, job(checkpoint=path))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"garbage",
        b"{}",
        b"[1]",
        b"[" * 100_000,
        b'[{"path": "x/a"}]',
        b'[{"path": "x/a", "size": -1, "sha256": "%s"}]' % DIGEST.encode(),
        b'[{"path": "x/a", "size": true, "sha256": "%s"}]' % DIGEST.encode(),
        b'[{"path": "x/a", "size": 1, "sha256": "zz"}]',
        json.dumps([{"path": p, "size": 1, "sha256": DIGEST} for p in ("x/a", "x/A")]).encode(),
        json.dumps([{"path": f"x/{i}", "size": 0, "sha256": DIGEST} for i in range(fetch.MAX_FILES + 1)]).encode(),
    ],
)
def test_a_list_that_is_none_is_refused(text: bytes) -> None:
    if text == b"{}":
        assert checked_manifest(text, "x") == []
        return
    with pytest.raises(DownloadError):
        checked_manifest(text, "x")


class Liar(http.server.BaseHTTPRequestHandler):
    """Answers every file with the body of the test."""

    protocol_version = "HTTP/1.1"
    body = b""
    length: int | None = None

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.length if self.length is not None else len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def liar() -> Iterator[Callable[..., FileClient]]:
    servers: list[http.server.ThreadingHTTPServer] = []

    def make(body: bytes, length: int | None = None) -> FileClient:
        handler = type("Lie", (Liar,), {"body": body, "length": length})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return FileClient(connect_to(servers[-1].server_port))

    yield make
    for one in servers:
        one.shutdown()
        one.server_close()


def test_a_wrong_digest_is_refused_and_nothing_stays(liar: Any, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="digest"):
        download([RemoteFile("x/a", 5, DIGEST)], liar(b"hello"), tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_list_named_is_refused(liar: Any, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="more than the 5 bytes"):
        download([RemoteFile("x/a", 5, DIGEST)], liar(b"h" * 2_000_000), tmp_path, "x")
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 5


def test_more_than_the_disk_holds_is_refused_first(liar: Any, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="free"):
        download([RemoteFile("x/a", 1 << 60, DIGEST)], liar(b""), tmp_path, "x")


def test_a_list_that_never_ends_is_refused(liar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(DownloadError, match="1001 bytes"):
        liar(b"[" + b" " * 5000 + b"]").manifest("x")


def test_a_job_name_is_the_folder_on_the_claim() -> None:
    assert names.OUTPUT_DIR == "/output"
    assert str(relative_to("x/checkpoints/step-1", "x")) == "checkpoints/step-1"
