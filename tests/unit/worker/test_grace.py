"""The warning that a save will not fit into the pod's grace period."""

from __future__ import annotations

from pathlib import Path

from nemo_rl.worker import grace
from nemo_rl.worker.grace import Grace, write_speed
from nemo_rl.worker.observe import checkpoint_bytes


def test_a_small_model_is_not_even_probed(tmp_path: Path):
    assert Grace(120).before(10**8, tmp_path / "not there") is None


def test_a_model_too_large_for_the_disk_is_told_with_the_cure(tmp_path: Path):
    line = Grace(30).before(10**15, tmp_path)  # no disk writes a petabyte in half a minute
    assert line is not None
    assert "1000000.0 GB" in line
    assert "only 30s" in line
    assert "terminationGracePeriodSeconds: " in line
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_fits_by_the_probe_is_not_warned_about(tmp_path: Path):
    assert Grace(86400, slowest_disk=1.0).before(10**6, tmp_path) is None


def test_a_save_that_took_too_long_is_told_once():
    watch = Grace(30)
    assert watch.after(20) is None
    assert "took 28s" in (watch.after(28) or "")
    assert watch.after(28) is None


def test_the_probe_measures_what_reaches_the_disk_and_leaves_nothing(tmp_path: Path):
    speed = write_speed(tmp_path)
    assert speed is not None
    assert speed > 0
    assert list(tmp_path.iterdir()) == []
    assert write_speed(tmp_path / "missing") is None


def test_a_checkpoint_holds_weights_and_two_moments_of_what_is_trained():
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    assert checkpoint_bytes(model) == 200 * 12
    model[0].requires_grad_(False)
    assert checkpoint_bytes(model) == 200 * 4 + 100 * 8
    assert grace.STOP_SECONDS < 30
