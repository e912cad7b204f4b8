"""The run directory: what goes on, what steps aside, and one run at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.run.directory import RunBusyError, differences, open_run

SETTINGS = {"model": "tiny", "training": {"learning_rate": 1e-6, "seed": 1}, "lora": None}
OTHER = {"model": "tiny", "training": {"learning_rate": 2e-6, "seed": 1}, "beta": 0.1}


def leave_run(directory: Path, settings: dict = SETTINGS, *, finished: bool = False, checkpoint: bool = False) -> None:
    """A run that was in `directory` before, with one line of metrics."""
    with open_run(directory, settings, "auto") as run:
        (run.dir / "metrics.jsonl").write_text("before\n")
        if checkpoint:
            path = run.dir / "checkpoints" / "step-00000001"
            path.mkdir(parents=True)
            record = {"format": 1, "step": 1, "metric": None, "state": {}, "optimizer_groups": [], "files": {}}
            (path / "state.json").write_text(json.dumps(record))
        if finished:
            run.finish()


def entries(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.parametrize(
    ("before", "settings", "resume", "expected"),
    [
        (None, SETTINGS, "auto", "new"),
        (None, SETTINGS, "never", "new"),
        (None, SETTINGS, "required", "there is no run"),
        ({}, SETTINGS, "auto", "continues"),
        ({"checkpoint": True}, SETTINGS, "auto", "continues"),
        ({"checkpoint": True}, SETTINGS, "required", "continues"),
        ({}, SETTINGS, "required", "no complete checkpoint"),
        ({"checkpoint": True}, SETTINGS, "never", "aside"),
        ({"finished": True}, SETTINGS, "auto", "aside"),
        ({"finished": True}, SETTINGS, "never", "aside"),
        ({"finished": True, "checkpoint": True}, SETTINGS, "required", "finished"),
        ({"checkpoint": True}, OTHER, "auto", "aside"),
        ({"checkpoint": True}, OTHER, "never", "aside"),
        ({"checkpoint": True}, OTHER, "required", "training.learning_rate was 1e-06, now 2e-06"),
    ],
)
def test_what_happens_to_the_run_that_is_there(tmp_path, before, settings, resume, expected):
    directory = tmp_path / "out" / "model"
    if before is not None:
        leave_run(directory, **before)
    if expected not in ("new", "continues", "aside"):
        with pytest.raises(ValueError, match=expected):
            open_run(directory, settings, resume)
        assert before is None or (directory / "metrics.jsonl").read_text() == "before\n"
        return
    with open_run(directory, settings, resume) as run:
        assert run.resuming == (expected == "continues")
        assert run.dir == directory
        assert (run.notice is None) == (expected == "new")
        assert (directory / "metrics.jsonl").exists() == (expected == "continues")
    aside = directory.with_name("model.old-1")
    assert aside.exists() == (expected == "aside")
    if expected == "aside":
        assert (aside / "metrics.jsonl").read_text() == "before\n"
        assert str(aside) in run.notice
        assert "\n" not in run.notice


def test_differences_name_every_field(tmp_path):
    leave_run(tmp_path / "run", checkpoint=True)
    with pytest.raises(ValueError, match="other settings") as caught:
        open_run(tmp_path / "run", OTHER, "required")
    for phrase in ("beta was absent, now 0.1", "lora was null, now absent", "learning_rate was 1e-06, now 2e-06"):
        assert phrase in str(caught.value)
    assert "seed" not in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("xyz"), inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("pqr"), values), st.dictionaries(st.sampled_from("pqr"), values))
def test_differences_are_empty_only_for_equal_settings(there, here):
    same = json.dumps(there, sort_keys=True) == json.dumps(here, sort_keys=True)
    assert (differences(there, here) == []) == same


def test_each_run_that_steps_aside_gets_its_own_number(tmp_path):
    directory = tmp_path / "run"
    for number in range(4):
        with open_run(directory, {"n": number}, "never") as run:
            (run.dir / "mine.txt").write_text(str(number))
    assert entries(tmp_path) == ["run", "run.old-1", "run.old-2", "run.old-3"]
    assert [(tmp_path / f"run.old-{n}" / "mine.txt").read_text() for n in (1, 2, 3)] == ["0", "1", "2"]


def test_tuples_and_other_spellings_of_equal_settings_resume(tmp_path):
    open_run(tmp_path / "run", {"a": (1, 2), "b": {"x": 1, "y": 2}}, "auto").close()
    with open_run(tmp_path / "run", {"b": {"y": 2, "x": 1}, "a": [1, 2]}, "auto") as run:
        assert run.resuming


def test_files_of_others_in_a_directory_that_was_there_stay(tmp_path):
    (tmp_path / "notebook.ipynb").write_text("mine")
    leave_run(tmp_path, finished=True)
    with open_run(tmp_path, SETTINGS, "auto") as run:
        assert not run.resuming
    assert (tmp_path / "notebook.ipynb").read_text() == "mine"
    aside = tmp_path.with_name(f"{tmp_path.name}.old-1")
    assert entries(aside) == ["metrics.jsonl", "run.json"]
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 99, "status": "unfinished"}'])
def test_unreadable_record_is_another_run(tmp_path, content):
    directory = tmp_path / "run"
    leave_run(directory, checkpoint=True)
    (directory / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"no readable run\.json"):
        open_run(directory, SETTINGS, "required")
    with open_run(directory, SETTINGS, "auto") as run:
        assert not run.resuming
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == "before\n"


def test_foreign_files_alone_are_no_run(tmp_path):
    (tmp_path / "data.csv").write_text("x")
    with open_run(tmp_path, SETTINGS, "auto") as run:
        assert not run.resuming
        assert run.notice is None


def test_finish_is_recorded_and_lets_go(tmp_path):
    run = open_run(tmp_path / "run", SETTINGS, "auto")
    assert json.loads((run.dir / "run.json").read_text())["status"] == "unfinished"
    run.finish()
    assert json.loads((run.dir / "run.json").read_text())["status"] == "finished"
    open_run(tmp_path / "run", SETTINGS, "auto").close()


def test_second_run_of_this_process_is_refused(tmp_path):
    with open_run(tmp_path / "run", SETTINGS, "auto"):
        (tmp_path / "alias").symlink_to(tmp_path / "run")
        for path in (tmp_path / "run", tmp_path / "alias"):
            with pytest.raises(RunBusyError, match="another output_dir"):
                open_run(path, OTHER, "never")
    open_run(tmp_path / "run", SETTINGS, "auto").close()


HOLDER = """
import os, sys, time
from pathlib import Path
from nemo_rl.run.directory import open_run
run = open_run(Path(sys.argv[1]), {"model": "tiny"}, "auto")
worker = os.fork()   # like a reward worker: it outlives a killed trainer for a while
if worker == 0:
    time.sleep(60)
    os._exit(0)
print(worker, flush=True)
sys.stdin.read()
"""


def test_run_of_another_process_is_refused_until_it_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(RunBusyError, match="another run"):
            open_run(tmp_path / "run", {"model": "tiny"}, "never")
        holder.kill()
        holder.wait()
        with open_run(tmp_path / "run", {"model": "tiny"}, "auto") as run:  # although its worker still lives
            assert run.resuming
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.stdin.close()
        holder.stdout.close()


RACER = """
import sys
from pathlib import Path
from nemo_rl.run.directory import RunBusyError, open_run
print("ready", flush=True)
sys.stdin.readline()
try:
    run = open_run(Path(sys.argv[1]), {"n": int(sys.argv[2])}, "never")
except RunBusyError:
    print("busy", flush=True)
else:
    print(f"won {sys.argv[2]}", flush=True)
    sys.stdin.readline()
"""


def test_one_of_several_processes_at_once_wins(tmp_path):
    directory = tmp_path / "run"
    leave_run(directory, finished=True)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(directory), str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(4)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    answers = [racer.stdout.readline().split() for racer in racers]
    winners = [answer[1] for answer in answers if answer[0] == "won"]
    record = json.loads((directory / "run.json").read_text())
    for racer in racers:
        racer.communicate("\n")
    assert len(winners) == 1
    assert record["settings"] == {"n": int(winners[0])}
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_text() == "before\n"
