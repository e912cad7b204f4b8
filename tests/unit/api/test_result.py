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


def test_plot_draws_what_was_measured_and_saves_a_picture(result: TrainResult, tmp_path: Path):
    figure = result.plot(tmp_path / "plots" / "curve.png", metrics=["reward", "loss"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["reward", "loss"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [row["reward"] for row in HISTORY]
    assert figure.get_suptitle() == f"{tmp_path.name}, 4 steps"
    assert (tmp_path / "plots" / "curve.png").read_bytes().startswith(b"\x89PNG")


def history_of(**metrics: float) -> list[dict[str, float]]:
    return [{"step": step, **{name: value * step for name, value in metrics.items()}} for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("metrics", "panels"),
    [
        (
            {
                "reward": 0.1,
                "loss": 1e-9,
                "reward_std": 0.1,
                "entropy": 1.0,
                "completion_length": 9.0,
                "validation_reward": 0.2,
            },
            [["reward", "validation reward"], ["reward std"], ["completion length"], ["entropy"]],
        ),
        (
            {
                "loss": 0.7,
                "preference_accuracy": 0.5,
                "reward_margin": 0.1,
                "validation_loss": 0.7,
                "chosen_reward": 0.1,
            },
            [["preference accuracy"], ["reward margin"], ["loss", "validation loss"]],
        ),
        (
            {"loss": 0.7, "grad_norm": 1.0, "validation_loss": 0.7, "validation_seconds": 1.0},
            [["loss", "validation loss"]],
        ),
    ],
)
def test_plot_shows_what_matters_to_the_algorithm(metrics: dict[str, float], panels: list[list[str]]):
    figure = TrainResult(history=history_of(**metrics)).plot()
    assert [[line.get_label() for line in axes.lines] for axes in figure.axes] == panels
    assert [axes.get_title() for axes in figure.axes] == [panel[0] for panel in panels]


def test_plot_smooths_long_runs_and_shows_what_was_measured_beside():
    rows = [{"step": step, "reward": 0.0 if step % 2 else 1.0} for step in range(1, 101)]
    measured, smoothed = TrainResult(history=rows).plot().axes[0].lines
    assert list(measured.get_ydata()) == [row["reward"] for row in rows]
    assert all(0.4 < value < 0.6 for value in list(smoothed.get_ydata())[20:])
    constant = TrainResult(history=[{"step": s, "reward": 0.5} for s in (1, 2, 3)]).plot(smoothing=0.9).axes[0].lines[1]
    assert list(constant.get_ydata()) == pytest.approx([0.5] * 3)  # no pull to zero at the start
    (line,) = TrainResult(history=rows).plot(smoothing=0).axes[0].lines
    assert line.get_alpha() is None
    with pytest.raises(ValueError, match=r"smoothing=1 is out of range"):
        TrainResult(history=rows).plot(smoothing=1)


def test_the_same_run_gives_the_same_svg_whose_texts_are_texts(result: TrainResult, tmp_path: Path):
    for name in ("a.svg", "b.svg"):
        result.plot(tmp_path / name, title="sums")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ">sums</text>" in (tmp_path / "a.svg").read_text()


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
    assert ">0.4</text>" in page and ">0.1</text>" in page  # the axis has its ends


def test_html_escapes_what_it_shows():
    page = TrainResult(metrics={"<b>": 1}, checkpoint_path="<script>")._repr_html_()
    assert "<script>" not in page
    assert "<b>:" not in page
    assert "&lt;b&gt;" in page
