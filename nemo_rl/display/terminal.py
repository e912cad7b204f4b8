"""What a person sees while a run trains: a live panel on a terminal, an area in a notebook, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.live_render import LiveRender
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from nemo_rl.display.notebook import NotebookDisplay, in_notebook
from nemo_rl.display.phases import MARK, Best, Pace, Phase, duration
from nemo_rl.job.text import dotted
from nemo_rl.run.metrics import SHOWN_SAMPLES, main_metrics, short_line, step_line

SAMPLE_LINES = 3


class Display(Protocol):
    """Where the trainer reports progress. `close` is called once, also after an exception."""

    def start(self, total_steps: int, header: str) -> None:
        """The run begins; `header` is one line about it."""

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        """A step is done. Samples have the fields prompt, completion and reward; only some are shown."""

    def note(self, text: str) -> None:
        """One line for the user, such as a saved checkpoint."""

    def phase(self, phase: Phase | None) -> None:
        """What is done now, also before `start`; the phase counts by itself, and ends with the next one, or with None."""

    def close(self) -> None:
        """The run has ended; the terminal is left in order."""


def make_display(
    log_level: str = "info", stream: TextIO | None = None, *, log_every: int = 1, complete: bool = False
) -> Display:
    """The live display when `stream` (standard output) is a terminal that can show it, plain lines otherwise.

    In a Jupyter kernel one area of the cell. Nothing is shown at the log levels warning and error. `complete`: plain lines
    have all metrics of all steps, as with the level debug; else the main ones, of every `log_every`-th step.
    """
    if log_level in ("warning", "error"):
        return NullDisplay()
    if stream is None and in_notebook():
        return NotebookDisplay()
    stream = stream or sys.stdout
    if _is_capable(stream):
        return LiveDisplay(stream)
    complete = complete or log_level == "debug"
    return PlainDisplay(stream, log_every=1 if complete else log_every, complete=complete)


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

    def phase(self, phase: Phase | None) -> None:
        pass

    def close(self) -> None:
        pass


QUIET_SECONDS = (5.0, 10.0, 20.0, 30.0)
"""Seconds of silence after which a plain display says what is done: the first, the second time, and so on."""


class PlainDisplay:
    """One line per event, flushed at once: for logs and pods. In long phases a line from time to time says what goes on."""

    def __init__(self, stream: TextIO | None = None, *, log_every: int = 1, complete: bool = False) -> None:
        """`complete`: lines have all metrics rather than those that matter most; `log_every`: steps between lines."""
        self._stream, self._log_every, self._complete = stream, log_every, complete
        self._pace = Pace()
        self._first = True
        self._total_steps: int | None = None
        self._phase: Phase | None = None
        self._spoke = time.monotonic()
        self._said = 0
        """Lines about phases since the last other one."""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, total_steps: int, header: str) -> None:
        self._total_steps = total_steps
        self.note(header)

    def expect(self, total_steps: int | None) -> None:
        """How many steps the run will have."""
        self._total_steps = total_steps

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        self._pace.step(metrics)
        step, total = metrics["step"], self._total_steps
        special = self._first or step == total or any(name.startswith("validation_") for name in metrics)
        self._first = False
        if not special and step % self._log_every:
            return
        if self._complete:
            self.note(step_line(dict(metrics), total))
            return
        left = self._pace.left(total - step) if total is not None else None
        self.note(short_line(metrics, total, duration(left) if left is not None else None))

    def note(self, text: str) -> None:
        self._said = 0
        self._print(text)

    def _print(self, text: str) -> None:
        self._spoke = time.monotonic()
        # sys.stdout is looked up now: notebooks and tests replace it.
        print(text, file=self._stream or sys.stdout, flush=True)

    def phase(self, phase: Phase | None) -> None:
        self._phase = phase
        if phase is not None and self._thread is None and not self._closed.is_set():
            self._thread = threading.Thread(target=self._speak, daemon=True, name="nemo-rl-display")
            self._thread.start()

    def _speak(self) -> None:
        while not self._closed.wait(0.5):
            phase, quiet = self._phase, QUIET_SECONDS[min(self._said, len(QUIET_SECONDS) - 1)]
            if phase is not None and time.monotonic() - self._spoke >= quiet:
                self._said += 1
                with contextlib.suppress(ValueError, OSError):  # a stream that was closed behind us
                    self._print(f"{MARK}{phase.words()}")

    def close(self) -> None:
        self._phase = None
        self._closed.set()


class RecordedDisplay:
    """Shows by another display, and writes the same as plain lines to a file."""

    def __init__(self, shown: Display, path: Path) -> None:
        self._shown = shown
        # half of a surrogate pair, which a tokenizer may decode to, is written as \uXXXX
        self._stream = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._plain = PlainDisplay(self._stream, complete=True)

    def start(self, total_steps: int, header: str) -> None:
        self._plain.start(total_steps, header)
        self._shown.start(total_steps, header)

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        self._plain.step(metrics, samples)
        self._shown.step(metrics, samples)

    def note(self, text: str) -> None:
        self._plain.note(text)
        self._shown.note(text)

    def phase(self, phase: Phase | None) -> None:
        self._shown.phase(phase)

    def close(self) -> None:
        self._shown.close()
        self._stream.close()


class _WrappedRender(LiveRender):
    """What is drawn last, with the rows that it takes now: a terminal that became narrower has wrapped its lines since, and
    what is erased for the next drawing must be all of them.
    """

    def __init__(self, console: Console, renderable: RenderableType) -> None:
        super().__init__(renderable)
        self._console = console
        self._lengths: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lengths = [0]
        for part in super().__rich_console__(console, options):
            if isinstance(part, Segment) and part.text == "\n":
                lengths.append(0)
            elif isinstance(part, Segment) and not part.control:
                lengths[-1] += part.cell_length
            yield part
        self._lengths = lengths

    def position_cursor(self) -> Control:
        if self._shape is not None:
            width = max(1, self._console.width)
            self._shape = (self._shape[0], sum(max(1, -(-length // width)) for length in self._lengths))
        return super().position_cursor()


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
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("train", total=None, start=False, left="")
        self._total = 0
        self._pace, self._best = Pace(), Best()
        self._phase: Phase | None = None
        self._shown = False
        self._metrics: Mapping[str, Any] = {}
        self._samples: list[dict[str, Any]] = []
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
        self._live._live_render = _WrappedRender(self._console, self._live.get_renderable())
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self, total_steps: int, header: str) -> None:
        self._console.print(Text(header))
        self._progress.update(self._task, total=total_steps)
        self._progress.start_task(self._task)
        self._total = total_steps
        self._show()

    def _show(self) -> None:
        """Opens the panel, once."""
        if self._shown:
            return
        self._shown = True
        streams = {sys.stdout, sys.stderr}
        self._live.start()
        self._redirect_logging(streams)
        _open_displays.append(self)

    def phase(self, phase: Phase | None) -> None:
        self._phase = phase
        if phase is not None:
            self._show()

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        self._metrics = dict(metrics)
        self._samples = samples[:SHOWN_SAMPLES] or self._samples
        self._pace.step(metrics)
        self._best.see(metrics)
        left = self._pace.left(self._total - metrics["step"])
        shown = f"· {duration(left)} left" if left is not None else ""
        self._progress.update(self._task, completed=metrics["step"], left=shown)
        self._live.refresh()

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def close(self) -> None:
        if self in _open_displays:
            _open_displays.remove(self)
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        self._phase = None
        if self._shown:
            self._live.stop()

    def _redirect_logging(self, streams: set[TextIO]) -> None:
        """Log handlers keep the stream that they were made with; lend them the one that prints above the panel."""
        known = [logging.root, *(o for o in logging.root.manager.loggerDict.values() if isinstance(o, logging.Logger))]
        for handler in {h for owner in known for h in owner.handlers}:
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def _render(self) -> Group:
        best = self._best.words()
        cells = [*main_metrics(self._metrics), *([best] if best and self._metrics else [])]
        shown: list[Any] = [self._progress] if self._total else []
        if (phase := self._phase) is not None:
            shown.append(Text(f"  {phase.words()}", style="dim"))
        # rows of cells that fit: one that is cut off, or broken within a name, cannot be read
        for row in _rows(cells, self._console.width):
            table = Table.grid(padding=(0, 3))
            table.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in row))
            shown.append(table)
        return Group(*shown, *map(_sample_panel, self._samples))


def _rows(cells: list[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """The cells in as many rows as the terminal needs."""
    rows: list[list[tuple[str, str]]] = []
    used = 0
    for name, value in cells:
        size = len(name) + len(value) + 4
        if not rows or used + size > width:
            rows.append([])
            used = 0
        rows[-1].append((name, value))
        used += size
    return rows


def _sample_panel(sample: dict[str, Any]) -> Panel:
    reward = sample.get("reward")
    title = Text(f"reward {reward:.3g}" if isinstance(reward, (int, float)) else "sample")
    body = Text.assemble((_excerpt(sample["prompt"]), "dim"), "\n", _excerpt(sample["completion"]))
    return Panel(body, title=title, title_align="left", border_style="dim")


def _excerpt(value: Any, width: int = 240) -> str:
    """A few lines of a text; what is not printable becomes a dot, so that a model never drives the terminal."""
    text = value if isinstance(value, str) else str(value)
    lines = [dotted(line) for line in text.strip().splitlines()]
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
