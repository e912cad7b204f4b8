"""What travels with a job: few inline rows stay in it, many become a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.backends import Run
from nemo_rl.backends.kubernetes.contents import gather
from nemo_rl.job import names
from nemo_rl.job.spec import RLTrainingJobSpec


def spec(rows: list[dict[str, Any]], **more: Any) -> RLTrainingJobSpec:
    found = {"model": "org/model", "algorithm": "sft", "dataset": {"inline": rows, "maxRows": 7}}
    return RLTrainingJobSpec.model_validate(found | more)


@pytest.mark.parametrize(("count", "travels"), [(10, False), (3000, True)])
def test_many_inline_rows_travel_as_a_file(tmp_path: Path, count: int, travels: bool) -> None:
    rows = [{"prompt": f"{n} " + "é" * 20, "completion": "b"} for n in range(count)]
    contents = gather(Run(spec(rows, validationDataset={"inline": rows}), tmp_path))
    for section in (contents.spec.dataset, contents.spec.validation_dataset):
        assert section is not None
        assert (section.inline is None) is travels
        assert (section.path or "").startswith("bundle://") is travels
    assert contents.spec.dataset.max_rows == 7, "what else was said of them is kept"
    assert contents.rows == rows[:4], "the reward is tried on them nevertheless"
    assert len(contents.spec.model_dump_json()) < 2 * names.MAX_INLINE_ROWS + 10_000
    assert bool(contents.config_maps()) is travels
    assert any("travel as a file" in note for note in contents.notes) is travels


def test_the_limit_is_in_bytes_as_the_admission_policy_counts_them(tmp_path: Path) -> None:
    around = len(json.dumps([{"prompt": "", "completion": ""}], separators=(", ", ":")))
    fits = [{"prompt": "a" * (names.MAX_INLINE_ROWS - around), "completion": ""}]
    over = [{"prompt": "a" * (names.MAX_INLINE_ROWS - around + 1), "completion": ""}]
    assert gather(Run(spec(fits), tmp_path)).spec.dataset.inline == fits
    assert gather(Run(spec(over), tmp_path)).spec.dataset.inline is None
