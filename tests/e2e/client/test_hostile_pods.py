"""Pods run code of users: whatever one prints, serves or sends, client and operator stay well."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from e2e.client import shipped
from e2e.client.conftest import Rows
from e2e.client.desk import Desk
from e2e.kubectl import Object, eventually
from e2e.operator_pod import OperatorPod
from e2e.scene import SECONDS
from nemo_rl.backends.kubernetes.errors import ClusterError, DownloadError
from nemo_rl.backends.kubernetes.job import Job
from nemo_rl.job import names

STEPS = 4
SERVER = """
import hashlib, json, os, socket, sys, threading

MODE, NAME, PORT = sys.argv[1], sys.argv[2], int(sys.argv[3])
BODY = b'{"step": 1}\\n'


def entry(path, digest=hashlib.sha256(BODY).hexdigest(), size=len(BODY)):
    return {"path": path, "size": size, "sha256": digest}


def reply(connection, body, length=None):
    head = "HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % (len(body) if length is None else length)
    connection.sendall(head.encode() + body)


def serve(connection):
    request = b""
    try:
        while True:
            while b"\\r\\n\\r\\n" not in request:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
            line, _, request = request.partition(b"\\r\\n")[0], None, request.partition(b"\\r\\n\\r\\n")[2]
            answer(connection, line.split()[1].decode())
    except OSError:
        pass


def answer(connection, path):
    if MODE == "noise":
        connection.sendall(os.urandom(5000))
        connection.close()
    elif MODE == "endless" :
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 10000000000\\r\\n\\r\\n")
        while True:
            connection.sendall(b"[" * 65536)
    elif path.startswith("/files/"):
        reply(connection, BODY if MODE != "checksum" else BODY.upper())
    elif "metrics.jsonl" in path:
        found = {
            "traversal": entry(NAME + "/../../../evil.txt"),
            "absolute": entry("/tmp/evil.txt"),
            "neighbour": entry(NAME + "-other/metrics.jsonl"),
            "checksum": entry(NAME + "/metrics.jsonl"),
            "huge": entry(NAME + "/metrics.jsonl", size=10**18),
        }
        reply(connection, json.dumps([found[MODE]]).encode())
    elif "completions" in path:
        reply(connection, b"[]")
    else:
        step = "/".join([NAME, "checkpoints", "step-00000001", "config.json"])
        reply(connection, json.dumps([entry(step)]).encode())


server = socket.create_server(("127.0.0.1", PORT))
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


def restarts(pod: Object) -> int:
    return sum(int(container["restartCount"]) for container in pod["status"]["containerStatuses"])


def test_what_a_pod_prints_and_serves_harms_neither_client_nor_operator(
    desk: Desk, operator: OperatorPod, tiny: Path, rows: Rows, settings: dict[str, Any], capsys: Any
) -> None:
    before = operator.wait_ready()
    result = nemo_rl.train(
        tiny,
        rows,
        shipped.by_length,
        max_steps=STEPS,
        num_generations_per_prompt=2,
        max_new_tokens=4,
        callbacks=[shipped.Rubbish()],
        name="rubbish",
        output_dir="rubbish",
        **settings,
    )
    assert [row["step"] for row in result.history] == list(range(1, STEPS + 1))
    assert result.total_steps == STEPS
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 70_000
    after = operator.wait_ready()
    assert (after["metadata"]["uid"], restarts(after)) == (before["metadata"]["uid"], restarts(before))
    status = desk.kubectl.json(names.PLURAL, "rubbish")["status"]
    assert (status["phase"], status["result"]["totalSteps"]) == ("Succeeded", STEPS)


@pytest.fixture(scope="module")
def finished(desk: Desk, tiny: Path, rows: Rows, settings: dict[str, Any]) -> Job:
    """A job that has succeeded and whose result nobody has fetched."""
    data = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows]
    job = nemo_rl.train(tiny, data, algorithm="sft", max_steps=1, name="victim", wait=False, **settings)
    assert isinstance(job, Job)
    assert job.wait(SECONDS).phase == "Succeeded"
    return job


@pytest.fixture
def impostor(desk: Desk, finished: Job) -> Iterator[Callable[[str], None]]:
    """Puts a pod of somebody else where the client expects the file server of the job."""
    name = names.files_pod(finished.name)
    (trainer,) = desk.kubectl.items("pods", "-l", f"{names.LABEL_JOB}={finished.name}")

    def put(mode: str) -> None:
        container = {
            "name": "impostor",
            "image": trainer["spec"]["containers"][0]["image"],
            "command": ["python", "-c", SERVER, mode, finished.name, str(names.FILES_PORT)],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        spec = {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        }
        desk.kubectl.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
        desk.kubectl("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={SECONDS:.0f}s", seconds=SECONDS + 10)

    yield put
    desk.kubectl("delete", "pod", name, "--grace-period=0", "--force", "--ignore-not-found", check=False)
    eventually(lambda: name not in desk.kubectl("get", "pods", "-o", "name"), f"{name} is gone", SECONDS)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("traversal", "not safe to write"),
        ("absolute", "not safe to write"),
        ("neighbour", "not below"),
        ("checksum", "digest"),
        ("huge", "free"),
        ("noise", "cannot be read"),
        ("endless", "answered 200 with"),
    ],
)
def test_what_an_impostor_sends_never_leaves_the_folder_and_is_never_taken_for_the_result(
    desk: Desk, finished: Job, impostor: Callable[[str], None], mode: str, words: str, tmp_path: Path
) -> None:
    impostor(mode)
    finished.output_dir = tmp_path / "deep" / "down" / "result"
    begin = time.monotonic()
    with pytest.raises((DownloadError, ClusterError), match=words):
        finished.fetch()
    assert time.monotonic() - begin < SECONDS
    found = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert all(path.is_relative_to(finished.output_dir) for path in found), found
    assert not any(path.name in ("metrics.jsonl", "evil.txt", "model.safetensors") for path in found), found
    assert not Path("/tmp/evil.txt").exists()


def test_after_all_that_the_result_is_there(finished: Job, tmp_path: Path) -> None:
    finished.output_dir = tmp_path / "result"
    result = finished.fetch()
    assert result.total_steps == 1
    assert json.loads((tmp_path / "result" / "metrics.jsonl").read_text())["step"] == 1
