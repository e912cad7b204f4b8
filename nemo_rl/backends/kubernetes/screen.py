"""What the caller sees of a job on the cluster: the local run's display, fed from status and log; one area in Jupyter."""

from __future__ import annotations

import html
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from nemo_rl.display import Display, NullDisplay, PlainDisplay, make_display
from nemo_rl.job.status import JobStatus
from nemo_rl.metrics import parse_step_line, step_line

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_NOTEBOOK_SECONDS = 0.25
_CURVE_POINTS = 300


class Screen:
    """Shows a job and keeps the metrics of its steps: `history` has each step once, the newest attempt's where two had it."""

    def __init__(self, log_level: str = "info", display: Display | None = None) -> None:
        self._display = display if display is not None else _choose(log_level)
        self._steps: dict[int, dict[str, Any]] = {}
        self._said = ""
        self._total: int | None = None
        self._open = False
        self._closed = False

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self._steps[step] for step in sorted(self._steps)]

    def status(self, status: JobStatus) -> None:
        """Says the phase and why, when it changes. Running jobs speak by their log."""
        said = f"{status.phase or 'Pending'}: {printable(status.message)}" if status.message else status.phase or ""
        if status.phase != "Running" and said and said != self._said:
            self.note(said)
        self._said = said

    def note(self, text: str) -> None:
        self._display.note(f"nemo-rl: {printable(text)}")

    def line(self, text: str) -> None:
        """One line of the pod's log."""
        text = printable(text)
        metrics = _metrics(text)
        if metrics is None:
            self._display.note(text)
            return
        total = metrics.pop("total_steps", None)
        self._steps[metrics["step"]] = metrics
        if isinstance(self._display, PlainDisplay):
            self._display.note(text)
            return
        if total and (total != self._total or not self._open):
            self._total = total
            if not self._open:
                self._open = True
                self._display.start(total, "nemo-rl: training")
        if self._open:
            self._display.step(metrics, [])

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._display.close()


def printable(text: str) -> str:
    """Text of a pod without what could drive a terminal; of a progress bar that overwrites itself its last state."""
    text = text.rstrip("\r\n").rsplit("\r", 1)[-1]
    text = _ESCAPES.sub("", text)
    return "".join(c if c.isprintable() or c == "\t" else "·" for c in text)


def _metrics(text: str) -> dict[str, Any] | None:
    """The numbers of a step line. A pod may print what only looks like one."""
    found = parse_step_line(text) if len(text) < 20_000 else None
    if found is None:
        return None
    return {k: v for k, v in found.items() if v is None or (isinstance(v, int | float) and not isinstance(v, bool))}


def _choose(log_level: str) -> Display:
    if log_level not in ("warning", "error") and in_notebook():
        return NotebookDisplay()
    return make_display(log_level)


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel. Loads nothing: a kernel has IPython loaded."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


class NotebookDisplay(NullDisplay):
    """One area of a notebook cell that is drawn anew: progress, main metrics, the reward's curve. Lines are printed below."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._total = 0
        self._curve: list[float] = []
        self._metrics: Mapping[str, Any] = {}
        self._name = "reward"
        self._drawn = 0.0

    def start(self, total_steps: int, header: str) -> None:
        from IPython.display import HTML, display

        self._total = total_steps
        self._handle = display(HTML(self._render()), display_id=True)

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        self._metrics = metrics
        self._name = "reward" if metrics.get("reward") is not None else "loss"
        if metrics.get(self._name) is not None:
            self._curve.append(float(metrics[self._name]))
        if time.monotonic() - self._drawn > _NOTEBOOK_SECONDS or metrics["step"] >= self._total:
            self._draw()

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        if self._handle is not None:
            from IPython.display import HTML

            self._drawn = time.monotonic()
            self._handle.update(HTML(self._render()))

    def _render(self) -> str:
        step = int(self._metrics.get("step", 0))
        line = html.escape(step_line(dict(self._metrics), self._total)) if self._metrics else "starting"
        share = 100 * step // max(1, self._total)
        bar = f"<progress value='{share}' max='100' style='width:360px'></progress> {step}/{self._total}"
        return f"<div>{bar}<br><code>{line}</code>{curve(self._curve, self._name)}</div>"


def curve(values: list[float], name: str, width: int = 360, height: int = 80) -> str:
    """A small drawing of a metric over the steps, as HTML; empty for fewer than two values."""
    stride = -(-len(values) // _CURVE_POINTS) or 1
    shown = values[::stride]
    if len(shown) < 2:
        return ""
    low, spread = min(shown), (max(shown) - min(shown)) or 1.0
    points = " ".join(
        f"{i * width / (len(shown) - 1):.1f},{height - (v - low) * height / spread:.1f}" for i, v in enumerate(shown)
    )
    return (
        f"<figure style='margin:4px 0'><figcaption>{name}: {values[0]:.4g} → {values[-1]:.4g}</figcaption>"
        f"<svg width='{width}' height='{height}'><polyline points='{points}' fill='none' stroke='#4a7' "
        "stroke-width='2'/></svg></figure>"
    )
