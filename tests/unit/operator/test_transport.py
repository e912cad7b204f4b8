"""What the watches hear: no object is too large or too deep for the others, and pages are bounded by their size."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from nemo_rl.job import names
from nemo_rl_operator import observe
from nemo_rl_operator.runtime import transport
from nemo_rl_operator.runtime.transport import CarefulSession, light, line
from unit.operator import make

PATH = f"/apis/{names.API_VERSION}/{names.PLURAL}"


def raw(name: str, **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "ns", "uid": name, "resourceVersion": "5", "managedFields": [{"a": "b"}]}
    return {"metadata": meta, "spec": make.spec(**spec)}


def deep(depth: int) -> bytes:
    text = json.dumps({"type": "ADDED", "object": raw("deep", dataset={"inline": [{"prompt": "@"}]})})
    return text.replace('"@"', "[" * depth + "]" * depth).encode()


@pytest.mark.parametrize("depth", [1, 50, 150, 500, 1500, 100_000])
def test_an_event_of_any_depth_is_readable_json_in_which_what_is_wrong_is_seen(depth: int) -> None:
    event = json.loads(line(deep(depth)))
    found = observe.resource(event["object"])
    problem = observe.parse_spec(found.spec).problem
    assert bool(problem) is (depth > names.MAX_NESTING)
    assert "nested more than 32 levels" in problem or not problem


@pytest.mark.parametrize("text", [b"[" * 300, b'{"a":' * 300, b"\xff" * 70_000])
def test_what_is_no_json_is_passed_over(text: bytes) -> None:
    assert line(text) == b""


def test_an_ordinary_event_is_passed_on_as_it_is() -> None:
    text = json.dumps({"type": "ADDED", "object": raw("x")}).encode()
    assert line(text) is text


def test_many_rows_are_left_out_and_their_digest_tells_others() -> None:
    rows = [{"prompt": f"{n}" * 10, "answer": "x"} for n in range(3000)]
    found = light(raw("x", dataset={"inline": rows}))
    other = light(raw("x", dataset={"inline": [*rows[:-1], {"prompt": "y"}]}))
    assert len(json.dumps(found)) < 1000
    assert "managedFields" not in found["metadata"]
    assert found["spec"] != other["spec"]
    assert observe.resource(found).abridged
    assert observe.resource(raw("x", dataset={"inline": rows})).spec == observe.resource(found).spec
    assert not observe.resource(raw("x", dataset={"inline": rows}), whole=True).abridged


class Server:
    """Serves a list of jobs, page by page, and a watch."""

    def __init__(self, jobs: list[bytes], events: list[bytes] = []) -> None:  # noqa: B006 - not changed
        self.jobs, self.events = jobs, events
        self.pages: list[int] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") == "true":
            response = web.StreamResponse()
            await response.prepare(request)
            text = b"".join(event + b"\n" for event in self.events)
            for start in range(0, len(text), 1000):
                await response.write(text[start : start + 1000])
            return response
        start, limit = int(request.query.get("continue", "0")), int(request.query["limit"])
        items = self.jobs[start : start + limit]
        self.pages.append(sum(map(len, items)))
        more = str(start + limit) if start + limit < len(self.jobs) else ""
        head = json.dumps({"kind": "List", "metadata": {"resourceVersion": "9", "continue": more}})[:-1]
        return web.Response(
            body=head.encode() + b',"items":[' + b",".join(items) + b"]}", content_type="application/json"
        )


async def served(server: Server, port: int) -> AsyncIterator[CarefulSession]:
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    session = CarefulSession(aiohttp.ClientSession())
    try:
        yield session
    finally:
        await session.close()
        await runner.cleanup()


async def read_all(session: CarefulSession, port: int) -> list[Any]:
    """As kopf does it."""
    found: list[Any] = []
    more = ""
    while True:
        url = f"http://127.0.0.1:{port}{PATH}?limit=100" + (f"&continue={more}" if more else "")
        response = await session.request("get", url, headers={}, timeout=aiohttp.ClientTimeout(total=10))
        async with response:
            page = await response.json()
        found += page["items"]
        more = page["metadata"]["continue"]
        if not more:
            return found


async def test_pages_are_bounded_by_their_size(unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PAGE_BYTES", 200_000)
    rows = [{"prompt": "p" * 90, "answer": str(n)} for n in range(1000)]
    small = [json.dumps(raw(f"s{n}")).encode() for n in range(400)]
    large = [json.dumps(raw(f"l{n}", dataset={"inline": rows})).encode() for n in range(20)]
    server = Server([*small, *large, *small])
    async for session in served(server, unused_tcp_port):
        found = await read_all(session, unused_tcp_port)
    assert [item["metadata"]["name"] for item in found] == [json.loads(j)["metadata"]["name"] for j in server.jobs]
    assert max(len(json.dumps(item)) for item in found) < 2000
    assert len(server.pages) < 80, "ordinary jobs come in large pages"


async def test_a_deep_job_in_a_list_does_not_hide_the_others(unused_tcp_port: int) -> None:
    bad = json.dumps(raw("deep", affinity={"a": "@"})).replace('"@"', '{"a":' * 5000 + "1" + "}" * 5000).encode()
    server = Server([json.dumps(raw("a")).encode(), bad, json.dumps(raw("b")).encode()])
    async for session in served(server, unused_tcp_port):
        found = await read_all(session, unused_tcp_port)
    assert [item["metadata"]["name"] for item in found] == ["a", "deep", "b"]


async def test_a_watch_goes_on_after_events_that_cannot_be_read(unused_tcp_port: int) -> None:
    good = json.dumps({"type": "ADDED", "object": raw("good")}).encode()
    server = Server([], [good, deep(2000), b"[" * 300, good])
    names_seen = []
    async for session in served(server, unused_tcp_port):
        url = f"http://127.0.0.1:{unused_tcp_port}{PATH}?watch=true"
        async with await session.request("get", url) as response:
            async for data in response.content.iter_chunked(1 << 20):
                names_seen += [json.loads(part)["object"]["metadata"]["name"] for part in data.splitlines() if part]
    assert names_seen == ["good", "deep", "good"]
