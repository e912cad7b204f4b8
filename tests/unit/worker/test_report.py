"""What a pod says about itself: progress that only goes forward, health that follows the signs of life, time left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.job.status import MAX_METRICS, Checkpoint, Progress
from nemo_rl.run.stored.checkpoints import PublishedCheckpoints
from nemo_rl.run.stored.lease import HeadLease
from nemo_rl.run.stored.writer import Writer
from nemo_rl.worker import report as phases
from nemo_rl.worker.prometheus import TrainMetrics
from nemo_rl.worker.report import Report
from nemo_rl.worker.server import encode


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(phases.time, "monotonic", found.monotonic)
    return found


def test_before_training_the_text_is_the_phase(clock: Clock):
    report = Report()
    assert report.progress().text == "importing"
    with report.during(phases.LOADING_MODEL):
        clock.now += 4
        assert report.progress().text == "loading model"
    assert report.seconds[phases.LOADING_MODEL] == 4
    assert report.progress().text == "importing"


def test_the_time_left_follows_the_pace_of_this_process_alone(clock: Clock):
    report = Report()
    report.begin(step=90, total_steps=100)
    assert report.progress().seconds_remaining is None
    for step in (91, 92):
        clock.now += 7
        report.step_ended(step, {"step": step, "epoch": 3, "loss": 1.0})
    progress = report.progress()
    assert (progress.step, progress.text, progress.percent, progress.epoch) == (92, "92/100", 92, 3)
    assert progress.seconds_remaining == 7 * 8
    assert progress.eta == "56s"


def test_the_time_left_forgets_an_old_pace(clock: Clock):
    report = Report()
    report.begin(step=0, total_steps=1000)
    for seconds in [100.0] * 30 + [1.0] * phases.PACE_STEPS:
        clock.now += seconds
        report.step_ended(report.step + 1, {})
    assert report.progress().seconds_remaining == 950


def test_a_loop_without_a_sign_of_life_is_stuck_until_the_next_one(clock: Clock):
    report = Report()
    report.reward_seconds, report.stall_seconds, report.silent_seconds = 60, 600, 3600
    report.begin(0, 10)
    clock.now += 600 + 2 * 60
    assert report.health()[0]
    clock.now += 1
    healthy, sentence = report.health()
    assert not healthy
    assert sentence.startswith("stuck: training, step 0")
    report.beat()
    assert report.health()[0]


def test_a_phase_that_cannot_speak_may_be_quiet_for_longer(clock: Clock):
    report = Report()
    report.stall_seconds, report.silent_seconds = 600, 3600
    report.begin(0, 10)
    with report.during(phases.SAVING):
        clock.now += 3600
        assert report.health()[0]
        clock.now += 1
        assert not report.health()[0]
    assert report.health()[0]  # the save is over, and that was a sign of life


def test_signs_of_life_of_the_ranks_that_it_waits_for_count(clock: Clock):
    report = Report()
    report.stall_seconds = 600
    report.begin(0, 10)
    clock.now += 500
    report.alive_at(clock.now - 100)
    clock.now += 500
    assert report.health()[0]
    report.alive_at(clock.now - 900)  # an older one takes nothing back
    clock.now += 1
    assert not report.health()[0]


def test_the_checkpoint_is_served_beside_the_progress():
    report = Report()
    report.saved(Checkpoint(latest="x/checkpoints/step-1", latest_step=1))
    served = json.loads(encode(report.progress()))
    assert served["checkpoint"] == {"latest": "x/checkpoints/step-1", "latestStep": 1}
    assert Progress.model_validate(served).checkpoint == report.checkpoint


def test_the_main_metrics_are_kept_where_there_are_too_many():
    metrics: dict[str, Any] = {f"a/{i}": 1.0 for i in range(MAX_METRICS)}
    report = Report()
    report.begin(0, 10)
    report.step_ended(1, {**metrics, "step": 1, "epoch": 0, "reward": 0.5, "train_seconds": 3.0})
    found = report.progress().metrics
    assert len(found) == MAX_METRICS
    assert found["reward"] == "0.5"
    assert not {"step", "epoch", "train_seconds"} & set(found)


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.floats(), st.integers(), st.text(), st.lists(st.floats()))))
def test_no_metrics_that_training_may_give_break_a_report(metrics: dict[str, Any]):
    report, series = Report(), TrainMetrics()
    report.begin(0, 10)
    metrics = {name: value for name, value in metrics.items() if name not in ("epoch", "step")}
    report.step_ended(1, metrics)
    Progress.model_validate_json(encode(report.progress()))
    series.step_ended(1, {f"{name}_seconds": 1.0 for name in metrics} | {"tokens": float("nan"), "loss": None})
    assert b"nemo_rl_train_step 1.0" in series.text()


def test_counters_add_up_over_steps():
    series = TrainMetrics()
    for step in (1, 2):
        series.step_ended(step, {"tokens": 10, "reward_errors": 2, "reward_seconds": 1.5, "reward": 0.25 * step})
    text = series.text().decode()
    assert "nemo_rl_train_tokens_total 20.0" in text
    assert "nemo_rl_train_reward_errors_total 4.0" in text
    assert 'nemo_rl_train_seconds_total{part="reward"} 3.0' in text
    assert "nemo_rl_train_reward 0.5" in text


def test_before_the_first_step_there_is_no_time_of_the_last_one():
    """0 would be a standstill of decades, and raise an alert while the model is still being loaded."""
    series = TrainMetrics()
    series.begin(0, 10)
    assert b"last_step_timestamp" not in series.text()
    series.step_ended(1, {})
    assert b"\nnemo_rl_train_last_step_timestamp_seconds 1." in series.text()


def test_a_folder_without_checkpoints_has_none(tmp_path: Path):
    assert phases.read_checkpoints(tmp_path / "run", tmp_path, "grpo") is None


def test_only_the_first_rank_reports_what_is_in_a_store(tmp_path: Path):
    """Others know the checkpoints that there were when they began. Their last words would take the job's status back to these."""
    found = {}
    for rank in (0, 1):
        lease = HeadLease("s3://bucket/run", tmp_path, Writer(), lambda sentence: None)
        entry = {"name": "step-00000004", "folder": "step-00000004-g1", "step": 4, "metric": None, "files": []}
        lease.head = {"checkpoints": [entry]}
        found[rank] = phases.published_checkpoints(PublishedCheckpoints(lease, rank=rank, carries=True), "sft")
    assert found[0] is not None
    assert (found[0].latest_step, found[0].latest) == (4, "s3://bucket/run/checkpoints/step-00000004-g1")
    assert found[1] is None
