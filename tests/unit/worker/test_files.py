"""The file server: whole and broken downloads arrive intact, and nothing but the job's output can be read."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.job import names

BIG = 48 * 2**20


class Client:
    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, headers=sent)
        answer = self.connection.getresponse()
        return answer.status, answer.read(), answer.headers

    def manifest(self, path: str) -> list[dict[str, Any]]:
        status, body, _ = self.get(f"/manifest?path={path}")
        assert status == 200, body
        return json.loads(body)


@pytest.fixture(scope="module")
def claim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("claim")
    run = root / "out" / "yes"
    checkpoint = run / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(os.urandom(2**20) * (BIG // 2**20))
    (checkpoint / "config.json").write_text("{}")
    (run / "checkpoints" / "best").symlink_to("step-00000002")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "naïve name%.txt").write_text("x")
    (run / "empty").touch()
    (run / "way-out").symlink_to("/etc/passwd")
    (run / "way-up").symlink_to("../../secret")
    os.mkfifo(run / "pipe")
    other = root / "out" / "other"
    other.mkdir()
    (other / "weights").write_text("of another job")
    (root / "out" / "yes-too").write_text("a name that begins alike")
    (root / "secret").write_text("KEEP OUT")
    (root / "job.json").write_text(json.dumps({"metadata": {"name": "yes"}}))
    return root


@pytest.fixture(scope="module")
def server(claim: Path) -> Iterator[tuple[int, int]]:
    """(port, process id) of the server as the pod runs it, with this machine's paths."""
    command = [sys.executable, "-m", names.FILES_MODULE, "--root", claim / "out", "--job", claim / "job.json"]
    process = subprocess.Popen([*map(str, command), "--port", "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    match = re.search(r":(\d+)$", line)
    assert match, line
    yield int(match[1]), process.pid
    process.terminate()
    assert process.wait(timeout=10) == 0


@pytest.fixture
def client(server: tuple[int, int]) -> Client:
    return Client(server[0])


def test_a_manifest_lists_every_file_below_with_size_and_digest(client: Client, claim: Path):
    found = client.manifest("yes/checkpoints")
    assert [entry["path"] for entry in found] == [
        "yes/checkpoints/step-00000002/config.json",
        "yes/checkpoints/step-00000002/model.safetensors",
    ]
    for entry in found:
        content = (claim / "out" / entry["path"]).read_bytes()
        assert entry["size"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_link_to_a_checkpoint_is_followed_when_it_is_asked_for(client: Client):
    assert client.manifest("yes/checkpoints/best") == client.manifest("yes/checkpoints/step-00000002")


def test_a_manifest_without_a_path_is_of_the_whole_job_without_links_and_pipes(client: Client):
    found = {entry["path"] for entry in client.manifest("")}
    assert "yes/metrics.jsonl" in found
    assert not any("way-" in path or "pipe" in path or path.startswith("other") for path in found)


def test_a_digest_follows_the_file_when_it_changes(client: Client, claim: Path):
    before = client.manifest("yes/metrics.jsonl")[0]
    with open(claim / "out/yes/metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n')
    after = client.manifest("yes/metrics.jsonl")[0]
    assert after["size"] == before["size"] + 12
    assert after["sha256"] == hashlib.sha256((claim / "out/yes/metrics.jsonl").read_bytes()).hexdigest()


def test_a_large_file_arrives_in_pieces_as_it_is_and_is_never_held_in_memory(
    client: Client, claim: Path, server: tuple[int, int]
):
    path = "yes/checkpoints/step-00000002/model.safetensors"
    digest, begin, tag = hashlib.sha256(), 0, None
    while begin < BIG:
        last = min(begin + 20_000_003, BIG) - 1
        headers = {"Range": f"bytes={begin}-{last}"} | ({"If_Range": tag} if tag else {})
        status, body, answered = client.get(f"/files/{path}", **headers)
        assert status == 206
        assert answered["Content-Range"] == f"bytes {begin}-{last}/{BIG}"
        tag = answered["ETag"]
        digest.update(body)
        begin += len(body)
    assert digest.hexdigest() == client.manifest(path)[0]["sha256"]
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server[1]}/status").read_text())
    assert peak is not None
    assert int(peak[1]) * 1024 < BIG


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("bytes=0-3", (0, 4)), ("bytes=5-", (5, None)), ("bytes=-4", (-4, None)), ("bytes=2-999999", (2, None))],
)
def test_a_range_gives_exactly_those_bytes(client: Client, claim: Path, asked: str, expected: tuple[int, int | None]):
    content = (claim / "out/yes/metrics.jsonl").read_bytes()
    status, body, _ = client.get("/files/yes/metrics.jsonl", Range=asked)
    assert (status, body) == (206, content[slice(*expected)])


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "lines=1-2", "bytes=-"])
def test_a_range_that_is_not_understood_gives_the_whole_file(client: Client, claim: Path, asked: str):
    status, body, _ = client.get("/files/yes/metrics.jsonl", Range=asked)
    assert (status, body) == (200, (claim / "out/yes/metrics.jsonl").read_bytes())


def test_a_range_of_an_older_version_gives_the_whole_file(client: Client, claim: Path):
    status, body, _ = client.get("/files/yes/metrics.jsonl", Range="bytes=3-", If_Range='"older"')
    assert (status, body) == (200, (claim / "out/yes/metrics.jsonl").read_bytes())


def test_a_range_beyond_the_end_is_refused_with_the_size(client: Client, claim: Path):
    status, body, _ = client.get("/files/yes/metrics.jsonl", Range="bytes=999999-")
    assert status == 416
    assert str((claim / "out/yes/metrics.jsonl").stat().st_size) in body.decode()


def test_an_empty_file_and_a_strange_name_arrive(client: Client):
    assert client.get("/files/yes/empty")[:2] == (200, b"")
    assert client.get("/files/yes/na%C3%AFve%20name%25.txt")[:2] == (200, b"x")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "yes/../../secret",
        "yes/%2e%2e/%2e%2e/secret",
        "yes/..%2f..%2fsecret",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "yes/way-out",
        "yes/way-up",
        "other/weights",
        "yes/../other/weights",
        "yes-too",
        "yes/pipe",
        "yes/checkpoints",
        "yes/missing",
        "yes/%00",
        "yes/%ff",
        "",
        ".",
        "yes/" + "a" * 5000,
    ],
)
def test_nothing_else_can_be_read(client: Client, name: str):
    status, body, _ = client.get(f"/files/{name}")
    assert status == 404
    assert b"KEEP OUT" not in body
    assert b"root:" not in body


@pytest.mark.parametrize("name", ["..", "../secret", "other", "yes/way-up", "/etc", "yes/missing"])
def test_nothing_else_can_be_listed(client: Client, name: str):
    assert client.get(f"/manifest?path={name}")[0] == 404


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_other_methods_are_refused(client: Client, method: str):
    status, _, headers = client.get("/files/yes/metrics.jsonl", method=method)
    assert (status, headers["Allow"]) == (405, "GET")


def test_other_paths_are_refused(client: Client):
    assert client.get("/")[0] == 404
    assert client.get("/filesyes/metrics.jsonl")[0] == 404


def test_one_connection_serves_many_requests(client: Client):
    client.get("/files/yes/empty")
    socket = client.connection.sock
    client.get("/files/yes/missing")
    client.manifest("yes/metrics.jsonl")
    assert client.connection.sock is socket


def test_it_listens_on_the_loopback_alone(server: tuple[int, int]):
    with pytest.raises(OSError):  # noqa: PT011 (refused, or no such address: by the machine)
        http.client.HTTPConnection("127.0.0.2", server[0], timeout=5).request("GET", "/")


def test_it_needs_the_standard_library_alone():
    code = "import sys, nemo_rl.worker.files; print(sorted({'pydantic', 'torch', 'rich', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
