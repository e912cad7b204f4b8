"""Calls to the API server whose way to log in has changed meanwhile."""

from __future__ import annotations

import ssl

import pytest
from aiohttp import web

from nemo_rl_operator.plan import Kind
from nemo_rl_operator.runtime.client import Access, Api, ApiError


async def test_a_refused_login_is_renewed_at_once_and_not_by_every_call() -> None:
    """A kubeconfig gets another certificate; watches that stand would notice only when they end, minutes later."""

    async def answer(request: web.Request) -> web.Response:
        known = request.headers.get("X-Login") == "new"
        return web.json_response(
            {"metadata": {"name": "x"}} if known else {"reason": "Unauthorized"}, status=200 if known else 401
        )

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    api, tls, logins = Api(), ssl.create_default_context(), ["old"]

    async def connect() -> None:
        await api.connect(Access(f"http://{host}:{port}", tls, {"X-Login": logins[-1]}))

    async def renew() -> None:
        tried.append(logins[-1])
        await connect()

    tried: list[str] = []
    api.renew = renew
    try:
        await connect()
        for _ in range(3):
            with pytest.raises(ApiError, match="401"):
                await api.get(Kind.POD, "ns", "x")
        assert tried == ["old"], "once, until some time has passed"
        logins.append("new")
        api._renewed -= 60
        with pytest.raises(ApiError, match="401"):
            await api.get(Kind.POD, "ns", "x")  # which the queue repeats
        assert await api.get(Kind.POD, "ns", "x") == {"metadata": {"name": "x"}}
        assert tried == ["old", "new"]
    finally:
        await api.close()
        await runner.cleanup()
