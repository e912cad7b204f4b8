"""A real browser, `nemo-rl ui` as a process, and runs and clusters for it to show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from cluster.server import Cluster, serve

PATIENCE = 120.0
"""Seconds that anything may take on a machine with much else to do."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": "dark"}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert program, f"none of {', '.join(BROWSERS)} is installed; on Debian: apt-get install chromium"
    with sync_playwright() as playwright:
        options = ["--disable-gpu", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        opened = playwright.chromium.launch(executable_path=program, args=options, timeout=1000 * PATIENCE)
        yield opened
        opened.close()


class Visitor:
    """A browser window whose complaints (errors of scripts, what the policy forbids) fail the test."""

    def __init__(self, context: BrowserContext) -> None:
        context.set_default_timeout(1000 * PATIENCE)
        self.context = context
        self.complaints: list[str] = []
        self.page: Page = context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console",
            lambda line: self.complaints.append(line.text) if "Content Security Policy" in line.text else None,
        )


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address in a window of its own; its options are those of a browser's context."""
    visitors: list[Visitor] = []

    def visit(address: str, **options: Any) -> Page:
        visitors.append(Visitor(browser.new_context(**(options or DESKTOP))))
        visitors[-1].page.goto(address)
        return visitors[-1].page

    yield visit
    for visitor in visitors:
        visitor.context.close()
    assert [complaint for visitor in visitors for complaint in visitor.complaints] == []


class Server:
    """`nemo-rl ui` as a process, at a free port."""

    def __init__(self, folder: Path, words: tuple[str, ...], environment: dict[str, str], port: int = 0) -> None:
        self.log = folder / f"ui-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "nemo_rl.cli.main", "ui", "--port", str(port), *words]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
            )
        limit = time.monotonic() + PATIENCE
        while " is at " not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < limit, f"no address was printed: {self.log.read_text()}"
            time.sleep(0.1)
        self.address = self.log.read_text().split(" is at ")[1].split()[0]
        self.root, _, self.token = self.address.partition("#token=")

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture
def ui(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts `nemo-rl ui` with these words, in a folder of the test; ended with it."""
    begun: list[Server] = []

    def start(*words: str, kubeconfig: Path | None = None, port: int = 0, **environment: str) -> Server:
        settings = {"KUBECONFIG": str(kubeconfig or tmp_path / "none")} | environment
        begun.append(Server(tmp_path, words, settings, port))
        return begun[-1]

    yield start
    for server in begun:
        server.end()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with serve(tmp_path_factory.mktemp("cluster")) as served:
        yield served
