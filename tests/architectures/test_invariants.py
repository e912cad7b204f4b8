"""Each mechanism trains the same with other micro-batches, on several ranks, and when it is stopped and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from architectures.test_architectures import MECHANISMS
from architectures.tiny_models import make_model
from unit.distributed.conftest import Launcher, assert_same_run, metrics_of
from unit.trainers.conftest import write_model

STEPS = 3
REFUSED = {"bert", "cpmant", "mllama"}


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    started = Launcher()
    yield started
    started.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model_type", [t for t in MECHANISMS if t not in REFUSED])
def test_micro_batches_ranks_and_stops_change_nothing(
    model_type: str, launcher: Launcher, tokenizer: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    make_model(model_type).save_pretrained(model)
    tokenizer.save_pretrained(model)

    def run(name: str, ranks: int, callback: str | None = None, **keywords: Any) -> list[int]:
        # with this epsilon a weight whose gradient is nothing but rounding takes no step that is nothing but rounding
        keywords = {"save_every": 1, "adam_epsilon": 1e-3, **keywords}
        job: dict[str, Any] = {"algorithm": "grpo", "model": str(model), "keywords": keywords}
        return launcher.run(ranks, tmp_path / name, **job, **({"callback": callback} if callback else {}))

    assert run("one", 1) == [0]
    assert len(metrics_of(tmp_path / "one")) == STEPS
    assert run("small micro-batches", 1, tokens_per_microbatch=12) == [0]
    assert run("two ranks", 2) == [0, 0]
    assert run("stopped", 1, callback="signal 0") == [75]
    assert len(metrics_of(tmp_path / "stopped")) == STEPS - 1
    assert run("stopped", 1) == [0]
    for name, tolerance in (("small micro-batches", 1e-5), ("two ranks", 1e-5), ("stopped", 0.0)):
        assert_same_run(tmp_path / name, tmp_path / "one", STEPS, tolerance)
