"""Each tracker without a network: a run is interrupted and goes on, and then the tracker's own files are read back."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from unit.chatml import write_base

# Trackio reads it when it is imported.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("ab", "cd", "ef", "gh")]


class StopAfterTwo(nemo_rl.Callback):
    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)


def train(base: Path, tracker: Any, **settings: Any) -> Any:
    given = {"max_steps": 4, "max_epochs": 4, "batch_size": 4, "save_every": 1, "learning_rate": 1e-3, **settings}
    return nemo_rl.train(
        str(base),
        ROWS,
        algorithm="sft",
        output_dir="run",
        report_to=tracker,
        log_level="error",
        backend="local",
        **given,
    )


def in_two_parts(base: Path, tracker: str) -> Any:
    with pytest.raises(KeyboardInterrupt):
        train(base, tracker, callbacks=[StopAfterTwo()])
    return train(base, tracker)


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a head of 7 bytes, then LevelDB's log format (blocks of 32 kB; checksum, length, type)."""
    content, at, part = file.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def losses(result: Any) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in result.history}


def test_wandb_has_each_step_and_the_settings(base: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    result = in_two_parts(base, "wandb")
    found: dict[int, float] = {}
    settings: dict[str, Any] = {}
    identities = set()
    files = sorted(Path("run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2  # one of each part, which `wandb sync` makes one run of
    for file in files:
        for data in records_of(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                found[int(items["_step"])] = items["loss"]
            elif kind == "run":
                identities.add(record.run.run_id)
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert found == pytest.approx(losses(result))
    assert len(identities) == 1
    assert settings["algorithm"] == "sft"
    assert settings["settings.learning_rate"] == 1e-3


def test_mlflow_has_each_step_once_the_settings_and_how_it_ended(base: Path) -> None:
    from mlflow import MlflowClient

    result = in_two_parts(base, "mlflow")
    client = MlflowClient(Path("run/mlruns").resolve().as_uri())
    experiment = client.get_experiment_by_name("nemo-rl")
    (run,) = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(run.info.run_id, "loss")
    assert {point.step: point.value for point in points} == pytest.approx(losses(result))
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["settings.learning_rate"] == "0.001"


def test_trackio_has_each_step_and_the_settings(base: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    result = in_two_parts(base, "trackio")
    (name,) = [run for run in SQLiteStorage.get_runs("nemo-rl") if run.startswith("run-")]
    rows = SQLiteStorage.get_logs("nemo-rl", name)
    assert {row["step"]: row["loss"] for row in rows if "loss" in row} == pytest.approx(losses(result))
    assert SQLiteStorage.get_run_config("nemo-rl", name)["settings.learning_rate"] == 1e-3


def test_several_at_once_and_none(base: Path) -> None:
    train(base, ["wandb", "mlflow", "tensorboard"], max_steps=1)
    assert list(Path("run/wandb").glob("offline-run-*"))
    assert Path("run/mlruns").is_dir()
    assert list(Path("run/tensorboard").iterdir())


def test_a_tracker_that_refuses_ends_the_call_before_anything_is_trained(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(ValueError, match=r"report_to='mlflow': mlflow cannot be used: .*check MLFLOW_TRACKING_URI"):
        train(base, "mlflow")
    assert not Path("run/metrics.jsonl").exists() or Path("run/metrics.jsonl").read_text() == ""


def test_a_tracker_that_fails_later_ends_the_tracking_and_not_the_run(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    def broken(*arguments: Any, **keywords: Any) -> None:
        if keywords.get("metrics"):
            raise OSError("no route")

    monkeypatch.setattr(MlflowClient, "log_batch", broken)
    settings = {"max_steps": 2, "max_epochs": 4, "batch_size": 4}
    result = nemo_rl.train(
        str(base), ROWS, algorithm="sft", output_dir="run", report_to="mlflow", backend="local", **settings
    )
    assert result.total_steps == 2
    assert capsys.readouterr().out.count("mlflow does not take this run's metrics any more (OSError: no route)") == 1
