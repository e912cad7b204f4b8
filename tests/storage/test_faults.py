"""Each fault of a store at each moment of a run: what passes is waited for, what lasts is told; nothing is lost or loaded wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from nemo_rl.errors import StorageError
from nemo_rl.run.sources import local_model
from nemo_rl.run.stored.head import read_head
from nemo_rl.run.stored.runs import StoredRuns
from nemo_rl.run.stored.writer import Writer
from nemo_rl.storage.store import Store
from storage.server import S3, Faults, PodIdentity

PASSING = ("503", "reset", "lost", "slow", "truncated")
"""Three requests long. The library asks again by itself, and so do we."""
LASTING = {
    "expired": "credentials have expired",
    "full": "no room left",
    "denied": "have no right to",
    "skewed": "clock differs",
    "region": "another region",
    "bucket": "no such bucket",
    "key": "does not know the access key",
}
RECORD = {"format": 2, "status": "unfinished", "settings": {}}
Choose = Callable[[str, str], str | None]


@pytest.fixture(autouse=True)
def patience(store_environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_RL_STORAGE_PATIENCE", "60")


def of_checkpoints(method: str, path: str) -> bool:
    return "/checkpoints/step-" in path


def writing(method: str, path: str) -> bool:
    return method in ("PUT", "POST")


def reading(method: str, path: str) -> bool:
    return method in ("GET", "HEAD") and "list-type" not in path


def anything(method: str, path: str) -> bool:
    return True


def after(count: int, fault: str, which: Choose = anything) -> Choose:
    """The fault from a request of a kind on: for three of them, or for all that follow."""
    seen = iter(range(100_000))

    def choose(method: str, path: str) -> str | None:
        number = next(seen) if which(method, path) else -1
        return fault if number >= count and (fault in LASTING or number < count + 3) else None

    return choose


@pytest.fixture
def identity(store_environment: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PodIdentity]:
    """Credentials that are asked for at an address, as in pods of EKS, and renewed, in place of keys in variables."""
    server = PodIdentity()
    (tmp_path / "token").write_text("a token of the service account")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", server.url)
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
    yield server
    server.close()


def begun(uri: str, root: Path) -> StoredRuns:
    runs = StoredRuns(uri, Writer("job", 1, "pod-1"), rank=0, carries=True)
    place = runs.open(root)
    assert runs.take(place, begin=True)
    (place / "run.json").write_text(json.dumps(RECORD))
    runs.publish(place)
    return runs


def taken_up(uri: str, root: Path) -> StoredRuns:
    runs = StoredRuns(uri, Writer("job", 2, "pod-2"), rank=0, carries=True)
    place = runs.open(root)
    runs.look(place)
    assert runs.take(place, begin=False)
    return runs


def content(step: int) -> bytes:
    return f"weights of step {step}".encode() * 100


def save(runs: StoredRuns, step: int) -> None:
    assert runs.place is not None
    path = runs.place / "checkpoints" / f"step-{step:08d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content(step))
    (path / "config.json").write_text("{}")
    (path / "state.json").write_text(json.dumps({"state": {}, "step": step}))
    with open(runs.place / "metrics.jsonl", "a") as metrics:
        metrics.write(json.dumps({"step": step}) + "\n")
    runs.checkpoints.saved(path, step, None, 2, ())
    runs.checkpoints.wait()


def loaded(runs: StoredRuns) -> int:
    """The step that a run goes on from, its weights compared with what was saved."""
    assert runs.place is not None
    name = runs.checkpoints.bring(runs.checkpoints.newest())
    assert name is not None
    step = int(name.removeprefix("step-"))
    assert (runs.place / "checkpoints" / name / "model.safetensors").read_bytes() == content(step)
    return step


@pytest.mark.parametrize(("fault", "moment"), [*product(PASSING, (0, 2)), *product(LASTING, (0,))])
def test_at_the_probe(faults: Faults, tmp_path: Path, fault: str, moment: int):
    """Before a run begins: nothing of a run is written where it could not go on."""
    runs = StoredRuns(f"s3://bucket/probed/{fault}-{moment}", rank=0, carries=True)
    faults.choose = after(moment, fault)
    if fault in PASSING:
        runs.open(tmp_path)
        return
    with pytest.raises(StorageError, match=LASTING[fault]) as told:
        runs.open(tmp_path)
    assert "not-a-secret-of-anybody" not in str(told.value)
    faults.choose = lambda method, path: None
    assert read_head(Store(runs.uri)) is None


@pytest.mark.parametrize(("fault", "moment"), [*product(PASSING, (1, 6)), *product(LASTING, (5,))])
def test_in_a_save(faults: Faults, tmp_path: Path, fault: str, moment: int):
    uri = f"s3://bucket/saved/{fault}-{moment}"
    runs = begun(uri, tmp_path / "one")
    save(runs, 2)
    faults.choose = after(moment, fault, writing)
    told = ""
    try:
        for step in (4, 6):
            save(runs, step)
    except StorageError as error:
        told = str(error)
    assert bool(told) == (fault in LASTING)
    assert LASTING.get(fault, "") in told
    faults.choose = lambda method, path: None
    named = [entry["step"] for entry in (read_head(Store(uri)) or {})["checkpoints"]]
    assert named == [4, 6] if fault in PASSING else named
    runs.close()
    again = taken_up(uri, tmp_path / "two")
    assert loaded(again) == max(named)
    for entry in again.checkpoints.entries():
        assert again.checkpoints.bring([entry["name"]]) == entry["name"], "whatever is named is whole"
    steps = [json.loads(line)["step"] for line in ((again.place or Path()) / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert set(named) <= set(steps)
    again.close()


@pytest.mark.parametrize(
    ("fault", "which", "moment"),
    [*product(PASSING, (anything,), (1,)), *product(LASTING, (of_checkpoints,), (0, 1))],
)
def test_at_load(
    faults: Faults, tmp_path: Path, fault: str, which: Choose, moment: int, caplog: pytest.LogCaptureFixture
):
    """A checkpoint that cannot be read is no damaged one: going on without it would lose what it has."""
    uri = f"s3://bucket/loaded/{fault}-{which.__name__}-{moment}"
    runs = begun(uri, tmp_path / "one")
    for step in (2, 4):
        save(runs, step)
    runs.close()
    faults.choose = after(moment, fault, lambda method, path: reading(method, path) and which(method, path))
    if fault in PASSING:
        again = taken_up(uri, tmp_path / "two")
    else:
        with pytest.raises(StorageError, match=LASTING[fault]):
            taken_up(uri, tmp_path / "two")
        faults.choose = lambda method, path: None
        again = taken_up(uri, tmp_path / "three")
    assert loaded(again) == 4
    assert "passed over" not in caplog.text
    again.close()


@pytest.mark.parametrize("fault", [*PASSING, *LASTING])
def test_at_the_load_of_a_model(faults: Faults, tmp_path: Path, fault: str):
    runs = begun(f"s3://bucket/models/{fault}", tmp_path)
    save(runs, 2)
    runs.close()
    faults.choose = after(2, fault)
    if fault in LASTING:
        with pytest.raises(StorageError, match=LASTING[fault]):
            local_model(f"{runs.uri}/latest")
        faults.choose = lambda method, path: None
    assert (local_model(f"{runs.uri}/latest") / "model.safetensors").read_bytes() == content(2)


NONE = "found no credentials"


def test_credentials_that_are_renewed_may_be_away_for_a_while(identity: PodIdentity, tmp_path: Path):
    uri = "s3://bucket/identity/away"
    identity.cut = 2
    runs = begun(uri, tmp_path / "one")
    save(runs, 2)
    identity.cut = 2
    save(runs, 4)
    runs.close()
    identity.cut = 2
    again = taken_up(uri, tmp_path / "two")
    assert loaded(again) == 4
    again.close()
    assert identity.cut == 0
    assert identity.given > 3, "those that expire are renewed"


@pytest.mark.parametrize("moment", ["probe", "save", "load"])
def test_without_credentials(identity: PodIdentity, tmp_path: Path, moment: str):
    """Before a run begins, in the midst of it, and when it is to go on: told in words, and nothing is lost."""
    uri = f"s3://bucket/identity/{moment}"
    if moment == "probe":
        identity.refuses = True
        with pytest.raises(StorageError, match=NONE):
            begun(uri, tmp_path / "one")
        identity.refuses = False
        assert read_head(Store(uri)) is None
    runs = begun(uri, tmp_path / "two")
    save(runs, 2)
    if moment == "save":
        identity.refuses = True
        with pytest.raises(StorageError, match=NONE):
            save(runs, 4)
        identity.refuses = False
    runs.close()
    if moment == "load":
        identity.refuses = True
        with pytest.raises(StorageError, match=NONE):
            taken_up(uri, tmp_path / "three")
        identity.refuses = False
    again = taken_up(uri, tmp_path / "four")
    assert loaded(again) == 2
    again.close()
