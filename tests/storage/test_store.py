"""The storage layer against a real S3 server, and against faults before it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from nemo_rl.errors import StorageError
from nemo_rl.job.uris import problem
from nemo_rl.storage.cache import cached
from nemo_rl.storage.errors import Conflict, in_words
from nemo_rl.storage.store import Store
from nemo_rl.storage.transfer import File, digest, download, upload
from storage.gcs import Gcs
from storage.server import S3, Faults
from storage.test_faults import LASTING


@pytest.fixture
def store(store_environment: S3, request: pytest.FixtureRequest) -> Store:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return Store(f"s3://bucket/{name}")


def test_objects_are_written_read_listed_and_deleted(store):
    store.write("a/one", b"first")
    store.write("a/two", b"second")
    assert store.read("a/one")[0] == b"first"
    assert store.read("nothing") is None
    assert store.stat("nothing") is None
    assert [(o.path, o.size) for o in store.list()] == [("a/one", 5), ("a/two", 6)]
    assert [o.path for o in store.at("a").list()] == ["one", "two"]
    assert store.read_range("a/two", 1, 4) == b"eco"
    store.delete(["a/one", "not there"])
    assert [o.path for o in store.list()] == ["a/two"]


def test_a_listed_version_is_that_which_reads_are_told(faults: Faults, store):
    store.write("one", b"content")
    for faults.unquoted in (False, True):
        (found,) = store.list()
        assert found == store.stat("one")
        assert store.read_range("one", 0, 3, found.version) == b"con"


def test_of_many_writers_one_creates_and_one_swaps(store):
    """Compare and swap by a real server: of 8 threads exactly one wins, each of 10 times."""
    for number in range(10):
        won = []

        def race(work, won=won):
            gate = threading.Barrier(8)

            def one(i):
                gate.wait()
                with contextlib.suppress(Conflict):
                    won.append((i, work(i)))

            threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        name = f"object-{number}"
        race(lambda i, name=name: store.create(name, f"created by {i}".encode()))
        assert len(won) == 1
        version = won.pop()[1]
        race(lambda i, name=name, version=version: store.swap(name, f"swapped by {i}".encode(), version))
        assert len(won) == 1
        assert store.read(name)[0] == f"swapped by {won[0][0]}".encode()


def test_a_write_whose_answer_was_lost_is_known_to_be_done(faults: Faults, store):
    store = Store(store.uri)
    version = store.create("head", b"1")
    lost = iter(["lost"])
    faults.choose = lambda method, path: next(lost, None) if method == "PUT" else None
    assert store.swap("head", b"2", version)
    assert store.read("head")[0] == b"2"
    with pytest.raises(Conflict):
        store.swap("head", b"3", version)


@pytest.mark.parametrize("fault", ["503", "reset", "slow", "truncated", "lost"])
def test_folders_travel_whole_through_a_store_in_trouble(faults: Faults, tmp_path: Path, fault):
    source = tmp_path / "source"
    source.mkdir()
    for name, size in (("small", 1000), ("empty", 0), ("large", 20 << 20)):
        (source / name).write_bytes(random.Random(name).randbytes(size))
    draw = random.Random(fault)
    faults.choose = lambda method, path: fault if draw.random() < 0.3 else None
    store = Store(f"s3://bucket/trouble-{fault}")
    sent = upload(store, [(p.name, p) for p in sorted(source.iterdir())])
    told: list[tuple[int, int]] = []
    download(store, sent, tmp_path / "target", lambda done, total: told.append((done, total)))
    for name in ("small", "empty", "large"):
        assert digest(tmp_path / "target" / name) == digest(source / name)
    assert told[-1] == (sent[0].size + sent[1].size + sent[2].size,) * 2
    assert any(entry[2] for entry in faults.seen)


def test_a_download_goes_on_where_it_broke_off(faults: Faults, tmp_path: Path):
    content = random.Random(1).randbytes(40 << 20)
    store = Store("s3://bucket/broken-off", patience=0.5)
    store.write("large", content)
    file = [File("large", len(content), hashlib.sha256(content).hexdigest())]
    asked = iter(range(1000))
    faults.choose = lambda method, path: "reset" if method == "GET" and next(asked) >= 3 else None
    with pytest.raises(StorageError):
        download(store, file, tmp_path)
    there = (tmp_path / "large.part").stat().st_size
    assert 0 < there < len(content)
    faults.choose = lambda method, path: None
    begin = len(faults.seen)
    download(store, file, tmp_path)
    assert (tmp_path / "large").read_bytes() == content
    gets = [entry for entry in faults.seen[begin:] if entry[0] == "GET"]
    assert len(gets) < 5


def test_damaged_and_missing_files_are_refused(store, s3: S3, tmp_path: Path):
    (tmp_path / "f").write_bytes(b"x" * 1000)
    sent = upload(store, [("f", tmp_path / "f")])
    stored = s3.data / store.uri.removeprefix("s3://") / "f"
    stored.write_bytes(b"y" * 1000)
    with pytest.raises(StorageError, match="is damaged"):
        download(store, sent, tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    store.write("f", b"short")
    with pytest.raises(StorageError, match="has 5 bytes, but was saved with 1000"):
        download(store, sent, tmp_path / "to")
    store.delete(["f"])
    with pytest.raises(StorageError, match="is missing"):
        download(store, sent, tmp_path / "to")


def test_the_cache_reads_what_changed_and_nothing_else(faults: Faults):
    store = Store("s3://bucket/cached")
    store.write("a", b"first")
    store.write("b", b"second")

    def reads() -> int:
        before = len(faults.seen)
        folder = cached(store.uri, store.list())
        assert {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")} == expected
        return sum(1 for method, path, _ in faults.seen[before:] if method == "GET" and "list-type" not in path)

    expected = {"a": b"first", "b": b"second"}
    assert reads() == 2
    assert reads() == 0
    store.write("b", b"other!")  # of the same size
    expected = {"a": b"first", "b": b"other!"}
    assert reads() == 1
    store.delete(["a"])
    expected = {"b": b"other!"}
    assert reads() == 0


# --- errors in words


def test_a_store_that_can_be_written_is_proved_and_left_clean(store, s3: S3):
    store.probe()
    assert s3.objects(store.uri.removeprefix("s3://bucket/")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret key is not the one of this access key"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "does not know the access key"),
        ({"AWS_SESSION_TOKEN": "of another server"}, "does not take the session token; unset AWS_SESSION_TOKEN"),
        ({"AWS_REGION": "eu-north-1"}, "another region"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "was not reached"),
    ],
)
def test_wrong_settings_are_told_with_the_cure(store_environment, monkeypatch, change, words):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=words) as told:
        Store("s3://bucket/settings", patience=0.5).probe()
    assert "not-a-secret-of-anybody" not in str(told.value)


@pytest.mark.parametrize("work", ["stat", "list", "read", "write", "create", "delete"])
def test_whatever_is_asked_first_the_cause_is_told(store_environment, monkeypatch, work):
    """Also by requests whose answers have no body."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = Store("s3://bucket/first", patience=0.5)
    arguments = {"list": (), "write": ("a", b"b"), "create": ("a", b"b"), "delete": (["a"],)}.get(work, ("a",))
    with pytest.raises(StorageError, match="the secret key is not the one of this access key"):
        getattr(store, work)(*arguments)


@pytest.mark.parametrize("work", ["stat", "list", "read", "write", "create", "swap", "delete"])
def test_what_lasts_is_told_at_once_by_whatever_is_asked_first(faults: Faults, work):
    store = Store("s3://bucket/hyper/connection-reset-timeout", patience=30)  # words of errors that pass
    arguments = {
        "list": (),
        "write": ("a", b"b"),
        "create": ("a", b"b"),
        "swap": ("a", b"b", '"c"'),
        "delete": (["a"],),
    }
    for fault, words in LASTING.items():
        if fault == "full":
            continue  # the library itself asks again after each answer of 500 and more
        faults.choose, before = lambda method, path, fault=fault: fault, len(faults.seen)
        with pytest.raises(StorageError, match=words):
            getattr(store, work)(*arguments.get(work, ("a",)))
        assert len(faults.seen) - before <= 3


def test_a_role_that_does_not_trust_the_service_account_is_no_right_to_the_bucket():
    """As STS answers, which is asked by HTTPS alone."""
    kind = type("GenericError", (Exception,), {})
    answer = "<Code>AccessDenied</Code><Message>Not authorized to perform sts:AssumeRoleWithWebIdentity</Message>"
    error = kind(
        f"Error performing POST REDACTED in 5ms - Server returned non-2xx status code: 403 Forbidden: {answer}"
    )
    told = in_words(error, "write", "s3://bucket/run")
    assert type(told) is StorageError
    assert "was not accepted for its role; check the role's trust policy" in str(told)


def test_a_bucket_that_is_not_there(store_environment):
    with pytest.raises(StorageError, match="there is no such bucket"):
        Store("s3://no-such-bucket/folder", patience=0.5).probe()


def test_without_credentials(store_environment, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(StorageError, match=r"found no credentials|asks who we are|was not reached"):
        Store("s3://bucket/folder", patience=0.5).probe()


@pytest.mark.parametrize(
    ("fault", "words"),
    [("503", "asks to slow down"), ("expired", "credentials have expired"), ("full", "no room left")],
)
def test_what_a_store_answers_is_said_in_words(faults: Faults, fault, words):
    faults.choose = lambda method, path: fault
    with pytest.raises(StorageError, match=words):
        Store("s3://bucket/told", patience=0.5).probe()


@pytest.mark.parametrize(
    ("ignored", "condition"),
    [(("if-none-match", "if-match"), "new"), (("if-none-match",), "new"), (("if-match",), "unchanged")],
)
def test_a_store_without_conditional_writes_is_refused(faults: Faults, s3: S3, ignored, condition):
    """One that knows only how to write what is new could not keep the writers of a run apart either."""
    faults.ignored = ignored
    with pytest.raises(StorageError, match=rf"has no conditional writes .* written only if {condition}\)"):
        Store("s3://bucket/unconditional").probe()
    assert s3.objects("unconditional/") == []


def test_writes_on_condition_name_the_generation_in_google_cloud_storage(gcs: Gcs):
    store = Store("gs://bucket/folder", patience=2)
    store.probe()
    assert gcs.objects == {}
    first = store.create("head", b"one")
    assert store.read("head") == (b"one", first)
    second = store.swap("head", b"two", first)
    assert store.read("head") == (b"two", second)
    for stale in (lambda: store.swap("head", b"late", first), lambda: store.create("head", b"late")):
        with pytest.raises(Conflict):
            stale()
    assert store.swap("head", b"two", second) != second, "a generation is new where the content is not"
    found = store.stat("head")
    assert found is not None
    assert store.read_range("head", 1, 3, found.version) == b"wo"
    gcs.without_conditions = True
    with pytest.raises(StorageError, match="has no conditional writes"):
        store.probe()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://ab/run", "three letters"),
        ("gcs://bucket/run", "write gs://"),
        ("s3://key:secret@bucket/run", "credentials"),
        ("s3://bucket//run", "single slashes"),
        ("s3://bucket/../run", "single slashes"),
        ("s3://bucket/run?x=1", "query"),
        ("bucket/run", "an address such as"),
        ("ftp://bucket/run", "expected one of"),
    ],
)
def test_addresses_that_cannot_work(uri, words):
    assert words in (problem(uri) or "")


def test_a_folder_has_the_same_interface(tmp_path: Path):
    store = Store(tmp_path / "folder")
    store.create("a/b", b"content")
    with pytest.raises(Conflict):
        store.create("a/b", b"another")
    assert [(o.path, o.size) for o in store.list()] == [("a/b", 7)]
    assert store.read_range("a/b", 1, 3) == b"on"
    assert os.listdir(tmp_path / "folder") == ["a"]


def test_a_pod_that_reaches_no_store_is_told_what_may_be_closed(store_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NEMO_RL_ATTEMPT", "1")
    with pytest.raises(StorageError, match=r"was not reached .*networkPolicy\.trainers\.extraEgress") as told:
        Store("s3://bucket/closed", patience=0.5).probe()
    monkeypatch.delenv("NEMO_RL_ATTEMPT")
    with pytest.raises(StorageError) as elsewhere:
        Store("s3://bucket/closed", patience=0.5).probe()
    assert "networkPolicy" not in str(elsewhere.value) and "networkPolicy" in str(told.value)
