"""Who may write to a run in a store: a writer that lost it publishes nothing more, whenever it wakes up."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_rl.errors import LeaseLost, StorageError
from nemo_rl.run.stored import lease, writer
from nemo_rl.run.stored.head import read_head
from nemo_rl.run.stored.runs import StoredRuns
from nemo_rl.run.stored.writer import RunHeldError, Writer
from nemo_rl.storage.sender import Sender
from nemo_rl.storage.store import Store
from nemo_rl.storage.transfer import upload
from storage.gcs import Gcs
from storage.server import S3

RECORD = {"format": 2, "status": "unfinished", "settings": {}}
TAKEOVERS = 50


def save(runs: StoredRuns, step: int, content: bytes, keep: int = 2) -> None:
    """Publishes a checkpoint with this content, and a line of metrics before it."""
    assert runs.place is not None
    path = runs.place / "checkpoints" / f"step-{step:08d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content)
    (path / "state.json").write_text(json.dumps({"state": {}, "by": content.decode()}))
    with open(runs.place / "metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps({"step": step, "by": content.decode()}) + "\n")
    runs.checkpoints.saved(path, step, None, keep, ())
    runs.checkpoints.wait()


def opened(uri: str, root: Path, number: int, begin: bool = False) -> StoredRuns:
    root.mkdir(parents=True, exist_ok=True)
    runs = StoredRuns(uri, Writer("job", number, f"pod-{number}"), rank=0, carries=True)
    place = runs.open(root)
    assert runs.take(place, begin=begin)
    if begin:
        (place / "run.json").write_text(json.dumps(RECORD))
        runs.publish(place)
    return runs


def everything(s3: S3, prefix: str) -> dict[str, bytes]:
    """What a reader of the run sees: all objects but slices that no head names."""
    root = s3.data / "bucket"
    head = json.loads((root / prefix / "run.json").read_bytes())
    head.pop("beat")
    head["holder"] = None
    named = {e["folder"] for e in head["checkpoints"]}
    seen = {
        name: (root / name).read_bytes()
        for name in s3.objects(prefix)
        if not name.endswith("run.json")
        and ("/checkpoints/" not in name or name.split("/checkpoints/")[1].split("/")[0] in named or "manifest" in name)
    }
    return seen | {"head": json.dumps(head, sort_keys=True).encode()}


def test_a_writer_that_lost_the_run_publishes_nothing_more(store_environment, s3: S3, tmp_path, monkeypatch):
    """The older one is asleep at every possible moment: before each of its requests to the store, in turn."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 3600.0)
    monkeypatch.setattr(lease, "FLUSH_SECONDS", 3600.0)
    monkeypatch.setattr(lease.HeadLease, "_keep_beating", lambda self: None)
    # Files are sent from this process: in one of its own they would pass by what puts their writer to sleep.
    monkeypatch.setattr(Sender, "start", lambda self: None)
    monkeypatch.setattr(Sender, "upload", lambda self, store, files, stop: upload(store, files, stop))
    draw = random.Random(50)
    lost = 0
    for turn in range(TAKEOVERS):
        prefix = f"lease/run-{turn}-x"
        old = opened(f"s3://bucket/{prefix}", tmp_path / f"old-{turn}", 1, begin=True)
        save(old, 2, b"old")
        asleep, awake = threading.Event(), threading.Event()
        left = draw.randrange(0, 12)

        def slow(work, left=[left], asleep=asleep, awake=awake):  # noqa: B006
            def wrapped(*arguments, **named):
                left[0] -= 1
                if left[0] < 0 and not asleep.is_set():
                    asleep.set()
                    awake.wait(60)
                return work(*arguments, **named)

            return wrapped

        original = {name: getattr(Store, name) for name in ("write", "swap", "create", "delete")}
        try:
            for name, work in original.items():
                monkeypatch.setattr(Store, name, slow(work))
            errors: list[BaseException] = []

            def train(old=old, errors=errors):
                try:
                    for step in (4, 6):
                        save(old, step, b"old", keep=1)
                    old.publish(old.place)
                except BaseException as error:
                    errors.append(error)

            thread = threading.Thread(target=train)
            thread.start()
            while thread.is_alive() and not asleep.wait(0.01):
                pass
            for name, work in original.items():
                monkeypatch.setattr(Store, name, work)
            new = opened(f"s3://bucket/{prefix}", tmp_path / f"new-{turn}", 2)
            if draw.random() < 0.5:
                save(new, 8, b"new")
            before = everything(s3, prefix)
        finally:
            awake.set()
            thread.join(60)
        if asleep.is_set():
            assert errors and isinstance(errors[0], LeaseLost), errors
            lost += 1
        assert everything(s3, prefix) == before
        with pytest.raises(LeaseLost) if asleep.is_set() else contextlib.nullcontext():
            old.check()
        save(new, 10, b"new")
        assert [e["name"] for e in new.checkpoints.entries()][-1] == "step-00000010"
        new.close()
        head = read_head(Store(f"s3://bucket/{prefix}"))
        for entry in head["checkpoints"]:
            for file in entry["files"]:
                assert (s3.data / "bucket" / prefix / "checkpoints" / entry["folder"] / file["path"]).is_file()
        old.close()
        assert read_head(Store(f"s3://bucket/{prefix}")) == head
    assert lost == TAKEOVERS


def test_so_it_is_in_google_cloud_storage(gcs: Gcs, tmp_path):
    uri = "gs://bucket/lease/run"
    old = opened(uri, tmp_path / "old", 1, begin=True)
    for step in (2, 4):
        save(old, step, b"old")
    new = opened(uri, tmp_path / "new", 2)
    with pytest.raises(LeaseLost):
        save(old, 6, b"old")
    save(new, 8, b"new")
    new.close()
    old.close()
    head = read_head(Store(uri))
    assert head is not None and head["holder"] is None
    assert [(entry["name"], entry["folder"][-3:]) for entry in head["checkpoints"]] == [
        ("step-00000004", "-g1"),
        ("step-00000008", "-g2"),
    ]
    third = opened(uri, tmp_path / "third", 3)
    assert (third.place / "checkpoints" / "step-00000008" / "model.safetensors").read_bytes() == b"new"
    lines = [json.loads(line) for line in (third.place / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["by"]) for line in lines] == [(2, "old"), (4, "old"), (8, "new")]
    third.close()


def test_an_attempt_that_comes_too_late_is_told(store_environment, tmp_path):
    opened("s3://bucket/late/run", tmp_path / "one", 2, begin=True).close()
    new = opened("s3://bucket/late/run", tmp_path / "two", 3)
    with pytest.raises(LeaseLost, match="attempt 2 came too late: attempt 3"):
        opened("s3://bucket/late/run", tmp_path / "three", 2)
    new.close()


def test_a_living_call_of_this_machine_keeps_its_run(store_environment, tmp_path):
    uri = "s3://bucket/living/run"
    first = StoredRuns(uri, rank=0, carries=True)
    place = first.open(tmp_path / "one")
    assert first.take(place, begin=True)
    (place / "run.json").write_text(json.dumps(RECORD))
    first.publish(place)
    second = StoredRuns(uri, rank=0, carries=True)
    with pytest.raises(RunHeldError, match="is being trained by another call"):
        second.take(second.open(tmp_path / "two"), begin=False)
    first.close()
    assert second.take(second.open(tmp_path / "two"), begin=False)
    second.close()


KILLED = """
import json, os, sys
from pathlib import Path
from nemo_rl.run.stored.runs import StoredRuns
runs = StoredRuns(sys.argv[1], rank=0, carries=True)
place = runs.open(Path(sys.argv[2]))
assert runs.take(place, begin=True)
(place / "run.json").write_text(json.dumps({"format": 2, "status": "unfinished", "settings": {}}))
runs.publish(place)
print("taken", flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_killed_call_of_this_machine_gives_way_at_once(store_environment, tmp_path):
    uri = "s3://bucket/killed/lease"
    subprocess.run([sys.executable, "-c", KILLED, uri, str(tmp_path / "one")], env=os.environ, check=False)
    second = StoredRuns(uri, rank=0, carries=True)
    begin = time.monotonic()
    assert second.take(second.open(tmp_path / "two"), begin=False)
    assert time.monotonic() - begin < 10
    second.close()


def test_a_silent_machine_gives_way_and_a_living_one_does_not(store_environment, tmp_path, monkeypatch):
    uri = "s3://bucket/silent/run"
    monkeypatch.setattr(lease, "SILENT_SECONDS", 4.0)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 1.0)
    first = StoredRuns(uri, rank=0, carries=True)
    place = first.open(tmp_path / "one")
    monkeypatch.setattr(writer, "_machine", lambda: "another machine")
    assert first.take(place, begin=True)
    (place / "run.json").write_text(json.dumps(RECORD))
    first.publish(place)
    monkeypatch.setattr(writer, "_machine", lambda: "this machine")
    told: list[str] = []
    second = StoredRuns(uri, rank=0, carries=True, say=told.append)
    with pytest.raises(RunHeldError):
        second.take(second.open(tmp_path / "two"), begin=False)
    first.lease._stopping.set()  # from now on it is silent
    first.lease._beat.join()
    assert second.take(second.open(tmp_path / "two"), begin=False)
    assert "which did not say that it ended" in told[0]
    with pytest.raises(LeaseLost):
        save(first, 2, b"old")
    second.close()


def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(store_environment, s3: S3, tmp_path, caplog):
    uri = "s3://bucket/damaged/run"
    runs = opened(uri, tmp_path / "one", 1, begin=True)
    save(runs, 2, b"first")
    save(runs, 4, b"second")
    runs.close()
    (s3.data / "bucket/damaged/run/checkpoints/step-00000004-g1/model.safetensors").write_bytes(b"sec0nd")
    again = opened(uri, tmp_path / "two", 2)
    assert sorted(p.name for p in (again.place / "checkpoints").iterdir()) == ["step-00000002"]
    assert "passed over the checkpoint step-00000004" in caplog.text
    again.close()


def test_a_folder_of_somebody_else_is_refused(store_environment, tmp_path):
    Store("s3://bucket/theirs/run").write("run.json", b'{"title": "jogging"}')
    runs = StoredRuns("s3://bucket/theirs/run", rank=0, carries=True)
    place = runs.open(tmp_path)
    with pytest.raises(StorageError, match="is not the record of a run of nemo-rl"):
        runs.look(place)
