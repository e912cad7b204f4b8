"""A run that hangs ends by itself, with the stacks of its processes; one that is merely slow does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from nemo_rl.job import names
from nemo_rl.job.names import ExitCode
from nemo_rl.job.status import TRACEBACK_LINES, TerminationMessage
from nemo_rl.worker import ending
from nemo_rl.worker.report import SAVING, Report
from unit.worker.pods import Engine, Job, Pod, surroundings
from unit.worker.test_attempts import grpo, sft

HANG = [{"function": "pod_callbacks:Gate"}]
OTHER = 1


def test_a_callback_that_never_returns_ends_as_stalled_with_its_stack(engine: Engine, tiny_model: Path, tmp_path: Path):
    pod = Pod(tmp_path, engine, sft(tiny_model, callbacks=HANG, stallTimeoutSeconds=10))
    assert pod.run(HOLD_AT="3") == OTHER
    word = pod.word()
    assert (word.kind, word.cause, word.exit_code, word.total_steps) == ("failure", "Stalled", OTHER, 3)
    assert "while training after step 3" in (word.message or "")
    assert "stallTimeoutSeconds" in (word.message or "")
    assert "pod_callbacks.py" in (word.traceback or "")
    assert "on_step_end" in (word.traceback or "")
    assert 'File "' in pod.said()
    assert "Current thread" in pod.said() or "Thread 0x" in pod.said()
    pod.open_gate()
    assert pod.run() == 0, "the next attempt goes on"
    assert [row["step"] for row in pod.history()] == [1, 2, 3, 4]


def test_a_rank_that_hangs_ends_all_and_is_the_cause(engine: Engine, tiny_model: Path, tmp_path: Path):
    job = Job(tmp_path, engine, sft(tiny_model, callbacks=HANG, stallTimeoutSeconds=10)).start(HOLD_AT="3")
    for pod in job.pods:
        pod.wait_at_gate()
    job.pods[0].open_gate()  # it goes on to an exchange that the other one never comes to
    assert job.end() == [OTHER, OTHER]
    first, second = (pod.word() for pod in job.pods)
    assert second.cause == "Stalled"
    assert (second.traceback or "").startswith("rank 1:")
    assert "pod_callbacks.py" in (second.traceback or "")
    assert first.cause in ("RankFailed", "Stalled")
    assert "Stalled" in (first.message or "") or (first.traceback or "").startswith("rank 0:")


def test_where_even_the_interpreter_gets_no_turn_the_process_ends_with_its_stacks(tmp_path: Path):
    program = """
import ctypes
from nemo_rl.worker import stall
from nemo_rl.worker.job import Pod
from nemo_rl.worker.report import Report
stall.FROZEN_SECONDS = 2.0
report = Report()
report.stall_seconds = report.silent_seconds = 1.0
stall.StallWatch(report, Pod()).start()
def native():
    ctypes.PyDLL(None).sleep(100)  # keeps the interpreter's lock
report.beat()
native()
"""
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program], env=surroundings(), capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == OTHER
    assert time.monotonic() - begin < 80
    assert "in native" in ended.stderr


def test_the_probe_asks_the_pod_itself(engine: Engine, tiny_model: Path, tmp_path: Path):
    pod = Pod(tmp_path, engine, sft(tiny_model, callbacks=HANG))

    def probe() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", names.PROBE_MODULE]
        return subprocess.run(
            command, env={**surroundings(), **pod.environment()}, capture_output=True, text=True, check=False
        )

    assert probe().returncode == 1
    pod.start(HOLD_AT="2")
    pod.wait_at_gate()
    found = probe()
    assert (found.returncode, found.stdout[:12]) == (0, "ok: training"), found.stdout
    pod.open_gate()
    assert pod.end() == 0
    assert probe().returncode == 1


def test_silent_phases_have_the_time_of_a_start():
    report = Report()
    report.stall_seconds, report.silent_seconds = 10.0, 500.0
    assert report.quiet()[1] == 500.0
    report.begin(0, 10)
    assert report.quiet()[1] == 10.0
    report.reward_seconds = 7.0
    assert report.quiet()[1] == 24.0, "a reward that takes its time is no hang"
    with report.during(SAVING):
        assert report.quiet()[1] == 514.0


def test_the_stacks_of_all_processes_of_a_pod_stand_in_one_word(tmp_path: Path):
    log = tmp_path / "word"
    deep = "\n".join(f'  File "f{i}.py", line {i}, in f\n    call()' for i in range(30))
    for rank in range(8):
        word = ending.stalled("no progress", f"rank {rank}", f"{deep}\nhangs here", step=3, checkpoint=None)
        ending.write_stalled(word, log)
    found = TerminationMessage.parse(log.read_text())
    assert found is not None
    lines = (found.traceback or "").splitlines()
    assert len(lines) <= TRACEBACK_LINES
    assert [line for line in lines if line.startswith("rank")] == [f"rank {rank}:" for rank in range(8)]
    assert lines[-1] == "hangs here"


def test_a_better_word_stays(tmp_path: Path):
    log = tmp_path / "word"
    ending.write(TerminationMessage(kind="failure", exit_code=40, cause="UserError", message="mine"), log)
    ending.write_stalled(ending.stalled("no progress", "rank 1", "x", step=1, checkpoint=None), log)
    assert "mine" in log.read_text()


def test_a_reward_that_hangs_is_the_users_error_by_its_own_limit(engine: Engine, tiny_model: Path, tmp_path: Path):
    spec = grpo(tiny_model)
    hangs = "import time\n\ndef reward(prompt: str, response: str) -> float:\n    time.sleep(10_000)\n    return 1.0\n"
    spec |= {"callbacks": [], "reward": {"source": hangs, "timeoutSeconds": 3}, "stallTimeoutSeconds": 60}
    pod = Pod(tmp_path, engine, spec)
    assert pod.run() == ExitCode.USER_ERROR, pod.said()
    word = pod.word()
    assert (word.kind, word.cause) == ("failure", "UserError")
    assert "3" in (word.message or "") and "reward" in (word.message or ""), word.message


def test_a_reward_that_hangs_while_it_is_loaded_ends_as_stalled(engine: Engine, tiny_model: Path, tmp_path: Path):
    spec = grpo(tiny_model)
    hangs = "import time\n\ntime.sleep(10_000)\n\ndef reward(prompt: str, response: str) -> float:\n    return 1.0\n"
    spec |= {"callbacks": [], "reward": {"source": hangs, "timeoutSeconds": 3}}
    pod = Pod(tmp_path, engine, spec | {"stallTimeoutSeconds": 10, "startupTimeoutSeconds": 10})
    assert pod.run() == OTHER, pod.said()
    word = pod.word()
    assert (word.kind, word.cause) == ("failure", "Stalled")
    assert "time.sleep(10_000)" in (word.traceback or "") or "in <module>" in (word.traceback or "")
