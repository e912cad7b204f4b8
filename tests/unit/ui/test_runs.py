"""The runs of this machine as a source of the page: which are found, what state they are in, and that nothing else is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.run.directory import open_run
from nemo_rl.ui.listing import CURVE_POINTS, SourceError, curves, sample, text
from nemo_rl.ui.runs import KEPT_RECORDS, Records, Runs, is_locked

SETTINGS = {"algorithm": "grpo", "model": {"name": "Qwen/Qwen2.5-0.5B"}, "learning_rate": 1e-6}


def write(folder: Path, steps: range, **metrics: Any) -> None:
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.writelines(
            json.dumps({"step": n, "reward": n / 10, "step_seconds": 3.0} | metrics) + "\n" for n in steps
        )


def begun(folder: Path, *, finished: bool, total: int = 10) -> Path:
    """A run's folder, its record written by training's own code."""
    run = open_run(folder, SETTINGS, "auto", total_steps=total)
    run.finish() if finished else run.close()
    return run.dir


def test_runs_are_found_in_folders_below_and_their_state_is_that_of_their_record(tmp_path: Path) -> None:
    write(begun(tmp_path / "a", finished=True), range(1, 11))
    write(begun(tmp_path / "team/deep/b", finished=False), range(1, 5))
    (tmp_path / "c").mkdir()
    write(tmp_path / "c", range(1, 3))  # of an earlier version: without a record
    (tmp_path / "a/checkpoints/step-1").mkdir(parents=True)
    write(tmp_path / "a/checkpoints/step-1", range(1, 2))
    found = {row.name: row for row in Runs([tmp_path]).list("", None).rows}
    assert set(found) == {"a", "b", "c"}
    a, b = found["a"], found["b"]
    assert (a.phase, a.step, a.total_steps, a.percent, a.score, a.score_name) == (
        "Succeeded",
        10,
        10,
        100,
        "1",
        "reward",
    )
    assert (b.phase, b.step, b.percent, b.eta) == ("Stopped", 4, 40, None)
    assert (a.algorithm, a.model, a.finished, b.finished) == ("grpo", "Qwen/Qwen2.5-0.5B", True, False)
    assert (found["c"].phase, found["c"].step, found["c"].total_steps) == ("Stopped", 2, None)


HOLD = """
import sys
from pathlib import Path
from nemo_rl.run.directory import open_run
run = open_run(Path(sys.argv[1]), {"algorithm": "grpo"}, "auto", total_steps=10)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_is_running_while_a_process_holds_it_and_looking_takes_nothing_away(tmp_path: Path) -> None:
    folder = tmp_path / "live"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        write(folder, range(1, 5))
        runs = Runs([tmp_path])
        [row] = runs.list("", None).rows
        assert (row.phase, row.eta) == ("Running", "18s")  # 6 steps of 3 seconds
        assert is_locked(folder / ".lock")
        assert runs.list("", None).rows[0].phase == "Running"
    finally:
        holder.stdin.close()
        holder.wait(60)
    assert runs.list("", None).rows[0].phase == "Stopped"
    assert not is_locked(folder / ".lock")


@pytest.mark.parametrize("key", ["0/../private", "0/link", "1/a", "0//etc", "", "0/a/../a", "x/a"])
def test_only_what_is_listed_can_be_read(tmp_path: Path, key: str) -> None:
    write(begun(tmp_path / "shown/a", finished=True), range(1, 3))
    write(begun(tmp_path / "private", finished=True), range(1, 3))
    (tmp_path / "shown/link").symlink_to(tmp_path / "private")
    runs = Runs([tmp_path / "shown"])
    assert runs.details("", "0/a").row.name == "a"
    with pytest.raises(SourceError, match="there is no run"):
        runs.details("", key)


def test_links_and_pipes_in_place_of_files_are_not_opened(tmp_path: Path) -> None:
    place = begun(tmp_path / "shown/a", finished=True)
    (tmp_path / "secret.jsonl").write_text('{"step": 1, "prompt": "secret", "completion": "secret"}\n')
    (place / "completions.jsonl").symlink_to(tmp_path / "secret.jsonl")
    os.mkfifo(place / "metrics.jsonl")
    found = Runs([tmp_path / "shown"]).details("", "0/a")
    assert found.samples == []
    assert found.curves["steps"] == []


def test_records_grow_are_read_anew_after_a_resume_and_a_torn_line_waits(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    records = Records(tmp_path / "metrics.jsonl")
    assert [one["step"] for one in records.read()] == [1, 2, 3, 4, 5]
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "rew')
        stream.flush()
        assert len(records.read()) == 5
        stream.write('ard": 0.5}\n')
    assert records.read()[-1] == {"step": 6, "reward": 0.5}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))  # as a resume from step 3 cuts it
    write(tmp_path, range(4, 12), loss=1.0)
    found = records.read()
    assert [one["step"] for one in found] == list(range(1, 12))
    assert found[4]["loss"] == 1.0
    (tmp_path / "metrics.jsonl").unlink()
    assert records.read() == []


def test_a_long_run_is_thinned_and_its_curves_have_few_points(tmp_path: Path) -> None:
    write(tmp_path, range(1, KEPT_RECORDS + 100))
    found = curves(Records(tmp_path / "metrics.jsonl").read())
    assert len(found["steps"]) <= CURVE_POINTS
    assert found["steps"][0] < 100
    assert found["steps"][-1] > KEPT_RECORDS - 100
    assert found["metrics"]["reward"] == pytest.approx([step / 10 for step in found["steps"]])


def test_curves_leave_out_what_is_not_there() -> None:
    found = curves(
        [
            {"step": 1, "reward": 1.0, "kind": "x"},
            {"step": 2, "loss": 2, "reward": None},
            {"step": 3, "loss": float("nan")},
        ]
    )
    assert found == {
        "steps": [1, 2, 3],
        "metrics": {"reward": [1.0, None, None], "loss": [None, 2, None]},
        "mean_of": 1,
    }
    assert curves([])["steps"] == []


def test_texts_lose_what_turns_or_hides_them_and_their_surplus() -> None:
    shown = sample(
        {"step": 1, "prompt": "a\u202eb\x1b[31m", "completion": "c" * 10_000, "reward": True, "answer": [1, 2]}
    )
    assert shown["prompt"] == "ab"
    assert len(shown["completion"]) == 4000
    assert shown["reward"] is None
    assert shown["others"] == {"answer": "[1, 2]"}
    assert text("\ud800") == "\ufffd"


def test_what_is_no_record_does_not_stop_the_list(tmp_path: Path) -> None:
    for name, content in {
        "text": "not json",
        "list": "[]",
        "deep": "[" * 100_000,
        "other": '{"status": "finished", "settings": [], "started": 5, "total_steps": "many"}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
        (tmp_path / name / "metrics.jsonl").write_text('{"step": "one"}\n{"step": -1}\n{"step": 1e300}\n[]\n')
    runs = Runs([tmp_path])
    rows = runs.list("", None).rows
    assert {row.name for row in rows} == {"text", "list", "deep", "other"}
    for row in rows:
        assert row.step is None
        runs.details("", row.key.removeprefix("run/")).dump()
