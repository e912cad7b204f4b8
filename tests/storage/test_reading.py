"""Models and data from a real S3 server: read once, checked for completeness, refused in words."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemo_rl.data.loading import load_rows
from nemo_rl.errors import DatasetError, StorageError
from nemo_rl.job.spec import DatasetSpec
from nemo_rl.run.sources import local_model
from nemo_rl.storage.store import Store
from storage.server import Faults

ROWS = [{"prompt": f"{i}=", "completion": f"{i}a"} for i in range(12)]


def parquet(rows: list[dict], path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


@pytest.fixture
def rows(faults: Faults, tmp_path: Path) -> Store:
    store = Store("s3://bucket/rows")
    store.write("parquet/part-000.parquet", parquet(ROWS[:5], tmp_path / "a"))
    store.write("parquet/part-001.parquet", parquet(ROWS[5:], tmp_path / "b"))
    store.write("parquet/notes.txt", b"not rows")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    store.write("one.jsonl", lines)
    store.write("deep/a/one.jsonl.gz", gzip.compress(lines[: lines.index(b"\n") + 1]))
    store.write("deep/b/two.csv", b"prompt,completion\n1=,1a\n")
    return store


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("one.jsonl", ROWS),
        ("parquet/part-*.parquet", ROWS),
        ("parquet", ROWS),
        ("parquet/", ROWS),
        ("parquet/part-00[1].parquet", ROWS[5:]),
        ("deep/**/*.csv", [ROWS[1]]),
        ("deep/**", [ROWS[0], ROWS[1]]),
    ],
)
def test_rows_of_files_patterns_and_folders(rows, address, expected):
    assert load_rows(f"{rows.uri}/{address}") == expected


def test_rows_are_read_once(rows, faults: Faults):
    assert load_rows(f"{rows.uri}/parquet") == ROWS
    before = len(faults.seen)
    assert load_rows(f"{rows.uri}/parquet/part-*.parquet") == ROWS
    gets = [path for method, path, _ in faults.seen[before:] if method == "GET" and "list-type" not in path]
    assert gets == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://bucket/rows/two.jsonl", "found no object s3://bucket/rows/two.jsonl"),
        ("s3://bucket/rows/parquet/x-*.parquet", "holds notes.txt, part-000.parquet"),
        ("s3://bucket/empty/", "holds nothing"),
        ("gcs://bucket/rows", "write gs://"),
    ],
)
def test_rows_that_are_not_there(rows, address, words):
    with pytest.raises(DatasetError, match=words):
        load_rows(DatasetSpec(path=address))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from unit.trainers.conftest import write_model

    return Path(write_model(tmp_path_factory.mktemp("tiny-model")))


def test_a_model_is_read_once_and_the_same(tiny_model, faults: Faults, tmp_path):
    store = Store("s3://bucket/models/tiny")
    for path in tiny_model.iterdir():
        store.write(path.name, path)
    store.write("pytorch_model.bin", b"the same weights once more")
    store.write("onnx/model.onnx", b"and again")
    folder = local_model(store.uri)
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {p.name for p in tiny_model.iterdir()}
    for path in tiny_model.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    before = len(faults.seen)
    assert local_model(store.uri) == folder
    assert not any(method == "GET" and path.endswith("safetensors") for method, path, _ in faults.seen[before:])


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ({}, "is no folder of a model: it holds nothing"),
        ({"config.json": b"{}"}, "half a model: it has a config.json and no weights"),
        (
            {
                "config.json": b"{}",
                "model-1.safetensors": b"",
                "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
            },
            "half a model: 1 of the 2 files of weights",
        ),
    ],
)
def test_half_a_model_is_refused(store_environment, objects, words):
    store = Store(f"s3://bucket/models/half-{len(objects)}")
    for name, content in objects.items():
        store.write(name, content)
    with pytest.raises(StorageError, match=words):
        local_model(store.uri)


def test_a_checkpoint_without_its_manifest_is_refused(store_environment):
    store = Store("s3://bucket/run/checkpoints/step-00000002-g1")
    store.write("config.json", b"{}")
    store.write("model.safetensors", b"")
    with pytest.raises(StorageError, match=r"is not complete: it has no manifest\.json"):
        local_model(store.uri)
