"""Two ranks train as one does: the same weights, metrics and completions, and they end together whatever happens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from unit.distributed.conftest import Launcher, assert_same_run, metrics_of

pytestmark = pytest.mark.slow

CASES = {
    "sft": {"algorithm": "sft"},
    "dpo": {"algorithm": "dpo"},
    "grpo": {"algorithm": "grpo"},
    "several updates against a reference": {"algorithm": "grpo", "keywords": {"num_iterations": 2, "beta": 0.1}},
    "adapters": {"algorithm": "sft", "keywords": {"lora_rank": 2}},
    # the last batch of each epoch has one example, so that one rank has none
    "batches smaller than the ranks": {"algorithm": "grpo", "rows": 5, "keywords": {"max_steps": 4}},
    "micro-batches": {"algorithm": "sft", "rows": 5, "keywords": {"max_steps": 4, "tokens_per_microbatch": 8}},
}


@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_train_as_one(case: str, launcher: Launcher, tiny_model: str, tmp_path: Path) -> None:
    steps = CASES[case].get("keywords", {}).get("max_steps", 3)
    for size in (1, 2):
        assert launcher.run(size, tmp_path / str(size), model=tiny_model, **CASES[case]) == [0] * size
    assert_same_run(tmp_path / "2", tmp_path / "1", steps)


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    first: int, second: int, launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    job = {"algorithm": "grpo", "model": tiny_model, "keywords": {"max_steps": 5, "save_every": 1}}
    assert launcher.run(1, tmp_path / "unbroken", **job) == [0]
    # every rank, or the one there is, gets the signal before step 3
    codes = launcher.run(first, tmp_path / "broken", callback=f"signal {first - 1}", **job)
    assert codes == [75] * first
    assert len(metrics_of(tmp_path / "broken")) == 2
    assert launcher.run(second, tmp_path / "broken", **job) == [0] * second
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", 5)
    assert not list(tmp_path.glob("*.old-*"))


def test_a_signal_to_one_rank_saves_and_ends_both(launcher: Launcher, tiny_model: str, tmp_path: Path) -> None:
    job = {"algorithm": "sft", "model": tiny_model, "keywords": {"max_steps": 5}}
    assert launcher.run(2, tmp_path / "run", callback="signal 1", **job) == [75, 75]
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert saved == ["step-00000002"]
    for rank in range(2):
        assert "SIGTERM" in (tmp_path / f"run.rank{rank}").read_text()


def test_a_reward_that_raises_on_one_rank_ends_both_with_its_error(
    launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    assert launcher.run(2, tmp_path / "run", 60, algorithm="grpo", model=tiny_model, failing_reward=True) == [1, 1]
    for rank in range(2):
        assert "the reward of rank 1" in (tmp_path / f"run.rank{rank}").read_text()
    assert "on rank 1" in (tmp_path / "run.rank0").read_text()


def test_a_callback_that_raises_on_one_rank_ends_both(launcher: Launcher, tiny_model: str, tmp_path: Path) -> None:
    assert launcher.run(2, tmp_path / "run", 60, algorithm="sft", model=tiny_model, callback="raise") == [1, 1]
    said = (tmp_path / "run.rank0").read_text()
    assert said.startswith("RankFailed")
    assert "the callback of rank 1" in said


def test_a_callback_that_stops_one_rank_stops_both(launcher: Launcher, tiny_model: str, tmp_path: Path) -> None:
    assert launcher.run(2, tmp_path / "run", algorithm="sft", model=tiny_model, callback="stop") == [0, 0]
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    shutil.rmtree(tmp_path / "run")
