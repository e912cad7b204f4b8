"""The pods of a job with several ranks: one of them speaks, and whatever ends one of them ends all, with the right words."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from nemo_rl.job import names
from nemo_rl.job.names import ExitCode
from unit.worker.pods import Engine, Job, Pod, until
from unit.worker.test_attempts import grpo, sft

OTHER = 1
"""Counted by the operator; the pod that knows the cause tells it."""
GATE = [{"function": "pod_callbacks:Gate"}]


def test_two_ranks_finish_a_job_and_only_the_first_speaks(engine: Engine, tiny_model: Path, tmp_path: Path):
    job = Job(tmp_path, engine, sft(tiny_model))
    assert job.run() == [0, 0], job.pods[0].said() + job.pods[1].said()
    assert job.pods[0].word().total_steps == 4
    assert len(job.pods[0].history()) == 4
    assert "on port" in job.pods[0].said()
    assert job.pods[1].said() == ""
    assert job.pods[1].path(names.TERMINATION_LOG).read_text() == ""


def test_both_ranks_tell_of_data_that_cannot_be_used_and_only_the_first_serves(
    engine: Engine, tiny_model: Path, tmp_path: Path
):
    job = Job(tmp_path, engine, sft(tiny_model, dataset={"inline": [{"colour": "red"}]}))
    assert job.run() == [ExitCode.BAD_DATA, ExitCode.BAD_DATA]
    for pod in job.pods:
        assert "'colour'" in (pod.word().message or "")
    assert "on port" not in job.pods[1].said()


@pytest.mark.parametrize("stopped", [0, 1])
def test_sigterm_to_any_rank_saves_and_ends_all_as_preempted(
    stopped: int, engine: Engine, tiny_model: Path, tmp_path: Path
):
    job = Job(tmp_path, engine, sft(tiny_model, callbacks=GATE)).start(HOLD_AT="3")
    for pod in job.pods:
        pod.wait_at_gate()
    job.pods[stopped].stop()
    for pod in job.pods:
        pod.open_gate()
    assert job.end() == [ExitCode.PREEMPTED, ExitCode.PREEMPTED]
    word = job.pods[0].word()
    assert word.checkpoint is not None
    assert word.checkpoint.latest_step == 3
    assert job.run() == [0, 0]
    assert [row["step"] for row in job.pods[0].history()] == [1, 2, 3, 4]


def test_a_reward_that_raises_on_any_rank_is_the_users_error_on_all(engine: Engine, tiny_model: Path, tmp_path: Path):
    source = (
        "import os\n\n\ndef reward(prompt: str, response: str) -> float:\n"
        "    return len(response) if os.environ['RANK'] == '0' else 1 / 0\n"
    )
    spec = grpo(tiny_model) | {"reward": {"source": source}, "callbacks": []}
    job = Job(tmp_path, engine, spec)
    assert job.run() == [ExitCode.USER_ERROR, ExitCode.USER_ERROR]
    for pod in job.pods:
        assert "ZeroDivisionError" in (pod.word().message or "")
        assert "1 / 0" in (pod.word().traceback or "")


def test_a_callback_that_raises_on_one_rank_is_told_by_its_pod_and_followed_by_the_other(
    engine: Engine, tiny_model: Path, tmp_path: Path
):
    job = Job(tmp_path, engine, sft(tiny_model, callbacks=[{"function": "pod_callbacks:BrokenOnRank1"}]))
    assert job.run() == [OTHER, ExitCode.USER_ERROR]
    assert (job.pods[1].word().cause, job.pods[0].word().cause) == ("UserError", "RankFailed")
    followed = job.pods[0].word().message or ""
    assert followed.startswith("another rank ended this run, rank 1: KeyError: 'rewrad'")
    assert "Traceback" not in job.pods[0].said()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_other_one_as_no_fault_of_the_users(
    killed: int, engine: Engine, tiny_model: Path, tmp_path: Path
):
    job = Job(tmp_path, engine, sft(tiny_model, callbacks=GATE)).start(HOLD_AT="3")
    for pod in job.pods:
        pod.wait_at_gate()
    job.pods[killed].stop(signal.SIGKILL)
    job.pods[1 - killed].open_gate()
    codes = job.end()
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == OTHER
    word = job.pods[1 - killed].word()
    assert word.cause == "RankFailed"
    assert (word.message or "").startswith("another rank ended this run")
    job.pods[killed].open_gate()
    assert job.run() == [0, 0], "the next attempt goes on from the last checkpoint"
    assert [row["step"] for row in job.pods[0].history()] == [1, 2, 3, 4]


def test_a_rank_that_waits_for_the_others_to_come_heeds_sigterm(engine: Engine, tiny_model: Path, tmp_path: Path):
    from torch.distributed import TCPStore

    served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun does
    pod = Pod(tmp_path, engine, sft(tiny_model))
    pod.start(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(served.port), RANK="1", WORLD_SIZE="2")
    until(lambda: served.check(["nemo_rl/joined/1"]), "the rank to come")
    begin = time.monotonic()
    pod.stop()
    assert pod.end() == ExitCode.PREEMPTED
    assert time.monotonic() - begin < 60, "it would wait for ten minutes"
