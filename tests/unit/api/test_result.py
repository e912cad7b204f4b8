"""TrainResult: lazily read history, lazily loaded trainer, plot and representations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_rl import TrainResult

HISTORY = [{"step": s, "epoch": 0, "reward": 0.1 * s, "loss": 1.0 / s, "step_seconds": 0.5} for s in range(1, 5)]


@pytest.fixture
def result(tmp_path: Path) -> TrainResult:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HISTORY))
    return TrainResult(None, HISTORY[-1], tmp_path / "best", 4, output_dir=tmp_path)


def test_history_is_every_step(result: TrainResult):
    assert result.history == HISTORY


def test_history_is_found_through_the_trainer(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert TrainResult(SimpleNamespace(output_dir=tmp_path)).history == [{"step": 1}]


def test_history_of_an_unknown_place_is_an_error():
    with pytest.raises(FileNotFoundError, match="no output folder is known"):
        _ = TrainResult().history


def test_the_checkpoint_path_is_text(result: TrainResult, tmp_path: Path):
    assert result.checkpoint_path == str(tmp_path / "best")
    assert TrainResult().checkpoint_path is None


def test_the_trainer_is_loaded_once_when_it_is_asked_for():
    loaded: list[str] = []

    def load() -> str:
        loaded.append("x")
        return "trainer"

    result = TrainResult(load_trainer=load)
    assert loaded == []
    assert (result.trainer, result.trainer, loaded) == ("trainer", "trainer", ["x"])


def test_plot_draws_reward_and_loss_and_saves_a_picture(result: TrainResult, tmp_path: Path):
    figure = result.plot(tmp_path / "plots" / "curve.png")
    assert [axes.get_ylabel() for axes in figure.axes] == ["reward", "loss"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [row["reward"] for row in HISTORY]
    assert (tmp_path / "plots" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_an_unknown_metric_names_the_known_ones(result: TrainResult):
    with pytest.raises(ValueError, match="'kl' is not in the history; expected some of loss, reward"):
        result.plot(metrics=["kl"])


def test_plot_without_matplotlib_says_how_to_get_it(result: TrainResult, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install 'matplotlib"):
        result.plot()


def test_representations_show_steps_and_metrics_without_timings(result: TrainResult):
    assert "total_steps=4" in repr(result)
    assert "reward=0.4" in repr(result)
    assert "step_seconds" not in repr(result)
    page = result._repr_html_()
    assert "<polyline" in page
    assert "reward: 0.1 → 0.4" in page


def test_html_escapes_what_it_shows():
    page = TrainResult(metrics={"<b>": 1}, checkpoint_path="<script>")._repr_html_()
    assert "<script>" not in page
    assert "<b>:" not in page
    assert "&lt;b&gt;" in page
