"""`nemo-rl doctor s3://…`: what it says of a store is what a run would meet there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_rl.cli.main import app
from nemo_rl.storage.store import Store
from storage.server import S3, SECRET, Faults
from storage.test_faults import LASTING, begun, save


def doctor(uri: str, code: int) -> dict[str, tuple[str, str]]:
    """State and words of each check."""
    result = CliRunner().invoke(app, ["doctor", uri, "--output", "json"])
    assert result.exit_code == code, result.output
    assert SECRET not in result.output
    return {check["subject"]: (check["state"], check["found"]) for check in json.loads(result.output)}


def test_a_store_that_can_be_used(store_environment: S3):
    Store("s3://bucket/doctor/rows").write("part-0.jsonl", b"{}\n")
    found = doctor("s3://bucket/doctor/rows", 0)
    assert found["reading"] == ("good", "1 objects below s3://bucket/doctor/rows, 0 GiB")
    assert found["writing"][0] == "good"
    assert found["run"] == ("absent", "none at this address")
    assert "This store can be used." in CliRunner().invoke(app, ["doctor", "s3://bucket/doctor/rows"]).output
    assert store_environment.objects("doctor/rows/") == ["doctor/rows/part-0.jsonl"], "nothing is left"


def test_a_run_and_who_writes_to_it(store_environment: S3, tmp_path: Path):
    runs = begun("s3://bucket/doctor/run", tmp_path)
    save(runs, 2)
    assert doctor(runs.uri, 0)["run"] == ("good", "complete checkpoints of steps 2; pod-1 writes to it")
    save(runs, 4)
    runs.close()
    assert doctor(runs.uri, 0)["run"] == ("good", "complete checkpoints of steps 2, 4")


@pytest.mark.parametrize("fault", LASTING)
def test_what_lacks(faults: Faults, fault: str):
    faults.choose = lambda method, path: fault
    found = doctor("s3://bucket/doctor/lacks", 1)
    assert [*found] == ["reading"]
    assert found["reading"][0] == "bad" and LASTING[fault] in found["reading"][1]


@pytest.mark.parametrize(
    ("method", "fault", "words"),
    [
        ("PUT", "denied", "cannot write .* have no right to"),
        ("PUT", "full", "cannot write .* no room left"),
        ("POST", "denied", "cannot delete .* have no right to"),
        ("POST", "kept", "cannot delete .* have no right to"),
    ],
)
def test_what_lacks_to_write_or_to_delete(faults: Faults, method: str, fault: str, words: str):
    faults.choose = lambda asked, path: fault if asked == method else None
    found = doctor("s3://bucket/doctor/read-only", 1)
    assert found["reading"][0] == "good"
    assert found["writing"][0] == "bad" and re.search(words, found["writing"][1])


@pytest.mark.parametrize("ignored", ["if-none-match", "if-match"])
def test_a_store_without_conditional_writes(faults: Faults, ignored: str):
    faults.ignored = (ignored,)
    found = doctor("s3://bucket/doctor/unconditional", 1)
    assert (found["reading"][0], found["writing"][0]) == ("good", "bad")
    assert "has no conditional writes" in found["writing"][1]


def test_a_server_that_is_not_there(store_environment: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "was not reached" in doctor("s3://bucket/doctor", 1)["reading"][1]


def test_a_folder_of_somebody_else(store_environment: S3):
    Store("s3://bucket/doctor/theirs").write("run.json", b'{"title": "jogging"}')
    found = doctor("s3://bucket/doctor/theirs", 1)
    assert found["run"][0] == "bad" and "is not the record of a run of nemo-rl" in found["run"][1]


@pytest.mark.parametrize(
    ("address", "words"), [("s3a://bucket/x", "write s3://"), ("https://x.org/y", "expected one of")]
)
def test_what_is_no_address_of_a_store(address: str, words: str):
    found = doctor(address, 1)
    assert found["address"][0] == "bad" and words in found["address"][1]
