"""The file server of a job that writes to a store, as its pod runs it, and a client that cannot read the store itself."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.backends.kubernetes import outputs
from nemo_rl.backends.kubernetes.errors import ClusterError, DownloadError
from nemo_rl.backends.kubernetes.fetch import FileClient
from nemo_rl.job import names
from nemo_rl.run.stored.head import encoded, marked
from nemo_rl.storage import store as stores
from nemo_rl.storage.store import Store
from storage.server import S3

URI = "s3://bucket/served"
FOLDER = "checkpoints/step-00000003-g2"
METRICS = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "loss": 0.5}\n'
FILES = {
    "config.json": b"{}",
    "model.safetensors": os.urandom(stores.PART_BYTES + 1000),
    "state.json": b'{"step": 3}',
    "trainer_state/moments": b"m" * 100,
}


def job() -> dict[str, Any]:
    kept = {"best": f"{URI}/x/{FOLDER}", "bestStep": 3, "latest": f"{URI}/x/{FOLDER}", "latestStep": 3}
    return {
        "metadata": {"name": "x", "uid": "u1", "namespace": "team"},
        "spec": {"model": "m", "algorithm": "sft", "dataset": {"name": "d"}, "output": {"uri": URI}},
        "status": {"phase": "Succeeded", "result": {"totalSteps": 3, "checkpoint": kept}},
    }


@pytest.fixture
def written(store_environment: S3) -> Store:
    store = Store(f"{URI}/x")
    store.write("run.json", b"{}")
    store.write("metrics.jsonl", marked(METRICS, 2))
    store.write("secret.txt", b"KEEP OUT")
    Store(f"{URI}/y").write("metrics.jsonl", marked(METRICS, 1))
    for name, content in FILES.items():
        store.write(f"{FOLDER}/{name}", content)
    files = [{"path": n, "size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in FILES.items()]
    store.write(f"{FOLDER}/manifest.json", encoded({"format": 3, "step": 3, "files": files}))
    return store


@pytest.fixture
def port(written: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of the server as its pod runs it; this process has other keys."""
    (tmp_path / "job.json").write_text(json.dumps(job()))
    command = [sys.executable, "-m", names.FILES_MODULE, "--job", str(tmp_path / "job.json"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        match = re.search(r":(\d+)$", process.stdout.readline())
        assert match
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
        yield int(match[1])
    finally:
        process.kill()
        process.wait()


def test_a_client_without_keys_has_the_result_through_the_pod(port: int, tmp_path: Path) -> None:
    said: list[str] = []
    opened = contextlib.closing(FileClient(lambda: socket.create_connection(("127.0.0.1", port), timeout=30)))
    cluster: Any = type("Cluster", (), {"namespace": "team"})()
    result = outputs.collect(cluster, job(), tmp_path / "out", lambda name: opened, said.append)
    folder = tmp_path / "out" / "checkpoints" / "step-00000003"
    assert (result.checkpoint_path, result.checkpoint_uri) == (str(folder), f"{URI}/x/{FOLDER}")
    assert [row["loss"] for row in result.history] == [2.0, 1.0, 0.5]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: content for name, content in FILES.items() if not name.startswith("trainer_state/")}
    assert any("cannot be read from this machine, so a pod of the job serves the result" in text for text in said)
    assert any("does not know the access key" in text for text in said)


def test_where_neither_way_works_both_reasons_are_said(port: int, tmp_path: Path) -> None:
    def refuse(name: str) -> Any:
        raise ClusterError("pod x-files does not run after 300 s (no node has room)")

    cluster: Any = type("Cluster", (), {"namespace": "team"})()
    with pytest.raises(DownloadError) as caught:
        outputs.collect(cluster, job(), tmp_path / "out", refuse, lambda text: None)
    assert "does not know the access key" in str(caught.value)
    assert "no node has room" in str(caught.value)


def get(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_ranges_are_exact_and_nothing_but_the_output_is_served(port: int, written: Store) -> None:
    name = f"/files/x/{FOLDER}/model.safetensors"
    weights = FILES["model.safetensors"]
    for begin in (5, stores.PART_BYTES - 1, len(weights) - 1):
        assert get(port, name, Range=f"bytes={begin}-") == (206, weights[begin:])
    for other in (
        *("x/run.json", "x/secret.txt", "y/metrics.jsonl", "x/run-2/metrics.jsonl", f"x/{FOLDER}/manifest.json"),
        *(f"x/{FOLDER}/../../secret.txt", f"x/{FOLDER}/lost", "x/checkpoints/step-00000009-g1/config.json", "", "x"),
    ):
        assert get(port, f"/files/{other}")[0] == 404, other
        assert get(port, f"/manifest?path={other}")[0] == 404, other
