"""Who may see the page: nobody without its token, no other site, and nothing but what it shows."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from playwright.sync_api import Page, expect

from ui.conftest import PATIENCE, Server
from ui.recorded import run

Visit = Callable[..., Page]
Ui = Callable[..., Server]
pytestmark = pytest.mark.timeout(900)
expect.set_options(timeout=1000 * PATIENCE)


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(server.root).port or 0, timeout=PATIENCE)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=given)
    answer = connection.getresponse()
    return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}


def signed(server: Server) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.token}"}


def test_without_the_token_nothing_is_told(ui: Ui, visit: Visit, tmp_path: Path) -> None:
    run(tmp_path / "outputs/secret-name")
    server = ui("outputs")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {server.token}"}):
        for path in ("/api/jobs", "/api/job?key=run/0/secret-name"):
            status, body, _ = ask(server, path, **headers)
            assert status == 401
            assert b"secret-name" not in body
    assert ask(server, "/api/jobs", **signed(server))[0] == 200
    page = visit(server.root)
    expect(page.get_by_role("alert")).to_contain_text("the whole address that nemo-rl ui printed")
    page.goto(server.address)  # and the token does not stay in the address
    expect(page.locator(".table .row a")).to_have_count(1)
    assert server.token not in page.url


def test_other_names_and_other_sites_are_refused(ui: Ui, tmp_path: Path) -> None:
    run(tmp_path / "outputs/one")
    server = ui("outputs", "--allow-host", "training.example")
    for headers in (
        {"Host": "attacker.example"},
        {"Host": "127.0.0.1.attacker.example"},
        {"Origin": "https://attacker.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
    ):
        status, body, _ = ask(server, "/api/jobs", **signed(server), **headers)
        assert status == 403, headers
        assert b"one" not in body.replace(b"alone", b"").replace(b"one of", b"")
    port = urlsplit(server.root).port
    for host in (f"localhost:{port}", "training.example"):
        assert ask(server, "/api/jobs", Host=host, **signed(server))[0] == 200


def test_every_answer_keeps_the_page_to_itself_and_nothing_can_be_changed(ui: Ui, tmp_path: Path) -> None:
    run(tmp_path / "outputs/one")
    server = ui("outputs")
    for path in ("/", "/page/main.js", "/libraries/preact.js", "/api/jobs", "/nothing"):
        headers = ask(server, path, **signed(server))[2]
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert ask(server, "/api/jobs", method, **signed(server))[0] == 405
    assert b"<script>" not in ask(server, "/")[1]


def test_no_path_leads_out_of_the_folder(ui: Ui, tmp_path: Path) -> None:
    run(tmp_path / "outputs/one")
    run(tmp_path / "elsewhere/private")
    (tmp_path / "outputs/link").symlink_to(tmp_path / "elsewhere/private")
    server = ui("outputs")
    listed = json.loads(ask(server, "/api/jobs", **signed(server))[1])["jobs"]
    assert [row["name"] for row in listed] == ["one"]
    for key in (
        "run/0/../elsewhere/private",
        "run/0/link",
        "run/1/one",
        "run/0//etc",
        f"run/0/{tmp_path}/elsewhere/private",
        "run",
    ):
        assert ask(server, f"/api/job?key={quote(key, safe='')}", **signed(server))[0] == 404, key
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/libraries/..%2f..%2fetc/passwd", "//etc/passwd"):
        assert ask(server, path, **signed(server))[0] == 404, path


def test_an_answer_that_did_not_change_is_not_sent_again(ui: Ui, tmp_path: Path) -> None:
    run(tmp_path / "outputs/one")
    server = ui("outputs")
    tag = ask(server, "/api/jobs", **signed(server))[2]["etag"]
    status, body, _ = ask(server, "/api/jobs", If_None_Match=tag, **signed(server))
    assert (status, body) == (304, b"")


def test_the_page_says_when_its_server_has_ended_and_goes_on_when_it_is_back(
    ui: Ui, visit: Visit, tmp_path: Path
) -> None:
    run(tmp_path / "outputs/one")
    server = ui("outputs")
    page = visit(server.address)
    expect(page.locator(".table .row a")).to_have_count(1)
    server.end()
    expect(page.get_by_role("status")).to_contain_text("The page's server does not answer")
    expect(page.locator(".table .row a")).to_have_count(1)  # what was there last
    again = ui("outputs", port=urlsplit(server.root).port)
    expect(page.get_by_role("alert")).to_contain_text("the whole address")  # the new start has another token
    page.goto(again.address)
    expect(page.locator(".table .row a")).to_have_count(1)


def test_wrong_options_are_a_sentence(tmp_path: Path) -> None:
    environment = os.environ | {"KUBECONFIG": str(tmp_path / "none")}
    taken = socket.create_server(("127.0.0.1", 0))
    for words, expected in (
        (["nothing-here"], "found no folder 'nothing-here'"),
        ([], "found neither a Kubernetes context nor ./outputs"),
        ([".", "--viewer-tokens"], "folders of this machine are nobody's there"),
        ([".", "--port", str(taken.getsockname()[1])], "give another with --port"),
    ):
        command = [sys.executable, "-m", "nemo_rl.cli.main", "ui", *words]
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert found.returncode == 1
        assert expected in found.stderr
        assert "Traceback" not in found.stderr
    taken.close()
