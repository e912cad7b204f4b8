"""Code and data that are too large for ConfigMaps travel by the store that the job writes to, named by their digest."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nemo_rl.api.keywords import LIVE_REWARD
from nemo_rl.backends import Run
from nemo_rl.backends.kubernetes.contents import Contents, gather
from nemo_rl.backends.kubernetes.errors import ClusterError
from nemo_rl.backends.kubernetes.ship.errors import ShipError
from nemo_rl.backends.kubernetes.submit import dry_run, upload_to_store
from nemo_rl.data.loading import load_rows
from nemo_rl.job import names
from nemo_rl.job.spec import BundleSpec, RLTrainingJobSpec
from nemo_rl.storage.errors import Unavailable
from nemo_rl.storage.store import Store
from nemo_rl.worker import inputs
from nemo_rl.worker.bundles import BundleError
from nemo_rl.worker.job import Pod
from storage.server import S3, Faults

URI = "s3://bucket/shipped"


def large_reward() -> Any:
    """A reward that refers to much that cannot be made anew from its source."""
    table = {"4": "four"} | {f"{number}": random.Random(number).randbytes(40).hex() for number in range(1000, 3000)}

    def in_table(prompt: str, response: str) -> float:
        return float(table.get(response.strip()) == "four")

    return in_table


@pytest.fixture(autouse=True)
def small_config_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the limit was met by what a test can make in a moment."""
    monkeypatch.setattr(names, "MAX_BUNDLE_BYTES", 20_000)


def run_of(folder: Path, uri: str | None = URI) -> Run:
    rows = [{"prompt": random.Random(number).randbytes(40).hex()} for number in range(1000)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "model": "org/model",
        "dataset": {"path": str(folder / "rows.jsonl")},
        "output": {"uri": uri} if uri else {},
    }
    given = RLTrainingJobSpec.model_validate(spec | {"reward": {"function": LIVE_REWARD}})
    return Run(given, folder, reward_fn=large_reward())


@pytest.fixture
def gathered(faults: Faults, tmp_path: Path) -> Contents:
    return gather(run_of(tmp_path)).for_job("job")


def opened(contents: Contents, root: Path) -> dict[str, Path]:
    return inputs.open_bundles(contents.spec.bundles, Pod(root), contents.spec.output.uri)


def shipped(contents: Contents) -> dict[str, BundleSpec]:
    return {bundle.name: bundle for bundle in contents.spec.bundles}


def test_large_bundles_travel_by_the_store_and_come_out_the_same(
    gathered: Contents, faults: Faults, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert {name: bundle.config_maps for name, bundle in shipped(gathered).items()} == {"reward": [], "dataset": []}
    assert gathered.config_maps() == []
    told: list[str] = []
    upload_to_store(gathered, told.append)
    assert len([line for line in told if line.startswith("uploaded")]) == 2
    expected = sorted(f"shipped/.bundles/{bundle.sha256}.tar.gz" for bundle in gathered.spec.bundles)
    assert s3.objects("shipped/.bundles/") == expected, "named by their content"
    before = len(faults.seen)
    upload_to_store(gathered, told.append)
    assert told[-1].endswith("nothing was uploaded")
    assert not [path for method, path, _ in faults.seen[before:] if method in ("PUT", "POST")]

    folders = opened(gathered, tmp_path / "pod")
    spec = inputs.resolve(gathered.spec, folders, Pod(tmp_path / "pod"))
    assert load_rows(spec.dataset) == load_rows(str(tmp_path / "rows.jsonl"))
    reward: Any = inputs.load_reward(gathered.spec, folders)
    assert (reward("what", "4"), reward("what", "5")) == (1.0, 0.0)
    before = len(faults.seen)
    assert opened(gathered, tmp_path / "pod") == folders
    gets = [path for method, path, _ in faults.seen[before:] if method == "GET" and "list-type" not in path]
    assert gets == [], "the next process of the node reads them from its cache"


@pytest.mark.parametrize("change", ["other", "longer", "gone"])
def test_nothing_is_unpacked_of_a_bundle_that_is_not_the_jobs(
    gathered: Contents, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    upload_to_store(gathered, lambda line: None)
    path = names.stored_bundle(shipped(gathered)["reward"].sha256)
    content = Store(URI).read(path)[0]
    if change == "gone":
        Store(URI).delete([path])
    else:
        Store(URI).write(path, content[:-1] + bytes([content[-1] ^ 1]) if change == "other" else content + b"x")
    words = {"other": "is damaged", "longer": "is damaged", "gone": "is not in the store"}[change]
    try:
        with pytest.raises(BundleError, match=f"bundle 'reward' .*{words}.* submit the job again"):
            opened(gathered, tmp_path / "pod")
    finally:
        Store(URI).delete([path])
    assert not list((tmp_path / "tmp").rglob("*.py"))


def test_a_store_that_is_away_for_a_while_is_no_error_of_the_user(
    gathered: Contents, faults: Faults, tmp_path, monkeypatch
):
    upload_to_store(gathered, lambda line: None)
    monkeypatch.setenv("NEMO_RL_STORAGE_PATIENCE", "0.5")
    faults.choose = lambda method, path: "503"
    with pytest.raises(Unavailable):
        opened(gathered, tmp_path / "pod")


def test_who_cannot_write_there_is_told_so_before_there_is_a_job(gathered: Contents, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ClusterError, match=r"too large for ConfigMaps .* the secret key is not the one") as told:
        upload_to_store(gathered, lambda line: None)
    assert "not-a-secret-of-anybody" not in str(told.value)


def test_without_a_store_the_message_names_it_as_a_way(tmp_path: Path):
    with pytest.raises(ShipError, match=r"output_dir='s3://…'.* up to 268 MB travel by that store"):
        gather(run_of(tmp_path, None))


def test_a_dry_run_says_what_is_not_in_it(gathered: Contents, s3: S3, tmp_path: Path):
    run = run_of(tmp_path)
    (archive,) = (a for a in gathered.archives.values() if a.sha256 == shipped(gathered)["reward"].sha256)
    upload_before = s3.objects("shipped/.bundles/")
    text = dry_run(run)
    assert f"SHA-256 {archive.sha256}, are too large for a ConfigMap" in text
    assert s3.objects("shipped/.bundles/") == upload_before


def test_a_bundle_that_lies_nowhere_is_refused():
    spec: dict[str, Any] = {
        "model": "org/model",
        "algorithm": "sft",
        "dataset": {"inline": [{"prompt": "a", "completion": "b"}]},
    }
    bundle = {"name": "code", "sha256": "0" * 64}
    with pytest.raises(ValidationError, match="bundle 'code' has no configMaps"):
        RLTrainingJobSpec.model_validate(spec | {"bundles": [bundle]})
    assert RLTrainingJobSpec.model_validate(spec | {"bundles": [bundle], "output": {"uri": URI}})
