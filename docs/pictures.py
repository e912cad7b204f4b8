"""Makes the pictures of the documentation anew, all of one real run: `python docs/pictures.py [--chromium chromium]`.

It trains examples/arithmetic.py (minutes), and writes to docs/assets the curves of that run, what a terminal and a notebook showed in
its midst, and this site at desktop and phone width. Of a browser it needs Debian's chromium.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from nemo_rl.display.notebook import NotebookDisplay
from nemo_rl.display.phases import Phase
from nemo_rl.display.terminal import LiveDisplay
from nemo_rl.trainers import base

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "docs" / "assets"
WIDTH = 92
COLOURS = 48
_CELL = """<!doctype html><meta charset="utf-8"><style>
body{font:14px/1.5 system-ui,sans-serif;margin:16px;width:700px;color:#1c1c1c}
.in{display:flex}.in span{color:#307fc1;font:12px monospace;width:56px;padding-top:8px}
pre{background:#f5f5f5;border:1px solid #e0e0e0;margin:0 0 10px;padding:6px 10px;flex:1;font:12px/1.5 monospace}
.out{margin-left:56px}table{border-collapse:collapse;font-size:12px;margin:6px 0}td,th{padding:2px 10px 2px 0}
</style><div class=in><span>[1]:</span><pre>CODE</pre></div><div class=out>OUTPUT</div>"""


class Recorder:
    """Shows a run on a terminal and in a notebook that nobody sees, and keeps how both looked at one step."""

    def __init__(self, at: int) -> None:
        self._at, self._step = at, 0
        self._lines: list[str] = []
        self._terminal, self._notebook = LiveDisplay(io.StringIO()), NotebookDisplay()
        self._area: list[str] = []
        self._notebook._area = self  # type: ignore[assignment] # takes the place of the cell's output
        self.svg = self.html = ""

    def show(self, content: str) -> None:
        """What the notebook's cell shows now."""
        self._area = [content]

    def start(self, total_steps: int, header: str) -> None:
        self._lines.append(header)
        self._terminal._progress.update(self._terminal._task, total=total_steps)
        self._terminal._progress.start_task(self._terminal._task)
        self._terminal._total = total_steps
        self._notebook.start(total_steps, header)

    def note(self, text: str) -> None:
        self._lines.append(text)

    def phase(self, phase: Phase | None) -> None:
        self._terminal._phase = self._notebook._phase = phase
        if phase is not None:
            phase.on_change = self._look

    def step(self, metrics: Mapping[str, Any], samples: list[dict[str, Any]]) -> None:
        self._step = metrics["step"]
        self._terminal.step(metrics, samples)
        self._notebook.step(metrics, samples)

    def _look(self) -> None:
        """Keeps the look in the midst of the first rollouts after the step that was asked for."""
        phase = self._terminal._phase
        if self._step >= self._at and not self.svg and phase is not None and phase.tokens:
            self._keep()

    def _keep(self) -> None:
        console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        for line in self._lines:
            console.print(Text(line), soft_wrap=False)
        console.print(self._terminal._render())
        self.svg = console.export_svg(title="python examples/arithmetic.py", unique_id="nemo-rl")
        self._notebook._draw()
        self.html = self._area[0]

    def close(self) -> None:
        pass


def without_remote_fonts(svg: str) -> str:
    """The picture with the fonts that a reader's machine has, so that it asks no other server."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: ?[^;]*;", "font-family: ui-monospace, Menlo, Consolas, monospace;", svg)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


_FRAME = "<body style='margin:0'><iframe src='{}' width='{}' height='{}' style='border:0'></iframe>"


def photograph(chromium: str, page: Path, target: Path, width: int, height: int) -> None:
    """The page in a window of that size, as a PNG of few colours. In a frame, since no window is as narrow as a phone."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        shot, frame = Path(folder) / "shot.png", Path(folder) / "frame.html"
        frame.write_text(_FRAME.format(page.resolve().as_uri(), width, height), encoding="utf-8")
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        command = [
            chromium,
            *flags,
            f"--window-size={max(width, 600)},{height}",
            f"--screenshot={shot}",
            frame.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        Image.open(shot).convert("RGB").crop((0, 0, width, height)).quantize(COLOURS).save(target, optimize=True)


def arithmetic() -> Any:
    spec = importlib.util.spec_from_file_location("arithmetic", ROOT / "examples" / "arithmetic.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_the_run(output: Path, chromium: str | None, *, short: bool = False) -> Any:
    """The pictures of one run of the example, whose result is returned; without a browser not the one of the notebook."""
    recorders: list[Recorder] = []

    def display(*arguments: Any, **options: Any) -> Recorder:
        recorders.append(Recorder(at=3 if short else 30))
        return recorders[-1]

    before, base.make_display, here = base.make_display, display, Path.cwd()
    try:
        # in the folder, so that what is shown has no place of this machine in it
        options = ["--output", "outputs/arithmetic", "--curve", str(output.resolve() / "arithmetic.svg")]
        os.chdir(output)
        result = arithmetic().main([*options, *(["--short"] if short else [])])
    finally:
        base.make_display = before
        os.chdir(here)
    taught = recorders[-1]  # the last of the two runs: GRPO
    (output / "terminal.svg").write_text(without_remote_fonts(taught.svg), encoding="utf-8")
    if chromium is not None:
        code = "result = nemo_rl.train(model, problems, correct, max_steps=100, …)"
        page = output / "cell.html"
        page.write_text(_CELL.replace("CODE", code).replace("OUTPUT", taught.html), encoding="utf-8")
        photograph(chromium, page, output / "notebook.png", 740, 420)
    return result


def of_the_site(output: Path, chromium: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", site], cwd=ROOT, check=True)
        photograph(chromium, site / "tutorial" / "index.html", output / "site.png", 1280, 800)
        photograph(chromium, site / "tutorial" / "index.html", output / "site-phone.png", 390, 800)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default="chromium", help="the browser's program")
    parser.add_argument("--site-only", action="store_true", help="without training: the pictures of this site alone")
    options = parser.parse_args()
    if not options.site_only:
        with tempfile.TemporaryDirectory() as folder:
            of_the_run(Path(folder), options.chromium)
            for name in ("arithmetic.svg", "terminal.svg", "notebook.png"):
                (ASSETS / name).write_bytes((Path(folder) / name).read_bytes())
    of_the_site(ASSETS, options.chromium)


if __name__ == "__main__":
    main()
