"""`make gpu` as far as a CPU can run it: each part with tiny models, and what is written of parts that fail."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest

from generated import ROOT, load

SECONDS_OF_ONE_CARD = 480


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load(ROOT / "benchmarks/gpu.py")


@pytest.mark.parametrize("part", ["equal", "rollouts", "memory", "sft", "dpo", "grpo"])
def test_each_part_runs_with_tiny_models_on_the_cpu(gpu: ModuleType, part: str) -> None:
    found = getattr(gpu, part)(gpu.Setting("cpu", small=True))
    assert found
    if part == "equal":
        assert len(found) == 4
    if part == "memory":
        assert all("estimated" in said for said in found.values())
    if part in ("sft", "dpo"):
        assert found["tokens per second"] > 0


def test_a_part_that_hangs_or_fails_is_reported_and_the_page_has_the_others(gpu: ModuleType, monkeypatch) -> None:
    arguments = argparse.Namespace(device="cpu", small=True)
    results = {
        "late": gpu.run_part("equal", arguments, limit=0.05),
        "broken": gpu.run_part("no_such_part", arguments, limit=120),
        "sound": {"seconds": 1.0, "found": {"tokens per second": 17}},
    }
    assert "did not end within its limit" in results["late"]["error"]
    assert results["broken"]["error"] == "KeyError: 'no_such_part'"
    written = gpu.page(results, "cpu", 3.0)
    assert "| sound | tokens per second: 17 | 1.0 |" in written
    assert "| broken | **failed**: KeyError" in written


def test_the_whole_fits_its_time(gpu: ModuleType) -> None:
    assert gpu.WHOLE_SECONDS == SECONDS_OF_ONE_CARD
    assert set(gpu.CUDA_ONLY) < set(gpu.PARTS)
    assert all(0 < limit < SECONDS_OF_ONE_CARD for limit in gpu.PARTS.values())
    assert Path(gpu.RESULTS).is_dir()
