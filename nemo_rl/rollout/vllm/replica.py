"""`python -m nemo_rl.rollout.vllm.replica`: what a rollout replica runs. It waits until a trainer tells it which model to serve.

A replica holds no model, no credentials but its job's token, and knows no trainer: the trainer finds it, sends the model's
configuration and the options of its server, and the process becomes that server. Whenever it ends, its container is started
anew and waits again. Standard library only: this runs in vLLM's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE, BadWeights, on_disk
from nemo_rl.rollout.vllm.middleware import REPLICA_ROUTE, START_ROUTE, START_VARIABLE
from nemo_rl.rollout.vllm.serve import NOT_INSTALLED, SHORTEST_TOKEN

PORT = 8000
LONGEST_BODY = 2**20
SOCKET_SECONDS = 30.0
OPTIONS = frozenset(
    {"--dtype", "--served-model-name", "--max-model-len", "--load-format", "--logprobs-mode", "--enforce-eager"}
    | {"--max-num-seqs", "--kv-cache-memory-bytes", "--gpu-memory-utilization", "--tensor-parallel-size"}
    | {"--enable-lora", "--max-lora-rank", "--max-loras"}
)
"""Of vLLM's options, what a trainer may set. None of them names code, a path or an address."""


def digest_of(files: list[dict[str, Any]], options: list[str]) -> str:
    """What a start is known by: a server that was started with the same need not be started anew."""
    known = [sorted((f["name"], f["sha256"]) for f in files), options]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


class Waiting(ThreadingHTTPServer):
    """Answers a trainer until it has said which model to serve, and that model's files are here."""

    daemon_threads = True
    allow_reuse_address = True
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, host: str, port: int, token: str) -> None:
        if host:
            self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.token = token
        self.state, self.failure = "waiting", ""
        self.folder = Path(tempfile.mkdtemp(prefix="nemo-rl-model-"))
        self.command: list[str] | None = None
        """Arguments of the server, once it may be started."""
        self.start_digest = ""
        self._lock = threading.Lock()

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()  # without a look-up of its name
        self.server_name, self.server_port = "", self.server_address[1]

    def begin(self, source: str, files: list[dict[str, Any]], options: list[str]) -> None:
        """Fetches the model's files in the background. A second call while that goes on changes nothing. ValueError, in words."""
        named = [option.partition("=")[0] for option in options if option.startswith("--")]
        if wrong := sorted(set(named) - OPTIONS):
            raise ValueError(f"a replica takes no option {wrong[0]}; expected some of {', '.join(sorted(OPTIONS))}")
        if not source.startswith(("http://", "https://")):
            raise ValueError(f"a replica shares no folder with its trainer; found {source}, expected an address")
        with self._lock:
            if self.state == "fetching":
                return
            self.state, self.failure = "fetching", ""
        arguments = (source, files, options)
        threading.Thread(target=self._fetch, args=arguments, name="fetch", daemon=True).start()

    def _fetch(self, source: str, files: list[dict[str, Any]], options: list[str]) -> None:
        try:
            with on_disk(source, files) as paths:
                for path in paths:
                    shutil.copyfile(path, self.folder / path.name)
                    path.unlink()  # one copy is enough: what is fetched next are weights
        except (BadWeights, OSError) as error:
            self.state, self.failure = "waiting", str(error)
            return
        self.start_digest = digest_of(files, options)
        self.command = ["--model", str(self.folder), *options]
        self.state = "starting"
        self.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Waiting
    timeout = SOCKET_SECONDS
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self._known():
            return
        if self.path == REPLICA_ROUTE:
            self._answer(200, {"state": self.server.state, "message": self.server.failure})
        else:  # vLLM's routes, /health among them
            self._answer(503, {"error": "no trainer has said yet which model to serve"})

    def do_POST(self) -> None:
        if not self._known():
            return
        if self.path != START_ROUTE:
            self._answer(503, {"error": "no trainer has said yet which model to serve"})
            return
        try:
            asked = json.loads(self._body)
            self.server.begin(str(asked["source"]), list(asked["files"]), [str(o) for o in asked["options"]])
        except (ValueError, KeyError, TypeError) as error:
            self._answer(400, {"error": str(error)})
        else:
            self._answer(200, {"state": self.server.state})

    def _known(self) -> bool:
        length = self.headers.get("Content-Length") or "0"
        if not length.isdigit() or int(length) > LONGEST_BODY:
            self.close_connection = True
            self._answer(413, {"error": f"at most {LONGEST_BODY} bytes are read"})
            return False
        self._body = self.rfile.read(int(length))
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            return True
        self._answer(401, {"error": "this rollout replica needs the token of its job as Authorization: Bearer"})
        return False

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """The trainer asks every few seconds."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    token = _token(options.token_file)
    if options.probe:
        return probe(options.port, token)
    if find_spec("vllm") is None:
        _say(f"{sys.executable} has no vLLM; use an image that has it, such as nemo-rl-rollout")
        return NOT_INSTALLED
    if len(token) < SHORTEST_TOKEN:
        _say(f"{options.token_file} holds no token of {SHORTEST_TOKEN} characters; the operator mounts one there")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the first process of a container has no default for it
    os.environ[TOKEN_VARIABLE] = token
    waiting = Waiting(options.host, options.port, token)
    _say(f"waiting on port {waiting.server_port} for a trainer of this job")
    waiting.serve_forever(poll_interval=0.1)
    waiting.server_close()
    assert waiting.command is not None
    os.environ[START_VARIABLE] = waiting.start_digest
    host = options.host or ("::" if waiting.address_family == socket.AF_INET6 else "0.0.0.0")
    command = [sys.executable, "-m", "nemo_rl.rollout.vllm.serve", *waiting.command]
    command += ["--host", host, "--port", str(waiting.server_port)]
    _say("starting the vLLM server")
    sys.stdout.flush()
    os.execv(sys.executable, command)


def probe(port: int, token: str) -> int:
    """0 where the server on this machine is healthy: what the kubelet asks."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {token}"})
        return 0 if connection.getresponse().status == 200 else 1
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nemo_rl.rollout.vllm.replica", allow_abbrev=False)
    parser.add_argument("--token-file", type=Path, required=True, help="file with the token of the job")
    parser.add_argument("--host", default="", help="address to listen on; default all of this machine")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--probe", action="store_true", help="ask the server on this machine whether it is healthy")
    return parser


def _token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _say(sentence: str) -> None:
    print(f"nemo-rl: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
