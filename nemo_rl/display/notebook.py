"""The display of a run in a notebook cell: one area that is drawn anew, and lines below it."""

from __future__ import annotations

import html
import sys
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nemo_rl.display.phases import Best, Pace, Phase, duration
from nemo_rl.run.metrics import SHOWN_SAMPLES, main_metrics

REDRAW_SECONDS = 0.25
PHASE_SECONDS = 1.0
_CURVE_POINTS = 300
_TEXT_CHARACTERS = 240


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel. Loads nothing: a kernel has IPython loaded."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def without_warning_of_widgets() -> None:
    """A run shows its own progress, so tqdm need not warn in red, at its first import, that its bars lack ipywidgets."""
    if in_notebook():
        warnings.filterwarnings("ignore", message="IProgress not found")


class Area:
    """A place in the output of a cell whose HTML is replaced, without a widget: front ends that know none show it too."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, content: str) -> None:
        """The content now; the first time the place is made, below what is there."""
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(content), display_id=True)
        else:
            self._handle.update(HTML(content))


class NotebookDisplay:
    """Progress and time left, the main metrics, the curve of the reward (or the loss), sample completions."""

    def __init__(self) -> None:
        self._area: Area | None = None
        self._header = ""
        self._total = 0
        self._metrics: Mapping[str, Any] = {}
        self._curve: dict[int, float] = {}
        self._name = "reward"
        self._samples: list[dict[str, Any]] = []
        self._pace, self._best = Pace(), Best()
        self._phase: Phase | None = None
        self._drawn = 0.0

    def start(self, total_steps: int, header: str) -> None:
        self._total, self._header = total_steps, header
        self._area = self._area or Area()
        self._draw()

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        step = int(metrics["step"])
        self._pace.step(metrics)
        self._best.see(metrics)
        self._metrics = metrics
        self._samples = samples[:SHOWN_SAMPLES] or self._samples
        self._name = drawn_metric({name for name, value in metrics.items() if value is not None})
        if metrics.get(self._name) is not None:
            self._curve[step] = float(metrics[self._name])
        if time.monotonic() - self._drawn > REDRAW_SECONDS or step >= self._total:
            self._draw()

    def phase(self, phase: Phase | None) -> None:
        self._phase = phase
        if phase is None:
            return
        # drawn where the run counts: what another thread writes may go to another cell
        phase.on_change = self._draw_in_time
        if self._area is None:
            self._area = Area()
            self._draw()
        self._draw_in_time()

    def _draw_in_time(self) -> None:
        if time.monotonic() - self._drawn > PHASE_SECONDS:
            self._draw()

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self._phase = None
        self._draw()

    def _draw(self) -> None:
        if self._area is not None:
            self._drawn = time.monotonic()
            self._area.show(self._render())

    def _render(self) -> str:
        step = int(self._metrics.get("step", 0))
        seconds = self._pace.left(self._total - step)
        left = "" if seconds is None else f" · {duration(seconds)} left"
        best = self._best.words()
        phase = f"<div style='opacity:.6'>{html.escape(self._phase.words())}</div>" if self._phase is not None else ""
        parts = [
            f"<b>{html.escape(self._header)}</b>",
            f"<div>{bar(step, self._total)} step {step}/{self._total}{left}</div>" if self._total else "",
            phase,
            _table([*main_metrics(self._metrics), *([best] if best and self._metrics else [])]),
            curve([self._curve[number] for number in sorted(self._curve)], self._name),
            *map(_sample, self._samples),
        ]
        return f"<div>{''.join(parts)}</div>"


def bar(done: float, total: float) -> str:
    """A progress bar as HTML."""
    share = 100 * done / total if total else 100.0
    return f"<progress value='{share:.1f}' max='100' style='width:360px;max-width:100%'></progress>"


def drawn_metric(names: Collection[str]) -> str:
    """The metric whose curve says most of a run that has these."""
    return next((name for name in ("reward", "preference_accuracy") if name in names), "loss")


def curve(values: list[float], name: str, width: int = 360, height: int = 80) -> str:
    """A small drawing of a metric over the steps with its lowest and highest value, as HTML; empty for fewer than two values."""
    stride = -(-len(values) // _CURVE_POINTS) or 1
    shown = values[::stride]
    if len(shown) < 2:
        return ""
    low, high = min(shown), max(shown)
    spread, left = (high - low) or 1.0, 56
    points = " ".join(
        f"{left + i * (width - left) / (len(shown) - 1):.1f},{5 + (height - 10) * (1 - (v - low) / spread):.1f}"
        for i, v in enumerate(shown)
    )
    label = f"x='{left - 6}' text-anchor='end' font-size='11' fill='currentColor' opacity='.7'"
    labels = f"<text {label} y='12'>{high:.3g}</text>"
    if high > low:
        labels += f"<text {label} y='{height - 3}'>{low:.3g}</text>"
    return (
        f"<figure style='margin:4px 0'><figcaption>{html.escape(name)}: {values[0]:.4g} → {values[-1]:.4g}</figcaption>"
        f"<svg viewBox='0 0 {width} {height}' width='{width}' style='max-width:100%'>{labels}"
        f"<polyline points='{points}' fill='none' stroke='#4a7' stroke-width='2'/></svg></figure>"
    )


def _table(metrics: Sequence[tuple[str, str]]) -> str:
    cells = [(html.escape(name), html.escape(text)) for name, text in metrics]
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name, _ in cells)
    body = "".join(f"<td style='text-align:left'>{text}</td>" for _, text in cells)
    return f"<div style='overflow-x:auto'><table><tr>{head}</tr><tr>{body}</tr></table></div>" if cells else ""


def _sample(sample: Mapping[str, Any]) -> str:
    reward = sample.get("reward")
    value = f"{reward:.3g}" if isinstance(reward, int | float) else "none"
    texts = [str(sample[name])[:_TEXT_CHARACTERS] for name in ("prompt", "completion")]
    prompt, completion = (html.escape(text).replace("\n", "<br>") for text in texts)
    return (
        "<div style='border-left:3px solid #4a7;margin:4px 0;padding-left:8px;overflow-wrap:anywhere'>"
        f"<span style='opacity:.6'>{prompt}</span><br>{completion} <b>(reward {value})</b></div>"
    )
