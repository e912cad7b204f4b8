"""The run directory: what goes on, what begins beside it, and one run at a time."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.run.directory import RunBusyError, check_output_dir, default_output_dir, differences, open_run

SETTINGS = {"model": "tiny", "training": {"learning_rate": 1e-6, "seed": 1}, "lora": None}
OTHER = {"model": "tiny", "training": {"learning_rate": 2e-6, "seed": 1}, "beta": 0.1}


def leave_run(directory: Path, settings: dict = SETTINGS, *, finished: bool = False, checkpoint: bool = False) -> None:
    """A run that was in `directory` before, with one line of metrics."""
    with open_run(directory, settings, "auto", total_steps=8) as run:
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
        ({"checkpoint": True}, SETTINGS, "never", "beside"),
        ({"finished": True}, SETTINGS, "auto", "beside"),
        ({"finished": True}, SETTINGS, "never", "beside"),
        ({"finished": True, "checkpoint": True}, SETTINGS, "required", "finished"),
        ({"checkpoint": True}, OTHER, "auto", "beside"),
        ({"checkpoint": True}, OTHER, "never", "beside"),
        ({"checkpoint": True}, OTHER, "required", "training.learning_rate was 1e-06, now 2e-06"),
    ],
)
def test_what_happens_to_the_run_that_is_there(tmp_path, before, settings, resume, expected):
    directory = tmp_path / "out" / "model"
    if before is not None:
        leave_run(directory, **before)
    if expected not in ("new", "continues", "beside"):
        with pytest.raises(ValueError, match=expected):
            open_run(directory, settings, resume, total_steps=8)
        assert before is None or (directory / "metrics.jsonl").read_text() == "before\n"
        return
    with open_run(directory, settings, resume, total_steps=8) as run:
        assert run.resuming == (expected == "continues")
        assert run.dir == (directory.with_name("model-2") if expected == "beside" else directory)
        assert (run.notice is None) == (expected == "new")
    if before is not None:
        assert (directory / "metrics.jsonl").read_text() == "before\n"
    if expected == "beside":
        assert str(run.dir) in run.notice
        assert "\n" not in run.notice
        assert not (run.dir / "metrics.jsonl").exists()


@pytest.mark.parametrize("resume", ["auto", "required"])
def test_a_finished_run_is_lengthened_where_it_is(tmp_path, resume):
    leave_run(tmp_path / "run", finished=True, checkpoint=True)
    with open_run(tmp_path / "run", SETTINGS, resume, total_steps=20) as run:
        assert (run.dir, run.resuming, run.lengthened) == (tmp_path / "run", True, True)
        assert (run.total_steps, run.first_total_steps) == (20, 8)
        assert "had finished its 8 steps; it goes on to 20" in run.notice
        run.finish(run.dir / "checkpoints" / "step-00000001")
    with open_run(tmp_path / "run", SETTINGS, resume, total_steps=21) as run:
        assert (run.first_total_steps, run.kept) == (8, ("step-00000001",))
    with open_run(tmp_path / "run", SETTINGS, resume, total_steps=30) as run:  # unfinished, and longer than it was
        assert not run.lengthened
        assert "to 30 steps instead of 21" in run.notice


def test_a_later_run_of_the_family_is_found_again(tmp_path):
    leave_run(tmp_path / "run", OTHER)
    leave_run(tmp_path / "run", checkpoint=True)
    for resume in ("auto", "required"):
        with open_run(tmp_path / "run", SETTINGS, resume, total_steps=8) as run:
            assert (run.dir, run.resuming) == (tmp_path / "run-2", True)


def test_a_folder_of_somebody_else_is_never_taken_for_one_beside(tmp_path):
    leave_run(tmp_path / "run")
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / "thesis.tex").write_text("mine")
    (tmp_path / "run-3").write_text("a file")
    with open_run(tmp_path / "run", OTHER, "auto") as run:
        assert run.dir == tmp_path / "run-4"
    assert entries(tmp_path / "run-2") == ["thesis.tex"]


def test_runs_of_a_job_stay_within_its_folder(tmp_path):
    leave_run(tmp_path / "job")
    with open_run(tmp_path / "job", OTHER, "auto", inside=True) as run:
        assert run.dir == tmp_path / "job" / "run-2"
    with open_run(tmp_path / "job", OTHER, "auto", inside=True) as run:
        assert (run.dir, run.resuming) == (tmp_path / "job" / "run-2", True)


def test_the_moment_of_the_first_start_stays(tmp_path):
    moment = datetime.datetime(2026, 2, 3, 23, 59, tzinfo=datetime.UTC)
    open_run(tmp_path / "run", SETTINGS, "auto", started=moment).close()
    with open_run(tmp_path / "run", SETTINGS, "auto", started=moment + datetime.timedelta(days=1)) as run:
        assert run.started == moment


def test_differences_name_every_field(tmp_path):
    leave_run(tmp_path / "run", checkpoint=True)
    with pytest.raises(ValueError, match="other settings") as caught:
        open_run(tmp_path / "run", OTHER, "required")
    for phrase in ("beta was absent, now 0.1", "lora was null, now absent", "learning_rate was 1e-06, now 2e-06"):
        assert phrase in str(caught.value)
    assert "seed" not in str(caught.value)
    assert str(caught.value).endswith("; give the same settings, or use resume='auto' to begin a run beside it")


def test_between_two_algorithms_only_what_both_have_is_compared():
    there = {"algorithm": "grpo", "seed": 1, "temperature": 1.0, "reward": {"f()": "sha256:aa"}}
    here = {"algorithm": "sft", "seed": 2, "train_on_prompt": False}
    assert differences(there, here) == ['algorithm was "grpo", now "sft"', "seed was 1, now 2"]


def test_a_finished_run_of_these_settings_is_named_before_a_later_one_of_others(tmp_path):
    for place, wanted in (("run", SETTINGS), ("run-2", OTHER)):
        with open_run(tmp_path / "run", wanted, "auto", total_steps=4) as run:
            assert run.dir == tmp_path / place
            run.finish()
    with pytest.raises(ValueError, match=r"run holds a finished run of 4 steps \(a larger max_steps"):
        open_run(tmp_path / "run", SETTINGS, "required", total_steps=4)


def test_a_result_of_another_job_of_the_same_name_is_told_without_identifiers():
    there, here = ({"job": "a", "uid": uid} for uid in ("8f03-11", "fd9a-22"))
    assert differences(there, here) == ["it is of another job of that name"]


def test_a_digest_that_differs_is_said_without_its_figures():
    assert differences({"dataset": "sha256:aa", "x": 1}, {"dataset": "sha256:bb", "x": 1}) == ["dataset has changed"]
    assert differences({"r": {"f()": "sha256:aa"}}, {"r": {}}) == [
        "r was absent, now {}",
        "r.f() was there, now absent",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [("", "is empty"), ("  ", "is empty"), ("notes.txt", "is a file, not a folder"), ("notes.txt/x/y", "is a file"),
     ("dangling", "is a link to nothing")],
)  # fmt: skip
def test_an_output_dir_that_is_no_folder_is_refused(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"output_dir=.*{said}"):
        check_output_dir(given)
    assert entries(tmp_path) == ["dangling", "notes.txt"]


def test_an_output_dir_with_a_tilde_is_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output_dir("~/out") == tmp_path / "out"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("outputs/tiny/checkpoints/step-00000010", "tiny"),
        ("/a/tiny-2/checkpoints/best/", "tiny-2"),
        ("./checkpoints/latest", "latest"),
        ("org/model", "model"),
    ],
)
def test_a_checkpoint_gives_its_runs_name(model, name):
    assert default_output_dir(model) == Path("outputs") / name


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


def test_each_run_beside_gets_its_own_number(tmp_path):
    directory = tmp_path / "run"
    for number in range(4):
        with open_run(directory, {"n": number}, "never") as run:
            (run.dir / "mine.txt").write_text(str(number))
    assert entries(tmp_path) == ["run", "run-2", "run-3", "run-4"]
    assert [(tmp_path / name / "mine.txt").read_text() for name in entries(tmp_path)] == ["0", "1", "2", "3"]


def test_tuples_and_other_spellings_of_equal_settings_resume(tmp_path):
    open_run(tmp_path / "run", {"a": (1, 2), "b": {"x": 1, "y": 2}}, "auto").close()
    with open_run(tmp_path / "run", {"b": {"y": 2, "x": 1}, "a": [1, 2]}, "auto") as run:
        assert run.resuming


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 99, "status": "unfinished"}'])
def test_unreadable_record_is_another_run(tmp_path, content):
    directory = tmp_path / "run"
    leave_run(directory, checkpoint=True)
    (directory / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"no readable run\.json"):
        open_run(directory, SETTINGS, "required")
    with open_run(directory, SETTINGS, "auto") as run:
        assert not run.resuming
        assert run.dir == tmp_path / "run-2"
    assert (directory / "metrics.jsonl").read_text() == "before\n"


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


def test_two_calls_of_this_process_never_share_a_folder(tmp_path):
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    with open_run(tmp_path / "run", SETTINGS, "auto"):
        for path in (tmp_path / "run", tmp_path / "alias"):
            with pytest.raises(RunBusyError, match="being trained by another call"):
                open_run(path, SETTINGS, "auto")
        with open_run(tmp_path / "run", OTHER, "auto") as second, open_run(tmp_path / "alias", OTHER, "never") as third:
            assert (second.dir, third.dir) == (tmp_path / "run-2", tmp_path / "run-3")
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
        with pytest.raises(RunBusyError, match="another call"):
            open_run(tmp_path / "run", {"model": "tiny"}, "auto")
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
from nemo_rl.run.directory import open_run
print("ready", flush=True)
sys.stdin.readline()
run = open_run(Path(sys.argv[1]), {"n": int(sys.argv[2])}, "never")
print(run.dir.name, flush=True)
sys.stdin.readline()
"""


def test_several_processes_at_once_each_get_a_folder_of_their_own(tmp_path):
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
    taken = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.communicate("\n")
    assert sorted(taken) == ["run-2", "run-3", "run-4", "run-5"]
    for number, name in enumerate(taken):
        assert json.loads((tmp_path / name / "run.json").read_text())["settings"] == {"n": number}
    assert (directory / "metrics.jsonl").read_text() == "before\n"
