"""HTTP client of one rollout server: token ids in, token ids and log-probabilities out, and the phases of a weight update."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from nemo_rl.rollout.protocol import Completion, Sampling
from nemo_rl.rollout.vllm.middleware import ADAPTER_ROUTE, INSTANCE_HEADER

COMPLETIONS = "/v1/completions"
JSON_ROUTES = {COMPLETIONS, "/weight_info", "/v1/models", ADAPTER_ROUTE}
"""Routes whose answers are read; some of the others answer in words."""
CONNECT_SECONDS = 10.0
UPDATE_SECONDS = 1800.0
MODEL = "policy"
"""Name under which a server that the trainer starts serves the model."""


class ServerGone(ConnectionError):
    """The server did not answer, or another process answers in its place; the request may be repeated elsewhere."""


class RequestRefused(ValueError):
    """The server understood the request and refused it; repeating it changes nothing."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """The JSON of an answer, and which process of the server gave it."""

    content: Any
    instance: str


class Client:
    """Threads may share one: each keeps a connection of its own."""

    def __init__(self, url: str, token: str) -> None:
        """Raises ValueError for what is no address."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a rollout server; expected one like http://10.0.0.7:8000")
        self.url = url.rstrip("/")
        self._parts, self._token = parts, token
        self._local = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ requests

    def get(self, path: str, timeout: float = 30.0) -> Answer:
        return self._request("GET", path, None, timeout)

    def post(self, path: str, content: Any = None, timeout: float = 30.0) -> Answer:
        return self._request("POST", path, {} if content is None else content, timeout)

    def _request(self, method: str, path: str, content: Any, timeout: float) -> Answer:
        """Raises ServerGone and RequestRefused. A request is never sent twice."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=min(timeout, CONNECT_SECONDS))
        with self._lock:
            self._open.add(connection)
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            body = None if content is None else json.dumps(content).encode()
            connection.request(method, self._parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            raw = response.read()
        except (
            OSError,
            http.client.HTTPException,
            AttributeError,
            ValueError,
        ) as error:  # closed by another thread, too
            reason = str(error) or type(error).__name__
            raise ServerGone(f"the rollout server at {self.url} does not answer ({reason})") from None
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if response.status in (401, 403):
            raise RequestRefused(
                f"the rollout server at {self.url} refuses the token; give the trainer the NEMO_RL_ROLLOUT_TOKEN that the "
                "server was started with",
                response.status,
            )
        if response.status >= 400:
            text = _error_text(raw)
            # a 500 to a prompt says that the engine behind the server has ended; to an update that it was refused
            if response.status in (502, 503, 504) or (response.status == 500 and path == COMPLETIONS):
                raise ServerGone(f"the rollout server at {self.url} is not available: {text}")
            raise RequestRefused(f"the rollout server at {self.url} refused {path}: {text}", response.status)
        kind_of_answer = response.getheader("Content-Type") or ""
        if not kind_of_answer.startswith("application/json") and path not in JSON_ROUTES:
            return Answer(raw.decode(errors="replace"), response.getheader(INSTANCE_HEADER) or "")  # as of adapters
        try:
            return Answer(json.loads(raw) if raw.strip() else None, response.getheader(INSTANCE_HEADER) or "")
        except ValueError:
            raise ServerGone(
                f"the rollout server at {self.url} answered {path} with something else than JSON"
            ) from None

    def abort(self) -> None:
        """Closes all connections; vLLM then stops what it generates for them. For another thread than those that wait."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    if connection.sock is not None:
                        connection.sock.shutdown(2)

    # ------------------------------------------------------------------ completions

    def complete(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        end_ids: list[int],
        seed: int,
        model: str = MODEL,
        version: int = 0,
        timeout: float,
    ) -> tuple[list[Completion], str]:
        """Returns `num_samples` completions of each prompt, one after the other, and the process that sampled them.

        Raises ServerGone and RequestRefused.
        """
        content: dict[str, Any] = {
            "model": model,
            "prompt": prompts,
            "n": sampling.num_samples,
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "seed": seed,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "skip_special_tokens": False,
            "ignore_eos": True,  # the end tokens are ours, all of them
            "stop_token_ids": end_ids,
        }
        if not sampling.greedy:
            content |= {"top_p": sampling.top_p, "top_k": sampling.top_k if sampling.top_k is not None else 0}
        if sampling.stops is not None and sampling.stops.texts:
            content |= {"stop": sampling.stops.texts, "include_stop_str_in_output": True}
        answer = self.post(COMPLETIONS, content, timeout)
        try:
            choices = sorted(answer.content["choices"], key=lambda choice: choice["index"])
            found = [_completion(choice, sampling, version) for choice in choices]
        except (KeyError, TypeError) as error:
            raise RequestRefused(
                f"the rollout server at {self.url} left {error} out of a completion; it must be vLLM 0.30 to 0.33", 200
            ) from None
        expected = sampling.num_samples * len(prompts)
        if len(found) != expected:
            raise RequestRefused(f"the rollout server at {self.url} gave {len(found)} completions, not {expected}", 200)
        return found, answer.instance

    # ------------------------------------------------------------------ weights

    def weight_version(self) -> Answer:
        """The version of the server's weights, as it was told, and which process says so."""
        answer = self.get("/weight_info")
        return Answer(str((answer.content or {}).get("weight_version")), answer.instance)

    def load(self, update: dict[str, Any], version: str, *, first: bool, timeout: float = UPDATE_SECONDS) -> None:
        """Has the server load a version. Requests under way wait meanwhile, and go on with the new weights."""
        if first:
            self.post("/init_weight_transfer_engine", {"init_info": {}}, timeout)
        self.post(f"/pause?{urlencode({'mode': 'keep'})}", timeout=timeout)
        try:
            self._start_update(timeout)
            self.post("/update_weights", {"update_info": update}, timeout)
            self.post("/finish_weight_update", {"weight_version": version}, timeout)
            self.post("/reset_prefix_cache", timeout=timeout)
        finally:
            self.post("/resume", timeout=timeout)

    def _start_update(self, timeout: float) -> None:
        try:
            self.post("/start_weight_update", timeout=timeout)
        except RequestRefused:  # of a trainer that was killed in an update, which has to be ended first
            self.post("/finish_weight_update", timeout=timeout)
            self.post("/start_weight_update", timeout=timeout)

    def sleep(self, level: int, timeout: float = UPDATE_SECONDS) -> None:
        """Has the server give its GPU's memory back: 1 keeps the weights in main memory, 2 nothing."""
        self.post(f"/sleep?{urlencode({'level': level})}", timeout=timeout)

    def wake_up(self, timeout: float = UPDATE_SECONDS) -> None:
        """Has it take that memory again. A server that is awake stays as it is."""
        self.post("/wake_up", timeout=timeout)

    def load_adapter(
        self, source: str, files: list[dict[str, Any]], name: str, version: str, timeout: float = UPDATE_SECONDS
    ) -> None:
        """Has the server load a LoRA adapter in the place of the one before."""
        folder = self.post(ADAPTER_ROUTE, {"source": source, "files": files}, timeout).content["folder"]
        self.post(f"/pause?{urlencode({'mode': 'keep'})}", timeout=timeout)
        try:
            content = {"lora_name": name, "lora_path": folder, "load_inplace": True}
            self.post("/v1/load_lora_adapter", content, timeout)
            self.post("/reset_prefix_cache", timeout=timeout)
            self.post("/update_weight_version", {"new_version": version}, timeout)
        finally:
            self.post("/resume", timeout=timeout)


def _completion(choice: dict[str, Any], sampling: Sampling, version: int) -> Completion:
    ids = [int(token) for token in choice["token_ids"]]
    logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    if len(ids) != len(logprobs):
        raise KeyError(f"{len(ids) - len(logprobs)} log-probabilities")
    finished = choice["finish_reason"] == "stop"
    if sampling.stops is not None and sampling.stops.texts:
        window = sampling.stops.window
        ends = sampling.stops.reached([ids[max(0, t + 1 - window) : t + 1] for t in range(len(ids))])
        if any(ends):
            length = ends.index(True) + 1
            ids, logprobs, finished = ids[:length], logprobs[:length], True
    return Completion(ids, logprobs, finished, version)


def _error_text(raw: bytes) -> str:
    text = raw.decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        content = json.loads(text)
        found = content.get("error", content.get("detail", content))
        text = found.get("message", str(found)) if isinstance(found, dict) else str(found)
    return " ".join(text.split())[:500] or "no reason given"
