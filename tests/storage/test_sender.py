"""Files are sent from a process of their own: the same files, the same errors, and nothing of it outlives the run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_rl.errors import LeaseLost, StorageError
from nemo_rl.storage.errors import Unavailable
from nemo_rl.storage.sender import NICE, Sender
from nemo_rl.storage.store import Store
from nemo_rl.storage.transfer import upload
from storage.server import Faults

SECONDS = 120.0


@pytest.fixture
def sender() -> Iterator[Sender]:
    made = Sender()
    yield made
    made.close()


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[str, Path]]:
    found = []
    for name, size in (("empty", 0), ("deep/small", 1000), ("large", 20 << 20), ("last", 10)):
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(size))
        found.append((name, path))
    return found


def eventually(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether there is a process of this number that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_files_are_sent_by_another_process_of_low_priority(faults: Faults, sender, files):
    store = Store("s3://bucket/sender/other")
    sent = sender.upload(store, files)
    assert sent == upload(Store("s3://bucket/sender/here"), files)
    for name, path in files:
        assert store.read(name)[0] == path.read_bytes()
    assert sender.pid not in (None, os.getpid())
    assert os.getpriority(os.PRIO_PROCESS, sender.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
    assert os.getsid(sender.pid) != os.getsid(0), "what is pressed in the terminal does not reach it"
    first = sender.pid
    assert sender.upload(store, files[:2]) == sent[:2]
    assert sender.pid == first, "one process for all saves of a run"


def test_a_sender_that_died_is_started_once_more(faults: Faults, sender, files):
    store = Store("s3://bucket/sender/died")
    deaths = iter(["kill"])
    faults.choose = lambda method, path: next(deaths, None) if method == "PUT" and "deep" in path else None
    faults.kill = lambda: os.kill(sender.pid, signal.SIGKILL)
    sent = sender.upload(store, files)
    assert [file.path for file in sent] == [name for name, _ in files]
    for name, path in files:
        assert store.read(name)[0] == path.read_bytes()
    faults.choose = lambda method, path: "kill" if method == "PUT" else None
    with pytest.raises(Unavailable, match="the process that sends files ended twice"):
        sender.upload(store, files)
    faults.choose = lambda method, path: None
    assert sender.upload(store, files) == sent


@pytest.mark.parametrize(
    ("fault", "kind", "words"), [("full", StorageError, "no room"), ("503", Unavailable, "slow down")]
)
def test_errors_are_those_of_this_process(faults: Faults, sender, files, fault, kind, words):
    faults.choose = lambda method, path: fault if method in ("PUT", "POST") else None
    with pytest.raises(StorageError, match=words) as told:
        sender.upload(Store("s3://bucket/sender/errors", patience=0.5), files)
    assert type(told.value) is kind
    assert "not-a-secret-of-anybody" not in str(told.value)


def test_who_lost_the_run_sends_no_further_file(faults: Faults, sender, files):
    asked = []

    def stop() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise LeaseLost("lost")

    with pytest.raises(LeaseLost):
        sender.upload(Store("s3://bucket/sender/lost"), files, stop)
    assert sender.pid is None
    assert not [path for method, path, _ in faults.seen if method == "PUT" and path.endswith(("/large", "/last"))]


PROGRAM = """
import sys
from pathlib import Path
from nemo_rl.storage.sender import Sender
from nemo_rl.storage.store import Store

sender = Sender()
sender.upload(Store("s3://bucket/sender/parent"), [("file", Path(sys.argv[1]))])
print(sender.pid, flush=True)
sys.stdin.read()
"""


def test_nothing_outlives_the_process_that_trains(store_environment, files):
    command = [sys.executable, "-c", PROGRAM, str(files[1][1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        pid = int(training.stdout.readline())
        assert runs(pid)
        training.kill()
    eventually(lambda: not runs(pid), f"process {pid} goes on although the one that started it was killed")
