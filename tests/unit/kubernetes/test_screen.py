"""What is shown of a job, whatever its pod prints."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.backends.kubernetes.screen import Screen, printable
from nemo_rl.display.terminal import LiveDisplay, NullDisplay, PlainDisplay
from nemo_rl.job.status import JobStatus
from nemo_rl.run.metrics import sample_line


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


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_of_a_pod_drives_the_terminal(text: str) -> None:
    assert all(c.isprintable() or c == "\t" for c in printable(text))


def test_colours_and_overwritten_progress_bars_leave_only_their_text() -> None:
    assert printable("\x1b[31mred\x1b[0m \x1b]0;title\x07x") == "red x"
    assert printable(" 10%|#\r 50%|#####\r100%|##########\n") == "100%|##########"


@settings(deadline=None)
@given(st.text(max_size=80))
def test_what_only_looks_like_a_step_harms_no_display(text: str) -> None:
    shown = Screen(display=LiveDisplay(io.StringIO()))
    for line in (f"step=1/2 reward={text}", f'step=2/2 reward="{text}" kl=true', f"step={text}", text):
        shown.line(line)
    shown.close()


class Watched(NullDisplay):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, list[str]]] = []
        self.notes: list[str] = []

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        self.told.append((metrics["step"], [sample["completion"] for sample in samples]))

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_samples_go_to_the_display_of_their_step_and_not_among_the_lines() -> None:
    display = Watched()
    shown = Screen(display=display)
    for step in (1, 2):
        shown.line(f"step={step}/2 reward=0.5")
        for completion in "abc":
            shown.line(sample_line(step, {"prompt": "?", "completion": f"{completion}{step}", "reward": 1.0}))
    assert display.told[:4] == [(1, []), (1, ["a1"]), (1, ["a1", "b1"]), (1, ["a1", "c1"])]
    assert display.told[-1] == (2, ["a2", "c2"])
    assert display.notes == []


def test_a_plain_log_has_the_samples_as_they_came() -> None:
    out = io.StringIO()
    line = sample_line(1, {"prompt": "?", "completion": "a", "reward": None})
    Screen(display=PlainDisplay(out)).line(line)
    assert out.getvalue() == f"{line}\n"
