"""What a notebook cell shows of a run, in a kernel that nbclient runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from nemo_rl.display.notebook import NotebookDisplay, in_notebook
from nemo_rl.display.terminal import PlainDisplay, make_display

RUN = """
from nemo_rl.display import notebook
from nemo_rl.display.terminal import make_display

notebook.REDRAW_SECONDS = 0.0
display = make_display()
display.start(3, "grpo <b>tiny</b>")
sample = {"prompt": "2+2=<?>", "completion": "4\\n<script>", "reward": 0.5}
for step in (1, 2, 3):
    metrics = {"step": step, "reward": step / 10, "reward_std": 0.25, "kl": 0.01, "completion_length": 7.5}
    metrics |= {"tokens_per_second": 1234.5, "step_seconds": 2.0}
    display.step(metrics, [sample, {**sample, "completion": f"c{step}"}, sample] if step < 3 else [])
    if step == 2:
        display.note("a checkpoint was saved")
        print(display._render())
display.close()
notebook.without_warning_of_widgets()
import tqdm.auto
type(display).__name__
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(RUN)])
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
        nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return list(book.cells[0].outputs)


def test_a_cell_gets_one_area_that_is_drawn_anew(outputs: list[Any]) -> None:
    areas = [o for o in outputs if o.output_type == "display_data"]
    assert len(areas) == 1
    final = areas[0].data["text/html"]
    assert "step 3/3" in final
    assert "reward: 0.1 → 0.3" in final and "<polyline" in final
    assert " left<" not in final


def test_the_area_shows_metrics_time_left_and_two_samples_with_their_rewards(outputs: list[Any]) -> None:
    shown = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "a checkpoint was saved" in shown
    for text in ("0.2 ± 0.25", "0.01", "7.5", "1,23", "· 2 s left<", "2+2=&lt;?&gt;", "c2", "(reward 0.5)"):
        assert text in shown, text
    assert shown.count("(reward 0.5)") == 2


def test_nothing_that_a_model_or_user_writes_becomes_html(outputs: list[Any]) -> None:
    final = next(o for o in outputs if o.output_type == "display_data").data["text/html"]
    assert "4<br>&lt;script&gt;" in final
    assert "<script>" not in final
    assert "grpo &lt;b&gt;tiny" in final


def test_no_red_warning_asks_for_widgets(outputs: list[Any]) -> None:
    """Of tqdm, whose bars lack ipywidgets in the tests' environment: a run shows its own progress."""
    assert [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"] == []


def test_a_kernel_is_told_from_a_plain_process(outputs: list[Any]) -> None:
    (told,) = [o for o in outputs if o.output_type == "execute_result"]
    assert told.data["text/plain"] == repr(NotebookDisplay.__name__)
    assert not in_notebook()
    assert isinstance(make_display(), PlainDisplay)
