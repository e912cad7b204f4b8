"""The application: who may ask, and what is answered.

    GET /                        the page
    GET /page/…, /libraries/…    its modules, and those of others
    GET /api/jobs?namespace=     {"jobs": […], "sources": […]}; without a namespace that of each source, empty for all
    GET /api/job?key=            all about one job or run
    GET /healthz                 ok

Both answers of the API have an ETag, so that a page that asks again and again gets 304 while nothing changes. Whoever asks
brings a token in the Authorization header, which no other site can make a browser send: of this server where it shows the
viewer's own kubeconfig and runs, of the cluster where each viewer brings his own.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_rl.ui.listing import Json, Listing, Problem, Source, SourceError

PAGE = Path(__file__).parent / "page"
ANSWER_SECONDS = 5.0
"""A source that has not answered by then is said to be slow; the others are shown."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,16384}")


def create_app(
    sources: Sequence[Source], libraries: Path, *, secret: str | None, hosts: Collection[str] | None
) -> Starlette:
    """The application over these sources.

    `secret`: the token that a viewer must bring; None where each brings his own of the cluster. `hosts`: names by which the
    server may be called, None for any.
    """

    def token_of(request: Request) -> str:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" and _TOKEN.fullmatch(token.strip()) else ""
        if secret is None:
            if not given:
                raise SourceError("sign-in", "Sign in with a token of the cluster, to see the jobs that you may see.")
            return given
        if not secrets.compare_digest(given.encode(), secret.encode()):
            raise SourceError(
                "sign-in",
                "This page needs the whole address that nemo-rl ui printed when it was started: it ends in #token=…. "
                "After a new start there is a new one.",
            )
        return ""

    async def jobs(request: Request) -> Response:
        token = token_of(request)
        namespace = request.query_params.get("namespace")
        if namespace and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", namespace):
            raise SourceError("unusable", "This is no name of a namespace: expected small letters, digits and hyphens.")
        listings: dict[int, Listing] = {}

        async def ask(number: int, source: Source) -> None:
            with anyio.move_on_after(ANSWER_SECONDS):
                listings[number] = await _apart(source.list, token, namespace)

        async with anyio.create_task_group() as group:
            for number, source in enumerate(sources):
                group.start_soon(ask, number, source)
        slow = Problem("unreachable", "There is no answer yet; it is awaited.")
        found = [listings.get(n) or Listing(source.name, [], problem=slow) for n, source in enumerate(sources)]
        rows = [row.dump() for listing in found for row in listing.rows]
        sent = {"jobs": rows, "sources": [listing.dump() for listing in found], "own_token": secret is None}
        return _answer(request, sent)

    async def job(request: Request) -> Response:
        token = token_of(request)
        kind, _, key = request.query_params.get("key", "").partition("/")
        source = next((source for source in sources if source.name == kind), None)
        if source is None:
            raise SourceError("absent", "There is no such job.")
        details = await _apart(source.details, token, key)
        return _answer(request, details.dump())

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, SourceError)
        codes = {"sign-in": 401, "forbidden": 403, "absent": 404, "unreachable": 503, "unusable": 400}
        problem = {"kind": error.problem.kind, "text": error.problem.text}
        return JSONResponse(
            {"problem": problem, "own_token": secret is None},
            codes[error.problem.kind],
            {"WWW-Authenticate": "Bearer"} if error.problem.kind == "sign-in" else None,
        )

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok")

    application = Starlette(
        routes=[
            Route("/", page),
            Route("/api/jobs", jobs),
            Route("/api/job", job),
            Route("/healthz", healthz),
            Mount("/page", StaticFiles(directory=PAGE)),
            Mount("/libraries", StaticFiles(directory=libraries)),
        ],
        exception_handlers={SourceError: refused},
    )
    application.add_middleware(Guard, hosts=hosts)
    return application


async def _apart(function: Any, *arguments: Any) -> Any:
    """Calls a function that blocks in a thread; whoever asked may go before it ends."""
    return await anyio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)


def _answer(request: Request, content: Json) -> Response:
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(body, headers={"ETag": tag}, media_type="application/json")


class Guard:
    """Refuses requests that another site makes a browser send, and gives every answer the headers that keep the page to itself.

    A name that is made to point here (DNS rebinding) is not among `hosts`; a request of another site says so in
    Sec-Fetch-Site or Origin.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self._app, self._hosts = app, None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        problem = self._problem(scope["path"], Headers(scope=scope))
        answer = self._app if problem is None else PlainTextResponse(problem, 403)
        await answer(scope, receive, with_headers)

    def _problem(self, path: str, headers: Headers) -> str | None:
        host = urlsplit(f"//{headers.get('host', '')}")
        if self._hosts is not None and path != "/healthz" and (host.hostname or "") not in self._hosts:
            return (
                f"nemo-rl ui was called by a name that it does not know; expected one of {', '.join(sorted(self._hosts))}. "
                "Where the name is right, start it with --allow-host NAME.\n"
            )
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and path.startswith("/api/"):
            return "nemo-rl ui answers its own page alone, and not those of other sites.\n"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            return "nemo-rl ui answers its own page alone, and not those of other sites.\n"
        return None
