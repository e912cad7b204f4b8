"""What of a result that came from a store is renamed at home."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl.backends.kubernetes.outputs import _without_generation


@pytest.mark.parametrize("name", ["step-00000005-g3", "step-00000005"])
def test_a_checkpoint_has_the_name_that_it_has_on_a_disk(name: str, tmp_path: Path) -> None:
    """A name without a generation was an error of pathlib: names come from a pod, which may say anything."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    found = _without_generation(tmp_path / name)
    assert found == tmp_path / "step-00000005"
    assert (found / "config.json").read_text() == "{}"
