"""The documentation's site in a real browser: on a phone nothing is cut off, names stay whole, pages lead on, pictures are there."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from charts import ROOT
from ui.conftest import DESKTOP, PATIENCE, PHONE

Visit = Callable[..., Page]
pytestmark = pytest.mark.timeout(900)
expect.set_options(timeout=1000 * PATIENCE)
PAGES = (
    "",
    "tutorial/",
    "howto/page/",
    "howto/monitoring/",
    "reference/keywords/",
    "reference/fields/",
    "on_a_cluster/",
)
BROKEN = """() => [...document.querySelectorAll(".md-typeset table td:first-child code")]
  .filter(name => name.getClientRects().length !== 1).map(name => name.textContent)"""
MISSING = """() => [...document.querySelectorAll(".md-content img")]
  .filter(picture => !picture.complete || !picture.naturalWidth).map(picture => picture.src)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("options", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_pages_fit_their_window_with_whole_names_and_all_pictures(
    visit: Visit, site: str, options: dict[str, object]
) -> None:
    page = visit(site, **options)
    for name in PAGES:
        page.goto(site + name)
        expect(page.locator(".md-content h1")).to_be_visible()
        page.wait_for_load_state("load")
        width = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert width[0] <= width[1], name
        assert page.evaluate(BROKEN) == [], name
        assert page.evaluate(MISSING) == [], name


def test_each_page_leads_to_the_next_and_a_keyword_has_an_address(visit: Visit, site: str) -> None:
    page = visit(site)
    expect(page.locator(".md-logo img").first).to_be_visible()
    page.locator(".md-footer__link--next").click()
    expect(page.locator(".md-content h1")).to_contain_text("on this machine")
    page.locator(".md-footer__link--prev").click()
    expect(page.locator(".md-content h1")).to_contain_text("nemo-rl")
    page.goto(site + "reference/keywords/#temperature")
    expect(page.locator("#temperature")).to_be_in_viewport()
    page.goto(site + "on_a_cluster/")  # the notebook is a page, with what its cells drew
    assert page.locator(".md-content progress").count() >= 6
