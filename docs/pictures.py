"""Makes the pictures of the documentation anew: `make pictures`, or `python tests/ui/environment.py docs/pictures.py --only site`.

It trains examples/arithmetic.py (minutes), and writes to docs/assets the curves of that run, what a terminal, a notebook and
the web page (`nemo-rl ui`) showed in its midst, and this site, at desktop and phone width. The browser is
Debian's chromium; nbconvert gets an environment of its own (made once).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from nemo_rl.display.notebook import NotebookDisplay
from nemo_rl.display.phases import Phase
from nemo_rl.display.terminal import LiveDisplay
from nemo_rl.trainers import base

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "docs" / "assets"
WIDTH = 92
COLOURS = 96
PATIENCE = 300.0
"""Seconds that a page or a server may take on a machine with much else to do."""
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
}


class Recorder:
    """Shows a run on a terminal and in a notebook that nobody sees, and keeps how both looked at one step; `look` is called then."""

    def __init__(self, at: int, look: Callable[[], None] | None) -> None:
        self._at, self._step, self._call = at, 0, look
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
        if self._call is not None:
            self._call()

    def close(self) -> None:
        pass


def without_remote_fonts(svg: str) -> str:
    """The picture with the fonts that a reader's machine has, so that it asks no other server."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: ?[^;]*;", "font-family: ui-monospace, Menlo, Consolas, monospace;", svg)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--disable-gpu", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        opened = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=options, timeout=1000 * PATIENCE
        )
        yield opened
        opened.close()


@contextlib.contextmanager
def window(
    opened: Browser, address: str, *, dark: bool = False, height: int | None = None, **size: Any
) -> Iterator[Page]:
    """The page at that address in a window of that size, whose clock is UTC."""
    if height is not None:
        size["viewport"] = size["viewport"] | {"height": height}
    context = opened.new_context(
        **size, color_scheme="dark" if dark else "light", timezone_id="UTC", locale="en-GB", reduced_motion="reduce"
    )
    context.set_default_timeout(1000 * PATIENCE)
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


def photograph(page: Page, target: Path) -> None:
    """What is in the window, as a PNG of few colours."""
    from PIL import Image

    shot = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


@contextlib.contextmanager
def served(command: list[Any], address: str, folder: Path, **environment: str) -> Iterator[str]:
    """A server as a process in the folder, and what it printed that looks like `address`; it ends with the block."""
    log = folder / "server.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        limit = time.monotonic() + PATIENCE
        while not (found := re.search(address, log.read_text())):
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{command} printed no address: {log.read_text()}")
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def arithmetic() -> Any:
    spec = importlib.util.spec_from_file_location("arithmetic", ROOT / "examples" / "arithmetic.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_the_run(output: Path, look: Callable[[], None] | None = None, *, short: bool = False) -> Any:
    """The curves, the terminal, and a notebook (cell.ipynb) of one run of the example, whose result is returned.

    `look` is called in the midst of its second training, while this waits.
    """
    recorders: list[Recorder] = []

    def display(*arguments: Any, **options: Any) -> Recorder:
        recorders.append(Recorder(at=3 if short else 30, look=look if recorders else None))
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
    (output / "cell.ipynb").write_text(json.dumps(notebook(taught.html)), encoding="utf-8")
    return result


CODE = """import nemo_rl

result = nemo_rl.train(
    taught.checkpoint_path, problems, correct,
    algorithm="grpo", validation_dataset=test, max_steps=100,
)"""


def notebook(html: str) -> dict[str, Any]:
    """A notebook whose one cell shows this."""
    text = "## GRPO\n\nFrom a reward alone: 1 where the last number of the answer is right."
    shown = {"output_type": "display_data", "metadata": {}, "data": {"text/html": html, "text/plain": ""}}
    cells = [
        {"id": "text", "cell_type": "markdown", "metadata": {}, "source": text},
        {"id": "code", "cell_type": "code", "metadata": {}, "source": CODE, "outputs": [shown], "execution_count": 4},
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


PAGES: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "page-list.png": ("list", DESKTOP, 320, False),
    "page-list-phone-dark.png": ("list", PHONE, 400, True),
    "page-job-dark.png": ("job", DESKTOP, 1020, True),
    "page-job-phone.png": ("job", PHONE, 844, False),
}
"""Pictures of the web page: view, window, its height, whether it is dark."""


def of_the_page(output: Path) -> None:
    """The web page of the runs below outputs/ in that folder, while one of them trains."""
    command = [sys.executable, "-m", "nemo_rl.cli.main", "ui", "outputs", "--port", "0"]
    environment = {"KUBECONFIG": str(output / "none")}
    with served(command, r"http://\S+#token=\S+", output, **environment) as address, browser() as opened:
        for name, (view, size, height, dark) in PAGES.items():
            with window(opened, address, dark=dark, height=height, **size) as page:
                page.locator(".row progress").first.wait_for()
                if view == "job":
                    page.get_by_role("link", name="grpo").click()
                    page.locator("[data-metric=reward] canvas").wait_for()
                    page.locator("pre.completion").first.wait_for()
                photograph(page, output / name)


def of_the_notebook(output: Path) -> None:
    """The notebook of the run, as JupyterLab shows it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import beside

    python = beside.interpreter("nbconvert", ["nbconvert>=7,<8"])
    command = [python, "-m", "nbconvert", "--to", "html", "--template", "lab", "cell.ipynb"]
    subprocess.run(command, cwd=output, check=True, capture_output=True)
    with browser() as opened:
        for size, height, name in ((DESKTOP, 640, "notebook.png"), (PHONE, 844, "notebook-phone.png")):
            # what is on the page needs none of the scripts that nbconvert has from other servers
            with window(opened, (output / "cell.html").as_uri(), offline=True, height=height, **size) as page:
                page.locator(".jp-OutputArea progress").first.wait_for()
                photograph(page, output / name)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def of_the_site(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder], cwd=ROOT, check=True)
        handler = functools.partial(Quiet, directory=folder)
        server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        opened = stack.enter_context(browser())
        address = f"http://127.0.0.1:{server.server_port}/tutorial/"
        for size, name in ((DESKTOP, "site.png"), (PHONE, "site-phone.png")):
            with window(opened, address, **size) as page:
                page.wait_for_load_state("networkidle")
                photograph(page, output / name)


KEPT = {
    "run": [
        *("arithmetic.svg", "terminal.svg", "notebook.png", "notebook-phone.png"),
        *PAGES,
    ],
    "site": ["site.png", "site-phone.png"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(KEPT), help="the pictures of the run (minutes), or those of this site")
    parser.add_argument("--output", type=Path, help="a folder for all that is made, which else is removed")
    parser.add_argument("--short", action="store_true", help="train a few steps only, to see that all of it works")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as beside_training:
        folder = options.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        if options.only != "site":
            # in a thread of its own, since a browser's driver wants none in which other loops may run
            of_the_run(folder, lambda: beside_training.submit(of_the_page, folder).result(), short=options.short)
            of_the_notebook(folder)
        if options.only != "run":
            of_the_site(folder)
        for name in KEPT[options.only] if options.only else [name for names in KEPT.values() for name in names]:
            if not options.short:
                shutil.copy(folder / name, ASSETS)


if __name__ == "__main__":
    main()
