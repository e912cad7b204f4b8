"""Pods of a job that start at different times: they wait for each other, however late, and say for whom."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.job import names
from nemo_rl.job.names import ExitCode
from nemo_rl.job.status import TerminationMessage
from nemo_rl.worker import meeting
from nemo_rl.worker.meeting import MeetingFailed, Party
from ports import free_port
from unit.worker.pods import Pod, surroundings, until
from unit.worker.test_attempts import sft

HERE = "127.0.0.1"


class Meeting:
    """Pods as threads: `results` has True for those that were sent off, the error of those that gave up."""

    def __init__(self, nodes: int) -> None:
        self.nodes, self.port = nodes, free_port()
        self.results: dict[int, bool | MeetingFailed] = {}
        self.said: list[str] = []

    def come(self, number: int, seconds: float = 30.0, token: bytes = b"secret") -> threading.Thread:
        party = Party(self.nodes, self.port, token, self.said.append, lambda n: f"x-1-{n}")

        def run() -> None:
            try:
                if number == 0:
                    meeting.host(party, seconds)
                else:
                    meeting.join(party, number, HERE, seconds)
                self.results[number] = True
            except MeetingFailed as failed:
                self.results[number] = failed

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("REMIND_SECONDS", 0.2), ("TELL_SECONDS", 0.5), ("RETRY_SECONDS", 0.2)):
        monkeypatch.setattr(meeting, name, seconds)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_nobody_goes_before_the_last_is_there(order: tuple[int, ...]):
    found = Meeting(3)
    threads = [found.come(number) for number in order[:-1]]
    time.sleep(1)
    assert found.results == {}
    threads.append(found.come(order[-1]))
    for thread in threads:
        thread.join(60)
    assert found.results == {0: True, 1: True, 2: True}


def test_the_missing_are_named_while_they_are_waited_for_and_in_the_end():
    found = Meeting(4)
    threads = [found.come(0, 1.5), found.come(2, 3)]
    for thread in threads:
        thread.join(60)
    assert any("2 of 4 pods are here; waiting for x-1-1, x-1-3" in line for line in found.said)
    first, third = found.results[0], found.results[2]
    assert isinstance(first, MeetingFailed)
    assert first.missing == (1, 3)
    assert "x-1-1, x-1-3 did not come" in str(first)
    assert isinstance(third, MeetingFailed), "the listener is gone, and then so is the meeting"
    assert "x-1-0" in str(third)


def test_a_pod_that_dies_while_it_waits_is_missing_again_and_its_successor_takes_its_place(tmp_path: Path):
    (tmp_path / "token").write_bytes(b"secret")
    found = Meeting(3)
    waiting = found.come(0)
    late = subprocess.Popen(
        [
            *(sys.executable, "-m", names.LAUNCH_MODULE, "--nodes=3", "--processes=1", "--node=1"),
            *(f"--first-address={HERE}", f"--port={found.port}"),
        ],
        env={**surroundings(), names.TOKEN_VARIABLE: str(tmp_path / "token"), "NEMO_RL_POD_ROOT": "/nowhere"},
    )
    until(lambda: any("2 of 3 pods are here; waiting for x-1-2" in line for line in found.said), "the second pod")
    late.kill()
    late.wait()
    found.said.clear()
    until(lambda: any("1 of 3 pods are here; waiting for x-1-1, x-1-2" in line for line in found.said), "its loss")
    threads = [found.come(1), found.come(2), waiting]
    for thread in threads:
        thread.join(60)
    assert found.results == {0: True, 1: True, 2: True}


@pytest.mark.parametrize("token", [b"", b"wrong"])
def test_who_does_not_know_the_token_is_not_let_in_and_learns_nothing(token: bytes):
    found = Meeting(2)
    threads = [found.come(0, 2), found.come(1, 2, token)]
    for thread in threads:
        thread.join(60)
    assert isinstance(found.results[0], MeetingFailed)
    assert isinstance(found.results[1], MeetingFailed)


def test_a_false_listener_sends_nobody_off():
    port = free_port()
    with socket.create_server((HERE, port)) as listener:

        def deceive() -> None:
            connection, _ = listener.accept()
            line = meeting._Line(connection)
            line.send({"challenge": "x"})
            line.read()
            line.send({"go": meeting._proof(b"", "go", 1, "x", "x")})
            time.sleep(5)

        threading.Thread(target=deceive, daemon=True).start()
        with pytest.raises(MeetingFailed, match=r"does not know the job's token|x-1-0"):
            meeting.join(Party(2, port, b"secret", print, lambda n: f"x-1-{n}"), 1, HERE, 1.5)


@pytest.mark.parametrize(
    "garbage", [b"\n", b"GET / HTTP/1.1\r\n\r\n", b"[" * 9999 + b"\n", b"x" * 99999, b'{"node": true}\n']
)
def test_strangers_do_not_disturb(garbage: bytes):
    found = Meeting(2)
    waiting = found.come(0)
    until(lambda: _sent(found.port, garbage), "the listener")
    other = found.come(1)
    waiting.join(60)
    other.join(60)
    assert found.results == {0: True, 1: True}


def _sent(port: int, garbage: bytes) -> bool:
    try:
        with socket.create_connection((HERE, port), timeout=1) as connection:
            connection.sendall(garbage)
            return True
    except OSError:
        return False


# --- whole pods


class Launched:
    """A pod of a job of two, started by the launcher."""

    def __init__(self, pod: Pod, number: int, port: int, *options: str) -> None:
        self.pod = pod
        pod.path(names.TERMINATION_LOG).write_bytes(b"")
        with open(pod.log, "w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", names.LAUNCH_MODULE, "--nodes=2", "--processes=1", f"--node={number}"),
                    *(
                        "--attempt-job=x-1",
                        f"--first-address={HERE}",
                        f"--port={port}",
                        "--shutdown-timeout=5",
                        *options,
                    ),
                ],
                env={**surroundings(), **pod.environment()},
                stdout=log,
                stderr=log,
            )

    def end(self, seconds: float = 200) -> int:
        return self.process.wait(timeout=seconds)


def alone(root: Path, spec: Mapping[str, Any]) -> Pod:
    """A pod whose processes the launcher starts, and no engine."""
    return Pod(root, None, spec)  # type: ignore[arg-type]


def two(root: Path, model: Path | str = "not/loaded") -> list[Pod]:
    pods = [alone(root / f"pod-{number}", sft(model)) for number in range(2)]
    pods[1].path(names.OUTPUT_DIR).rmdir()
    pods[1].path(names.OUTPUT_DIR).symlink_to(pods[0].path(names.OUTPUT_DIR))
    return pods


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_rank_looks_for_another_before_both_pods_run_and_then_they_train(tiny_model: Path, tmp_path: Path):
    pods, port = two(tmp_path, tiny_model), free_port()
    first = Launched(pods[0], 0, port)
    until(lambda: "waiting for x-1-1" in pods[0].said(), "the first word")  # after 30 s
    assert first.process.poll() is None
    assert "libtorch" not in Path(f"/proc/{first.process.pid}/maps").read_text(), "its time limits have not begun"
    second = Launched(pods[1], 1, port)
    assert [first.end(500), second.end(500)] == [0, 0], pods[0].said() + pods[1].said()
    assert pods[0].word().total_steps == 4
    assert pods[1].path(names.TERMINATION_LOG).read_text() == ""


@pytest.mark.slow
def test_both_pods_start_their_processes_hand_on_what_is_theirs_and_end_with_their_codes(tmp_path: Path):
    pods, port = two(tmp_path), free_port()
    option = f"{names.JOB_DIGEST_OPTION}={'0' * 64}"
    launched = [Launched(pod, number, port, option) for number, pod in enumerate(pods)]
    assert [each.end() for each in launched] == [ExitCode.USER_ERROR, ExitCode.USER_ERROR]
    for pod in pods:
        assert "all 2 pods are here" in pod.said()
        assert "SHA-256" in (pod.word().message or "")


def test_the_reason_of_a_rendezvous_that_failed_is_the_last_word(tmp_path: Path):
    pods, port = two(tmp_path), free_port()
    first = Launched(pods[0], 0, port, "--rendezvous-timeout=2")
    meeting.join(Party(2, port), 1, HERE, 60)  # is sent off, and then does not come
    assert first.end() == 1
    word = pods[0].word()
    assert (word.kind, word.exit_code) == ("failure", 1)
    assert "torchrun ended before its processes did" in (word.message or "")
    assert "1/2" in (word.message or "")


def test_a_pod_that_nobody_joins_ends_by_its_limit_and_names_the_missing(
    tmp_path: Path,
):
    pods = two(tmp_path)
    first = Launched(pods[0], 0, free_port(), "--startup-timeout=1")
    assert first.end() == 1
    word = pods[0].word()
    assert word.cause == "StartupTimeout"
    assert "x-1-1 did not come" in (word.message or "")


def test_sigterm_while_waiting_ends_at_once_and_free(tmp_path: Path):
    pods, port = two(tmp_path), free_port()
    first = Launched(pods[0], 0, port)
    until(lambda: _sent(port, b""), "the listener")
    begin = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == ExitCode.PREEMPTED
    assert time.monotonic() - begin < 60
    assert "waited for the other pods" in (pods[0].word().message or "")


def test_a_killed_process_is_told_of_though_it_could_not_speak(tiny_model: Path, tmp_path: Path):
    pod = alone(tmp_path, sft(tiny_model, callbacks=[{"function": "pod_callbacks:Gate"}]))
    pod.path(names.TERMINATION_LOG).write_bytes(b"")
    with open(pod.log, "w") as log:
        launched = subprocess.Popen(
            [sys.executable, "-m", names.LAUNCH_MODULE, "--nodes=1", "--processes=1", "--shutdown-timeout=5"],
            env={**surroundings(), **pod.environment(HOLD_AT="2")},
            stdout=log,
            stderr=log,
        )
    pod.wait_at_gate()
    os.kill(_child_of(launched.pid), signal.SIGKILL)
    assert launched.wait(timeout=120) == 1
    assert "ended by SIGKILL" in (pod.word().message or "")


def test_the_code_that_a_process_chose_is_the_pods_own(tiny_model: Path, tmp_path: Path):
    pod = alone(tmp_path, sft(tiny_model, dataset={"inline": [{"colour": "red"}]}))
    pod.path(names.TERMINATION_LOG).write_bytes(b"")
    ended = subprocess.run(
        [sys.executable, "-m", names.LAUNCH_MODULE, "--nodes=1", "--processes=1", "--shutdown-timeout=5"],
        env={**surroundings(), **pod.environment()},
        capture_output=True,
        timeout=200,
    )
    assert ended.returncode == ExitCode.BAD_DATA
    assert pod.word().cause == "BadData"


def _child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    workers = [int(c) for c in children if names.WORKER_MODULE.encode() in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(workers) == 1, children
    return workers[0]


def test_the_launcher_loads_no_torch_before_all_are_there():
    code = f"import sys, nemo_rl.worker.launch; print('torch' in sys.modules, {json.dumps(names.LAUNCH_MODULE)})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=surroundings(), check=True)
    assert said.stdout.split()[0] == "False"
    assert TerminationMessage.parse("") is None
