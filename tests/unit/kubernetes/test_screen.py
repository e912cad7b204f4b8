"""What is shown of a job, whatever its pod prints."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.backends.kubernetes import screen
from nemo_rl.backends.kubernetes.screen import NotebookDisplay, Screen, printable
from nemo_rl.display import LiveDisplay, PlainDisplay
from nemo_rl.job.status import JobStatus


def test_each_step_is_kept_once_and_the_later_attempt_wins() -> None:
    shown = Screen(display=PlainDisplay(io.StringIO()))
    for line in ("step=1/3 reward=0.1", "hello", "step=2/3 reward=0.2", "step=2/3 reward=0.5", "step=3/3 reward=0.6"):
        shown.line(line)
    assert [(row["step"], row["reward"]) for row in shown.history] == [(1, 0.1), (2, 0.5), (3, 0.6)]


def test_lines_are_printed_as_they_came_and_phases_once() -> None:
    out = io.StringIO()
    shown = Screen(display=PlainDisplay(out))
    waiting = JobStatus(phase="Pending", message="waiting for 1 × nvidia.com/gpu")
    for status in (waiting, waiting, JobStatus(phase="Running", message="step 1")):
        shown.status(status)
    shown.line("step=1/3 reward=0.1")
    shown.line("printed by a callback")
    assert out.getvalue().splitlines() == [
        "nemo-rl: Pending: waiting for 1 × nvidia.com/gpu",
        "step=1/3 reward=0.1",
        "printed by a callback",
    ]


@given(st.text(max_size=200))
def test_no_text_of_a_pod_drives_the_terminal(text: str) -> None:
    assert all(c.isprintable() or c == "\t" for c in printable(text))


def test_colours_and_overwritten_progress_bars_leave_only_their_text() -> None:
    assert printable("\x1b[31mred\x1b[0m \x1b]0;title\x07x") == "red x"
    assert printable(" 10%|#\r 50%|#####\r100%|##########\n") == "100%|##########"


@given(st.text(max_size=80))
def test_what_only_looks_like_a_step_harms_no_display(text: str) -> None:
    shown = Screen(display=LiveDisplay(io.StringIO()))
    for line in (f"step=1/2 reward={text}", f'step=2/2 reward="{text}" kl=true', f"step={text}", text):
        shown.line(line)
    shown.close()


def test_a_notebook_gets_one_area_that_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    handles: list[Any] = []

    class Handle:
        def update(self, shown: str) -> None:
            drawn.append(shown)

    def display(shown: str, display_id: bool) -> Handle:
        drawn.append(shown)
        handles.append(Handle())
        return handles[-1]

    module = types.SimpleNamespace(HTML=lambda text: text, display=display)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(screen, "_NOTEBOOK_SECONDS", 0.0)
    shown = Screen(display=NotebookDisplay())
    for step in (1, 2, 3):
        shown.line(f"step={step}/3 reward=0.{step} note=<script>")
        shown.line(f"step={step}/3 reward=0.{step} kl=0.01")
    shown.close()
    assert len(handles) == 1
    assert "3/3" in drawn[-1] and "reward: 0.1 → 0.3" in drawn[-1] and "<polyline" in drawn[-1]
    assert not any("<script>" in one for one in drawn)


def test_a_kernel_is_told_from_a_plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not screen.in_notebook()
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert screen.in_notebook()
