"""ASGI middleware of a rollout server: no route without the token, and each answer says which process gave it."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import signal
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE, on_disk

INSTANCE_HEADER = "x-nemo-rl-instance"
"""A server that was started anew has other weights than the one before it, and another value here."""
ADAPTER_ROUTE = "/nemo_rl/adapter"
REPLICA_ROUTE = "/nemo_rl/replica"
"""Says what a rollout replica does, and for which start; also before its vLLM server runs."""
START_ROUTE = "/nemo_rl/start"
"""Tells a replica that waits which model to serve, and how."""
STOP_ROUTE = "/nemo_rl/stop"
"""Ends the server of a replica; its container is started anew, and waits to be told."""
START_VARIABLE = "NEMO_RL_ROLLOUT_START"
"""Digest of what the server of a replica was started with."""
_INSTANCE = uuid.uuid4().hex
_LONGEST_BODY = 2**20


class RequireToken:
    """Answers 401 to every request without `Authorization: Bearer <token>`: vLLM's own key leaves most routes open."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self._expected = f"Bearer {os.environ[TOKEN_VARIABLE]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope.get("headers", []) if name.lower() == b"authorization"]
        if scope["type"] != "http" or len(given) != 1 or not hmac.compare_digest(given[0], self._expected):
            await _refuse(scope, send)
            return

        if scope["path"] == ADAPTER_ROUTE:
            await _fetch_adapter(receive, send)
            return
        if scope["path"] == REPLICA_ROUTE:
            await _answer(send, 200, {"state": "serving", "start": os.environ.get(START_VARIABLE, "")})
            return
        if scope["path"] == STOP_ROUTE and os.environ.get(START_VARIABLE):
            await _answer(send, 200, {"state": "ending"})
            os.kill(os.getpid(), signal.SIGTERM)
            return

        async def send_with_instance(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (INSTANCE_HEADER.encode(), _INSTANCE.encode())]
            await send(message)

        await self.app(scope, receive, send_with_instance)


async def _fetch_adapter(receive: Any, send: Any) -> None:
    """Brings the files of a LoRA adapter to this machine, checked, and answers with their folder: vLLM loads from paths alone."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body") or len(body) > _LONGEST_BODY:
            break
    try:
        asked = json.loads(body)
        status, content = 200, {"folder": await asyncio.to_thread(_adapter_folder, asked["source"], asked["files"])}
    except (ValueError, KeyError, TypeError) as error:
        status, content = 400, {"error": str(error)}
    await _answer(send, status, content)


def _adapter_folder(source: str, files: list[dict[str, Any]]) -> str:
    with on_disk(source, files) as paths:
        return str(paths[0].parent)


async def _answer(send: Any, status: int, content: dict[str, Any], *further: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", b"application/json"), (INSTANCE_HEADER.encode(), _INSTANCE.encode()), *further]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def _refuse(scope: dict[str, Any], send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    reason = "this rollout server needs the token of its run as Authorization: Bearer"
    await _answer(send, 401, {"error": reason}, (b"www-authenticate", b"Bearer"))
