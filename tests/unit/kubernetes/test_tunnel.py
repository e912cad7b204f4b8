"""A stream of bytes in the frames of a port-forward, whatever the frames are; a real one is used in tests/e2e."""

from __future__ import annotations

import http.client
import types
from typing import Any

import pytest
from websocket import WebSocketConnectionClosedException, WebSocketTimeoutException

from nemo_rl.backends.kubernetes.tunnel import Tunnel

BINARY, CLOSE, PING = 2, 8, 9
PORT = (8081).to_bytes(2, "little")
BEGIN = [b"\0" + PORT, b"\1" + PORT]


class Frames:
    """A websocket from which these frames come; an exception is raised in its turn."""

    def __init__(self, *frames: Any) -> None:
        self.frames = list(frames)
        self.sent: list[bytes] = []
        self.seconds: float | None = 0
        self.closed = False

    def recv_data_frame(self, control: bool) -> tuple[int, Any]:
        found = self.frames.pop(0) if self.frames else WebSocketConnectionClosedException("gone")
        if isinstance(found, Exception):
            raise found
        kind, data = found if isinstance(found, tuple) else (BINARY, found)
        return kind, types.SimpleNamespace(data=data)

    def send_binary(self, data: bytes) -> None:
        self.sent.append(data)

    def settimeout(self, seconds: float | None) -> None:
        self.seconds = seconds

    def shutdown(self) -> None:
        self.closed = True


def read(*frames: Any) -> bytes:
    return Tunnel(Frames(*frames), "x").makefile("rb").read()


def test_the_pieces_come_in_order_without_channels_and_ports() -> None:
    assert read(*BEGIN, b"\0abc", b"\0", (PING, b""), b"\0d", b"\0" + b"e" * 100_000) == b"abcd" + b"e" * 100_000


@pytest.mark.parametrize(
    "end", [(CLOSE, b"\x03\xe8"), WebSocketConnectionClosedException("gone")], ids=["close", "cut"]
)
def test_the_stream_ends_where_the_connection_does(end: Any) -> None:
    tunnel = Tunnel(Frames(*BEGIN, b"\0abc", end), "x")
    assert (tunnel.receive(2), tunnel.receive(9), tunnel.receive(9), tunnel.receive(9)) == (b"ab", b"c", b"", b"")


def test_what_the_pod_refuses_is_an_error_with_its_words() -> None:
    with pytest.raises(ConnectionError, match=r"port-forward to x: .*connection refused"):
        read(*BEGIN, b"\1dial tcp4 127.0.0.1:8081: connect: connection refused")


def test_silence_is_a_timeout() -> None:
    frames = Frames(*BEGIN, WebSocketTimeoutException("silence"))
    tunnel = Tunnel(frames, "x")
    tunnel.settimeout(7)
    assert frames.seconds == 7
    with pytest.raises(TimeoutError):
        tunnel.receive(1)


def test_an_http_client_takes_it_for_a_socket_and_uses_it_again() -> None:
    answers = [
        b"\0HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe",
        b"\0llo",
        b"\0HTTP/1.1 404 Not",
        b"\0 Found\r\n\r\n",
    ]
    frames = Frames(*BEGIN, *answers)
    connection = http.client.HTTPConnection("localhost")
    connection.sock = Tunnel(frames, "x")  # type: ignore[assignment]
    connection.request("GET", "/files/a")
    assert connection.getresponse().read() == b"hello"
    connection.request("GET", "/files/b")
    assert connection.getresponse().status == 404
    assert all(sent.startswith(b"\0") for sent in frames.sent)
    assert b"".join(sent[1:] for sent in frames.sent).startswith(b"GET /files/a HTTP/1.1\r\n")
    connection.close()
    assert frames.closed
