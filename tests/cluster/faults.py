"""A proxy between the operator and the API server that makes faults: cuts, refusals, delays and lost watches.

It speaks TLS on both sides and runs in a thread, so that tests stay plain functions.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

from cluster.api import Api
from lab import pki
from ports import free_ports

MUTATING = ("POST", "PUT", "PATCH", "DELETE")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "authorization"}


@dataclass
class Call:
    """One request that went through, with the status it got (0: no answer was given)."""

    method: str
    path: str
    code: int = 0

    @property
    def mutating(self) -> bool:
        return self.method in MUTATING


@dataclass
class Refusal:
    """The next `count` matching requests get this status instead of reaching the server."""

    code: int
    count: int
    matches: Callable[[Call], bool] = field(default=lambda _: True)


class FaultyProxy:
    """Use as a context manager; `kubeconfig` leads through it."""

    def __init__(self, api: Api, folder: Path) -> None:
        self.api = api
        self.calls: list[Call] = []
        self.refusals: list[Refusal] = []
        self.latency = 0.0
        self.watching = True
        self.cut_after: int | None = None
        self.on_cut: Callable[[], None] = lambda: None
        self.was_cut = threading.Event()
        self._cutting = False
        self._streams: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._ended: asyncio.Event | None = None
        (self._port,) = free_ports(1)
        self._keys = folder / "proxy"
        authority = pki.Authority(self._keys)
        authority.certificate("proxy", "/CN=proxy", "serverAuth", ["IP:127.0.0.1"])
        authority.certificate("client", "/CN=client", "clientAuth")
        self.kubeconfig = folder / "proxied.kubeconfig"
        self.kubeconfig.write_text(pki.kubeconfig(self._keys, "client", f"https://127.0.0.1:{self._port}"))
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        assert self._started.wait(20), "the proxy did not start"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._ended is not None
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(20)

    @property
    def mutations(self) -> list[Call]:
        return [call for call in list(self.calls) if call.mutating]

    @property
    def state_changes(self) -> list[Call]:
        """The mutations but for Events, which nobody decides by."""
        return [call for call in self.mutations if not call.path.partition("?")[0].endswith("/events")]

    def refuse(self, code: int, count: int, matches: Callable[[Call], bool] = lambda _: True) -> None:
        self.refusals.append(Refusal(code, count, matches))

    def cut_watches(self) -> None:
        """Ends every watch in the middle; while `watching` is False new ones get no answer either."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in list(self._streams)])

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self._keys / "proxy.crt", self._keys / "proxy.key")
        connector = TCPConnector(ssl=self.api.tls, limit=0)
        endless = ClientTimeout(total=None)
        async with ClientSession(connector=connector, auto_decompress=False, timeout=endless) as session:
            application = web.Application(client_max_size=64 << 20)
            application.router.add_route("*", "/{path:.*}", partial(self._handle, session))
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self._port, ssl_context=tls).start()
            self._started.set()
            await self._ended.wait()
            await runner.cleanup()

    async def _handle(self, session: ClientSession, request: web.Request) -> web.StreamResponse:
        call = Call(request.method, request.path_qs)
        if request.query.get("watch", "false") not in ("false", "0"):
            return await self._watch(request, session)
        self.calls.append(call)
        if self.latency:
            await asyncio.sleep(self.latency)
        refusal = next((r for r in self.refusals if r.count > 0 and r.matches(call)), None)
        if refusal:
            refusal.count -= 1
            call.code = refusal.code
            return _refusal(refusal.code)
        try:
            async with session.request(**await self._forward(request)) as answer:
                body = await answer.read()
        except ClientError:
            return self._drop(request)
        if call in self.state_changes and self._time_to_cut():
            # the server has done it, and the operator will never know
            await asyncio.to_thread(self._cut)
            return self._drop(request)
        call.code = answer.status
        return web.Response(status=answer.status, body=body, headers=_passed(answer.headers))

    def _time_to_cut(self) -> bool:
        """Once, at the call that was asked for."""
        if self.cut_after is None or self._cutting or len(self.state_changes) < self.cut_after:
            return False
        self._cutting = True
        return True

    def _cut(self) -> None:
        """In a thread: what is done here cuts the request that waits for it."""
        self.on_cut()
        self.was_cut.set()

    async def _watch(self, request: web.Request, session: ClientSession) -> web.StreamResponse:
        if not self.watching:
            return self._drop(request)
        response = web.StreamResponse()

        async def copy() -> None:
            async with session.request(**await self._forward(request)) as answer:
                response.set_status(answer.status)
                response.headers.update(_passed(answer.headers))
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)

        task = asyncio.ensure_future(copy())
        self._streams.add(task)
        try:
            await asyncio.wait([task])
            if task.cancelled() or task.exception():
                return self._drop(request)
        finally:
            task.cancel()
            self._streams.discard(task)
        return response

    async def _forward(self, request: web.Request) -> dict[str, object]:
        headers = {key: value for key, value in request.headers.items() if key.lower() not in HOP_BY_HOP}
        url = URL(f"https://{self.api.host}:{self.api.port}{request.raw_path}", encoded=True)
        body = await request.read()
        return {"method": request.method, "url": url, "headers": headers | self.api.headers, "data": body or None}

    def _drop(self, request: web.Request) -> web.StreamResponse:
        if request.transport:
            request.transport.abort()
        return web.Response(status=502)


def _passed(headers: object) -> dict[str, str]:
    return {key: value for key, value in dict(headers).items() if key.lower() not in HOP_BY_HOP}  # type: ignore[call-overload]


def _refusal(code: int) -> web.Response:
    reasons = {409: "Conflict", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "made by the test"}
    headers = {"Retry-After": "1"} if code in (429, 503) else {}
    return web.json_response(body | {"reason": reasons.get(code, "Unknown")}, status=code, headers=headers)
