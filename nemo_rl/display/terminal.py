"""What a person sees while a run trains: a live panel on a terminal, an area in a notebook, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nemo_rl.display.notebook import NotebookDisplay, in_notebook
from nemo_rl.run.metrics import SHOWN_SAMPLES, main_metrics, step_line

SAMPLE_LINES = 3


class Display(Protocol):
    """Where the trainer reports progress. `close` is called once, also after an exception."""

    def start(self, total_steps: int, header: str) -> None:
        """The run begins; `header` is one line about it."""

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        """A step is done. Samples have the fields prompt, completion and reward; only some are shown."""

    def note(self, text: str) -> None:
        """One line for the user, such as a saved checkpoint."""

    def close(self) -> None:
        """The run has ended; the terminal is left in order."""


def make_display(log_level: str = "info", stream: TextIO | None = None) -> Display:
    """The live display when `stream` (standard output) is a terminal that can show it, plain lines otherwise.

    In a Jupyter kernel one area of the cell. Nothing is shown at the log levels warning and error.
    """
    if log_level in ("warning", "error"):
        return NullDisplay()
    if stream is None and in_notebook():
        return NotebookDisplay()
    stream = stream or sys.stdout
    return LiveDisplay(stream) if _is_capable(stream) else PlainDisplay(stream)


def _is_capable(stream: TextIO) -> bool:
    """NO_COLOR is taken as the wish for plain text as a whole (https://no-color.org names colour only)."""
    if os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    return stream.isatty()


class NullDisplay:
    """Shows nothing."""

    def start(self, total_steps: int, header: str) -> None:
        pass

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class PlainDisplay:
    """One line per event, flushed at once: for logs and pods."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._total_steps: int | None = None

    def start(self, total_steps: int, header: str) -> None:
        self._total_steps = total_steps
        self.note(header)

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        self.note(step_line(dict(metrics), self._total_steps))

    def note(self, text: str) -> None:
        # sys.stdout is looked up now: notebooks and tests replace it.
        print(text, file=self._stream or sys.stdout, flush=True)

    def close(self) -> None:
        pass


class RecordedDisplay:
    """Shows by another display, and writes the same as plain lines to a file."""

    def __init__(self, shown: Display, path: Path) -> None:
        self._shown = shown
        # half of a surrogate pair, which a tokenizer may decode to, is written as \uXXXX
        self._stream = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._plain = PlainDisplay(self._stream)

    def start(self, total_steps: int, header: str) -> None:
        self._plain.start(total_steps, header)
        self._shown.start(total_steps, header)

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        self._plain.step(metrics, samples)
        self._shown.step(metrics, samples)

    def note(self, text: str) -> None:
        self._plain.note(text)
        self._shown.note(text)

    def close(self) -> None:
        self._shown.close()
        self._stream.close()


class LiveDisplay:
    """A panel at the bottom of the terminal: progress and time left, the main metrics, sample completions.

    While it is open, what others print, warn and log appears above it.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stdout)
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("train", total=None, start=False)
        self._metrics: Mapping[str, Any] = {}
        self._samples: list[dict[str, Any]] = []
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self, total_steps: int, header: str) -> None:
        self._console.print(Text(header), soft_wrap=True)
        self._progress.update(self._task, total=total_steps)
        self._progress.start_task(self._task)
        streams = {sys.stdout, sys.stderr}
        self._live.start()
        self._redirect_logging(streams)
        _open_displays.append(self)

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        if not self._metrics and metrics["step"] > 1:
            # The first step of a resumed run: the time left follows from this process's own pace.
            self._progress.reset(self._task, completed=metrics["step"] - 1)
        self._metrics = dict(metrics)
        self._samples = samples[:SHOWN_SAMPLES] or self._samples
        self._progress.update(self._task, completed=metrics["step"])
        self._live.refresh()

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        if self in _open_displays:
            _open_displays.remove(self)
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        self._live.stop()

    def _redirect_logging(self, streams: set[TextIO]) -> None:
        """Log handlers keep the stream that they were made with; lend them the one that prints above the panel."""
        known = [logging.root, *(o for o in logging.root.manager.loggerDict.values() if isinstance(o, logging.Logger))]
        for handler in {h for owner in known for h in owner.handlers}:
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 3))
        table.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in main_metrics(self._metrics)))
        return Group(self._progress, table, *map(_sample_panel, self._samples))


def _sample_panel(sample: dict[str, Any]) -> Panel:
    reward = sample.get("reward")
    title = Text(f"reward {reward:.3g}" if isinstance(reward, (int, float)) else "sample")
    body = Text.assemble((_excerpt(sample["prompt"]), "dim"), "\n", _excerpt(sample["completion"]))
    return Panel(body, title=title, title_align="left", border_style="dim")


def _excerpt(value: Any, width: int = 240) -> str:
    """A few lines of a text; what is not printable becomes a dot, so that a model never drives the terminal."""
    text = value if isinstance(value, str) else str(value)
    lines = ["".join(c if c.isprintable() else "·" for c in line) for line in text.strip().splitlines()]
    excerpt = "\n".join(lines[:SAMPLE_LINES])
    return excerpt if len(lines) <= SAMPLE_LINES and len(excerpt) <= width else f"{excerpt[:width]}…"


# --- forked workers -------------------------------------------------------------------------------------------------

_open_displays: list[LiveDisplay] = []


def _restore_streams_in_child() -> None:
    """A worker forked while the panel is open would print through it, and wait for a lock that nobody gives back."""
    if _open_displays:
        _open_displays.clear()
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


os.register_at_fork(after_in_child=_restore_streams_in_child)
