"""Several ranks train as one does: the same weights, metrics and completions, and they end together whatever happens."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from unit.distributed.conftest import Launcher, assert_same_run, metrics_of, write_family
from unit.distributed.ranks import SMALL_FILE

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "sft": {"algorithm": "sft"},
    "dpo": {"algorithm": "dpo"},
    "grpo": {"algorithm": "grpo"},
    "several updates against a reference": {"algorithm": "grpo", "keywords": {"num_iterations": 2, "beta": 0.1}},
    "adapters": {"algorithm": "sft", "keywords": {"lora_rank": 2}},
    # the last batch of each epoch has one example, so that one rank has none
    "batches smaller than the ranks": {"algorithm": "grpo", "rows": 5, "keywords": {"max_steps": 4}},
    "micro-batches": {"algorithm": "sft", "rows": 5, "keywords": {"max_steps": 4, "tokens_per_microbatch": 8}},
}
ON_FOUR = ("sft", "dpo", "grpo", "adapters")

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
    "lfm2": {"num_hidden_layers": 3, "full_attn_idxs": [1], "conv_L_cache": 3},
}
"""A mixture of experts, whose files have other names than its modules, and convolutions between attention."""


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_families_train_on_several_ranks_as_on_one(
    family: str, launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    model = write_family(tmp_path / "model", tiny_model, family, **FAMILIES[family])
    for ranks in (1, 2, 4):
        assert launcher.run(ranks, tmp_path / str(ranks), model=model, algorithm="grpo") == [0] * ranks
    for ranks in (2, 4):
        assert_same_run(tmp_path / str(ranks), tmp_path / "1", 3)


def test_a_checkpoint_with_adapters_is_gathered_part_by_part(
    launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    model = write_family(tmp_path / "model", tiny_model, "qwen2", num_hidden_layers=12)
    job = {"algorithm": "sft", "model": model, "keywords": {"lora_rank": 2, "max_steps": 1}}
    assert launcher.run(2, tmp_path / "run", callback="measures saving", **job) == [0, 0]
    files = list((tmp_path / "run" / "checkpoints" / "latest").glob("model-*.safetensors"))
    assert len(files) > 2
    parts: dict[str, int] = {}
    for name, tensor in ((name, tensor) for file in files for name, tensor in load_file(file).items()):
        part = name.split(".")[2] if ".layers." in name else name
        parts[part] = parts.get(part, 0) + tensor.nbytes
    block, size = max(parts.values()), sum(parts.values())
    held = [int((tmp_path / f"run.saving{rank}").read_text()) for rank in (0, 1)]
    limit = SMALL_FILE + 3 * block
    assert limit < size / 2
    assert held[0] < limit, "the first rank has a file, and the block that goes into it"
    assert held[1] < block


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_no_rank_keeps_a_whole_copy_of_a_given_model_to_compare_with(
    algorithm: str, launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    keywords = {"beta": 0.1} if algorithm == "grpo" else {}
    job = {"algorithm": algorithm, "model": tiny_model, "live": True, "keywords": {**keywords, "max_steps": 2}}
    assert launcher.run(1, tmp_path / "1", **job) == [0]
    assert launcher.run(2, tmp_path / "2", callback="measures whole weights", **job) == [0, 0]
    assert [int((tmp_path / f"2.whole{rank}").read_text()) for rank in (0, 1)] == [0, 0]
    assert_same_run(tmp_path / "2", tmp_path / "1", 2)


def test_whole_weights_on_each_rank_train_the_same(launcher: Launcher, tiny_model: str, tmp_path: Path) -> None:
    job = {"algorithm": "grpo", "model": tiny_model, "keywords": {"sharding": "none"}}
    for size in (1, 2):
        assert launcher.run(size, tmp_path / str(size), **job) == [0] * size
    assert_same_run(tmp_path / "2", tmp_path / "1", 3)


def test_a_pass_without_memory_on_one_rank_is_repeated_with_less_on_both(
    launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    job = {"algorithm": "sft", "model": tiny_model, "keywords": {"tokens_per_microbatch": 64, "batch_size": 8}}
    assert launcher.run(1, tmp_path / "1", **job) == [0]
    assert launcher.run(2, tmp_path / "2", callback="out of memory", **job) == [0, 0]
    assert_same_run(tmp_path / "2", tmp_path / "1", 3)
    assert float((tmp_path / "2.budget").read_text()) < 1


def test_an_error_in_a_pass_of_one_rank_ends_both_within_seconds(
    launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    job = {"algorithm": "sft", "model": tiny_model, "keywords": {"save_every": 1}}
    begin = time.monotonic()
    assert launcher.run(2, tmp_path / "run", callback="fails in a pass", **job) == [1, 1]
    assert time.monotonic() - begin < 60
    for rank in range(2):
        assert "ZeroDivisionError: in a block of rank 1" in (tmp_path / f"run.rank{rank}").read_text()
    assert launcher.run(2, tmp_path / "run", **job) == [0, 0], "the run goes on from its last checkpoint"


@pytest.mark.parametrize("case", list(CASES))
def test_several_ranks_train_as_one(case: str, launcher: Launcher, tiny_model: str, tmp_path: Path) -> None:
    steps = CASES[case].get("keywords", {}).get("max_steps", 3)
    sizes = (1, 2, 4) if case in ON_FOUR else (1, 2)
    for size in sizes:
        assert launcher.run(size, tmp_path / str(size), model=tiny_model, **CASES[case]) == [0] * size
    for size in sizes[1:]:
        assert_same_run(tmp_path / str(size), tmp_path / "1", steps)


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
    assert not list(tmp_path.glob("broken-*"))


def test_a_signal_to_one_rank_saves_and_ends_both(launcher: Launcher, tiny_model: str, tmp_path: Path) -> None:
    job = {"algorithm": "sft", "model": tiny_model, "keywords": {"max_steps": 5}}
    assert launcher.run(2, tmp_path / "run", callback="signal 1", **job) == [75, 75]
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert saved == ["step-00000002"]
    for rank in range(2):
        assert "SIGTERM" in (tmp_path / f"run.rank{rank}").read_text()


def test_a_signal_in_the_evaluation_of_a_step_leaves_its_end_to_the_next_run(
    launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    job = {"algorithm": "grpo", "model": tiny_model, "validation": True, "keywords": {"max_steps": 4, "eval_every": 2}}
    assert launcher.run(1, tmp_path / "unbroken", **job) == [0]
    assert launcher.run(2, tmp_path / "broken", callback="evaluation 1", **job) == [75, 75]
    assert [line["step"] for line in metrics_of(tmp_path / "broken")] == [0, 1]
    assert launcher.run(2, tmp_path / "broken", **job) == [0, 0]
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", 4)


def test_a_signal_to_a_rank_that_waits_ends_the_work_of_the_other_one(
    launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    begin = time.monotonic()
    job = {"algorithm": "grpo", "model": tiny_model, "reward": "slow on rank 1", "keywords": {"reward_timeout": 180.0}}
    assert launcher.run(2, tmp_path / "run", callback="signal waiting 0", **job) == [75, 75]
    assert time.monotonic() - begin < 100, "the reward of rank 1 takes 150 s"


def test_a_reward_that_raises_on_one_rank_ends_both_with_its_error(
    launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    assert launcher.run(2, tmp_path / "run", algorithm="grpo", model=tiny_model, reward="fails on rank 1") == [1, 1]
    for rank in range(2):
        assert "the reward of rank 1" in (tmp_path / f"run.rank{rank}").read_text()
    assert "on rank 1" in (tmp_path / "run.rank0").read_text()


def test_a_callback_that_raises_on_one_rank_ends_both_also_if_its_process_lives_on(
    launcher: Launcher, tiny_model: str, tmp_path: Path
) -> None:
    job = {"algorithm": "sft", "model": tiny_model, "callback": "raise", "lives_on": True}
    begin = time.monotonic()
    assert launcher.run(2, tmp_path / "run", **job) == [1, 1]
    assert time.monotonic() - begin < 100, "the process of rank 1 waits 150 s for the end of rank 0"
    said = (tmp_path / "run.rank0").read_text()
    assert said.startswith("RankFailed: another rank ended this run, rank 1: KeyError: 'the callback of rank 1'")
    assert "RaiseOnRank1.on_step_begin" in said


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_other_one(killed: int, launcher: Launcher, tiny_model: str, tmp_path: Path) -> None:
    job = {"algorithm": "grpo", "model": tiny_model, "keywords": {"max_steps": 5, "save_every": 1}}
    expected = [-signal.SIGKILL, 1] if killed == 0 else [1, -signal.SIGKILL]
    assert launcher.run(2, tmp_path / "run", callback=f"kill {killed}", **job) == expected
    assert "RankFailed: another rank ended this run" in (tmp_path / f"run.rank{1 - killed}").read_text()
    assert launcher.run(2, tmp_path / "run", **job) == [0, 0], "the run goes on from its last checkpoint"


def test_a_callback_that_stops_one_rank_stops_both(launcher: Launcher, tiny_model: str, tmp_path: Path) -> None:
    assert launcher.run(2, tmp_path / "run", algorithm="sft", model=tiny_model, callback="stop") == [0, 0]
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    shutil.rmtree(tmp_path / "run")
