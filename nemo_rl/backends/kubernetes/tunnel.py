"""A connection to a port of a pod, through the port-forward of the API server: what http.client takes for a socket.

The cluster client has one too, which copies all that waits at each piece and so slows down to a few MB/s.
"""

from __future__ import annotations

import io
from typing import Any
from urllib.parse import urlencode

from nemo_rl.backends.kubernetes.connect import REQUEST_SECONDS, Cluster, core_path

PROTOCOL = "v4.channel.k8s.io"
_DATA, _ERROR = 0, 1
_BINARY, _CLOSE = 0x2, 0x8


def open_tunnel(cluster: Cluster, pod: str, port: int) -> Tunnel:
    """Connects to a port on the loopback of a pod. OSError where that is refused or does not work."""
    from kubernetes.stream.ws_client import create_websocket
    from websocket import WebSocketException

    configuration = cluster.client.configuration
    headers: dict[str, str] = {}
    cluster.client.update_params_for_auth(headers, [], ["BearerToken"], "", "GET", None)
    headers["sec-websocket-protocol"] = PROTOCOL
    path = core_path(cluster.namespace, "pods", pod, "portforward")
    url = configuration.host.replace("http", "ws", 1) + path + "?" + urlencode({"ports": port})
    try:
        websocket = create_websocket(configuration, url, headers)  # type: ignore[no-untyped-call]
    except WebSocketException as error:
        raise ConnectionError(f"port-forward to {pod}: {error}") from None
    return Tunnel(websocket, f"{pod}:{port}")


class Tunnel:
    """One stream of bytes in the frames of a websocket. Each frame begins with the number of its channel."""

    def __init__(self, websocket: Any, where: str) -> None:
        self._websocket, self._where = websocket, where
        self._begun: set[int] = set()
        self._rest = b""
        self._ended = False
        self.settimeout(REQUEST_SECONDS)

    def settimeout(self, seconds: float | None) -> None:
        self._websocket.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        from websocket import WebSocketException

        try:
            self._websocket.send_binary(bytes([_DATA]) + bytes(data))
        except WebSocketException as error:
            raise ConnectionError(f"port-forward to {self._where}: {error}") from None

    def receive(self, size: int) -> bytes:
        """At most so many bytes, as soon as there are some; none at the end of the stream. OSError for what went wrong."""
        while not self._rest and not self._ended:
            self._rest = self._next()
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def _next(self) -> bytes:
        """The bytes of the next frame that are for us; often none."""
        from websocket import WebSocketConnectionClosedException, WebSocketException, WebSocketTimeoutException

        try:
            kind, frame = self._websocket.recv_data_frame(True)
        except WebSocketTimeoutException:
            raise TimeoutError(f"port-forward to {self._where}: nothing came in time") from None
        except WebSocketConnectionClosedException:
            self._ended = True
            return b""
        except WebSocketException as error:
            raise ConnectionError(f"port-forward to {self._where}: {error}") from None
        if kind == _CLOSE:
            self._ended = True
        if kind != _BINARY or not frame.data:
            return b""
        channel, data = frame.data[0], frame.data[1:]
        if channel not in self._begun:
            self._begun.add(channel)  # the first frame of each channel holds the number of the port
            return b""
        if channel == _ERROR:
            raise ConnectionError(f"port-forward to {self._where}: {data.decode(errors='replace').strip()}")
        return bytes(data)

    def makefile(self, mode: str = "rb", *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self), 1 << 16)

    def close(self) -> None:
        self._ended = True
        self._websocket.shutdown()


class _Reader(io.RawIOBase):
    """The stream as a file."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._tunnel.receive(len(buffer))
        buffer[: len(found)] = found
        return len(found)
