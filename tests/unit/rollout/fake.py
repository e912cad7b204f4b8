"""A server that speaks vLLM's routes, for faults that a real one cannot be made to show at a chosen moment."""

from __future__ import annotations

import json
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nemo_rl.rollout.vllm.middleware import ADAPTER_ROUTE, REPLICA_ROUTE, START_ROUTE, STOP_ROUTE
from nemo_rl.rollout.vllm.replica import digest_of

TOKEN = "a token of sixteen and more"


class FakeServer:
    """Answers completions with tokens that depend on prompt and seed alone. `faults`: what happens to the next completions."""

    def __init__(self, tokens: int = 50, host: str = "127.0.0.1", port: int = 0, replica: bool = False) -> None:
        """`tokens`: how many different ones it samples. `replica`: it serves once it is told what."""
        self.tokens = tokens
        self.state = "waiting" if replica else "serving"
        self.start = ""
        self.starts: list[dict[str, Any]] = []
        self.stops = 0
        self.tampered = False
        """Its tokens come from other weights than it was given."""
        self.faults: list[str] = []
        self.completed: list[list[int]] = []
        self.version = "default"
        self.instance = uuid.uuid4().hex
        self.healthy: bool | None = True
        """False: it does not answer; None: it says that its engine has died."""
        self.delay = 0.0
        """Seconds that each request of a rollout takes."""
        self.down = False
        """As a process that is gone: connections are closed without an answer."""
        self.hold = threading.Event()
        self.hold.set()
        """Not set: an update takes until it is."""
        self.updating = False
        self.overlaps = 0
        """Updates that began within another."""
        self.updates: list[dict[str, Any]] = []
        self.adapters: list[dict[str, Any]] = []
        self.asked: list[str] = []
        """Routes and queries that were posted."""
        self.sleeps = False
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self, None)

            def do_POST(self) -> None:
                outer.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((host, port), Handler)
        self.server.daemon_threads = True
        self.port = int(self.server.server_address[1])
        self.address = f"{host}:{self.port}"
        self.url = f"http://{self.address}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()

    def start_anew(self) -> None:
        """As a process that took the place of a killed one: it has none of the weights."""
        self.instance, self.version = uuid.uuid4().hex, "default"

    def answer(self, handler: Any, content: Any) -> None:
        path = handler.path.partition("?")[0]
        if self.down:
            handler.close_connection = True
            return None
        if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(handler, 401, {"error": "no"})
        if path == REPLICA_ROUTE:
            return self.send(handler, 200, {"state": self.state, "start": self.start})
        if path == START_ROUTE:
            self.starts.append(content)
            self.state, self.start = "serving", digest_of(content["files"], content["options"])
            return self.send(handler, 200, {"state": "fetching"})
        if path == STOP_ROUTE:
            self.stops += 1
            self.state = "waiting"
            return self.send(handler, 200, {"state": "ending"})
        if self.state != "serving":
            return self.send(handler, 503, {"error": "it waits"})
        if content is not None:
            self.asked.append(handler.path)
        if path in ("/sleep", "/wake_up"):
            self.sleeps = path == "/sleep"
        elif self.sleeps and content is not None:
            return self.send(handler, 500, {"error": {"message": "it has no memory now"}})
        if path == "/health":
            if self.healthy is None:
                return self.send(handler, 503, {"error": {"message": "EngineDeadError"}})
            if not self.healthy:
                self.released.wait(30)
            return self.send(handler, 200, None)
        if path == "/weight_info":
            return self.send(handler, 200, {"weight_version": self.version})
        if path == "/v1/models":
            return self.send(handler, 200, {"data": [{"id": "a model"}]})
        if path == "/v1/completions":
            return self.complete(handler, content)
        if path == ADAPTER_ROUTE:
            return self.send(handler, 200, {"folder": content["source"]})
        if path == "/v1/load_lora_adapter":  # answers in words
            self.adapters.append(content)
            return self.send(handler, 200, "Success: LoRA adapter added successfully.")
        if path == "/start_weight_update":
            if self.updating:
                self.overlaps += 1
                return self.send(handler, 500, {"error": {"message": "a weight update is already active"}})
            self.updating = True
        if path == "/update_weights":
            self.hold.wait(120)
            self.updates.append(content["update_info"])
        if path == "/finish_weight_update":
            self.version, self.updating = content.get("weight_version", self.version), False
        if path == "/update_weight_version":
            self.version = content["new_version"]
        return self.send(handler, 200, {})

    def complete(self, handler: Any, content: Any) -> None:
        instance = self.instance
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "drop":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            handler.close_connection = True
            return None
        if fault == "unavailable":
            return self.send(handler, 503, {"error": {"message": "paused"}})
        if fault == "engine died":
            return self.send(handler, 500, {"error": {"message": "EngineDeadError"}})
        if fault == "refuse":
            return self.send(handler, 400, {"error": {"message": "too long"}})
        if fault == "restart":
            self.start_anew()
            instance = self.instance
        if fault == "hang":
            self.healthy = False
            self.released.wait(30)
            return None
        if fault == "other weights":
            self.version = "3-of-others"
        if fault == "slow":
            time.sleep(0.3)
        if content["n"] > 1:  # the probe asks for one
            time.sleep(self.delay)
        self.completed += content["prompt"]
        choices = []
        for index in range(content["n"] * len(content["prompt"])):
            number, sample = divmod(index, content["n"])
            first = content["seed"] + sample + sum(content["prompt"][number])
            ids = [(first + t) % self.tokens + 2 for t in range(3)]
            choice = {
                "index": index,
                "token_ids": ids,
                "finish_reason": "stop",
                "logprobs": {"token_logprobs": [-90.0] * 3 if self.tampered else [-1.0, -2.0, -0.5]},
            }
            choices.append(choice)
        return self.send(handler, 200, {"choices": choices}, instance)

    def send(self, handler: Any, status: int, content: Any, instance: str = "") -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        body = b"" if content is None else text.encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("x-nemo-rl-instance", instance or self.instance)
        handler.end_headers()
        handler.wfile.write(body)
