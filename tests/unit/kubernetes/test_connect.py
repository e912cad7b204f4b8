"""Requests to the API server: its refusals in words, and its wish to be asked again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nemo_rl.backends.kubernetes.connect import Cluster
from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError

CUT = 0


class Server(ThreadingHTTPServer):
    daemon_threads = True
    answers: list[tuple[int, dict[str, str]]]
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        code, headers = self.server.answers.pop(0) if self.server.answers else (200, {})
        if code == CUT:
            self.close_connection = True
            return
        body = json.dumps({"message": "busy"} if code >= 400 else {"fine": True}).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.answers, made.asked = [], []
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def cluster(server: Server) -> Cluster:
    from kubernetes import client

    configuration: Any = client.Configuration()
    configuration.host = f"http://127.0.0.1:{server.server_port}"
    return Cluster(client.ApiClient(configuration), "test", "default")


def test_a_busy_server_is_asked_again_when_it_says(server: Server, cluster: Cluster) -> None:
    server.answers = [(429, {"Retry-After": "0"}), (503, {"Retry-After": "0"})]
    assert cluster.request("GET", "/x", query={"a": "b", "c": None}) == {"fine": True}
    assert server.asked == ["/x?a=b"] * 3


def test_a_server_that_stays_busy_is_given_up_within_the_time_of_one_answer(server: Server, cluster: Cluster) -> None:
    server.answers = [(429, {"Retry-After": "1"})] * 20
    begin = time.monotonic()
    with pytest.raises(ApiError, match="429: busy"):
        cluster.request("GET", "/x", timeout=2)
    assert time.monotonic() - begin < 10
    assert len(server.asked) <= 3


@pytest.mark.parametrize("answer", [(429, {}), (500, {"Retry-After": "0"}), (403, {"Retry-After": "0"})], ids=str)
def test_other_refusals_are_told_at_once(server: Server, cluster: Cluster, answer: tuple[int, dict[str, str]]) -> None:
    server.answers = [answer]
    with pytest.raises(ApiError, match=str(answer[0])) as caught:
        cluster.request("GET", "/x")
    assert (caught.value.code, caught.value.reason) == (answer[0], "busy")
    assert len(server.asked) == 1


@pytest.mark.parametrize("cut", [(CUT, {}), (200, {"Content-Length": "9999"})], ids=["before", "within the answer"])
def test_a_connection_that_breaks_off_is_made_again(
    server: Server, cluster: Cluster, cut: tuple[int, dict[str, str]]
) -> None:
    server.answers = [cut, cut]
    assert cluster.request("GET", "/x") == {"fine": True}
    assert len(server.asked) == 3


def test_one_that_always_breaks_off_is_given_up(server: Server, cluster: Cluster) -> None:
    server.answers = [(CUT, {})] * 20
    with pytest.raises(ClusterError, match="does not answer"):
        cluster.request("GET", "/x")
    assert len(server.asked) < 10


def test_no_answer_names_the_context_and_a_command(cluster: Cluster) -> None:
    cluster.client.configuration.host = "http://127.0.0.1:9"
    with pytest.raises(ClusterError, match=r"context test does not answer.*kubectl cluster-info"):
        cluster.request("GET", "/x", timeout=2)
