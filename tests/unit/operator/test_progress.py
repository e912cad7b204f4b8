"""Pulling progress from pods that may say anything, or nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from nemo_rl.job import names
from nemo_rl.job.status import Progress
from nemo_rl_operator import progress
from nemo_rl_operator.progress import ProgressPuller, read
from nemo_rl_operator.runtime.cache import Key

KEY = ("ns", "x")
GOOD = {"step": 3, "totalSteps": 6, "metrics": {"reward": 0.5}}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def trainer(handler: Handler, port: int = 0) -> AsyncIterator[str]:
    """A trainer's /progress on the loopback; its URL."""
    app = web.Application()
    app.add_routes([web.get("/progress", handler)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/progress"
    finally:
        await runner.cleanup()


def answering(body: bytes, status: int = 200, **headers: str) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers=headers)

    return handler


async def test_good_progress_is_read() -> None:
    async with trainer(answering(json.dumps(GOOD).encode())) as url, aiohttp.ClientSession() as session:
        found = await read(session, url)
    assert (found.text, found.metrics) == ("3/6", {"reward": "0.5"})


@pytest.mark.parametrize(
    ("body", "status", "headers"),
    [
        (b"not json", 200, {}),
        (b"{}", 200, {}),
        (b'{"step": -1}', 200, {}),
        (b'{"step": NaN}', 200, {}),
        (b"[" * 50_000, 200, {}),
        (b'{"step": 1, "text": "' + b"x" * names.PROGRESS_LIMIT + b'"}', 200, {}),
        (json.dumps(GOOD).encode(), 500, {}),
        (b"", 302, {"Location": "http://169.254.169.254/"}),
        (b"\xff\xfe", 200, {}),
    ],
    ids=["text", "empty", "negative", "nan", "deep", "long", "error", "redirect", "bytes"],
)
async def test_lies_are_refused(body: bytes, status: int, headers: dict[str, str]) -> None:
    async with trainer(answering(body, status, **headers)) as url, aiohttp.ClientSession() as session:
        with pytest.raises(ValueError, match=r"."):
            await read(session, url)


async def test_an_endless_answer_is_cut_off() -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 8192)
            sent += 8192

    async with trainer(endless) as url, aiohttp.ClientSession() as session:
        with pytest.raises(ValueError, match="more than 65536 bytes"):
            await read(session, url)
    assert sent < 100 * names.PROGRESS_LIMIT


async def test_a_hanging_answer_ends_with_the_time_limit() -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    short = aiohttp.ClientTimeout(total=0.05)
    async with trainer(hang) as url, aiohttp.ClientSession(timeout=short) as session:
        with pytest.raises(TimeoutError):
            await read(session, url)


@pytest.fixture
async def puller(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> AsyncIterator[tuple[ProgressPuller, asyncio.Queue[Key]]]:
    """A puller that is quick, and the keys that it calls changed."""
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    monkeypatch.setattr(names, "TRAINER_PORT", unused_tcp_port)
    changed: asyncio.Queue[Key] = asyncio.Queue()
    found = ProgressPuller(changed.put_nowait)
    task = asyncio.create_task(found.run())
    yield found, changed
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_change_is_told_once(puller: tuple[ProgressPuller, asyncio.Queue[Key]]) -> None:
    found, changed = puller
    asked = asyncio.Event()
    count = 0

    async def handler(_: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        if count == 4:
            asked.set()
        return web.json_response(GOOD)

    async with trainer(handler, names.TRAINER_PORT):
        found.follow(KEY, "pod", "127.0.0.1")
        assert await asyncio.wait_for(changed.get(), 10) == KEY
        await asyncio.wait_for(asked.wait(), 10)
    assert changed.empty(), "the same progress again is no news"
    newest = found.newest(KEY)
    assert newest is not None
    assert newest.step == 3


async def test_the_last_good_progress_stays_when_the_pod_falls_silent(
    puller: tuple[ProgressPuller, asyncio.Queue[Key]],
) -> None:
    found, changed = puller
    async with trainer(answering(json.dumps(GOOD).encode()), names.TRAINER_PORT):
        found.follow(KEY, "pod", "127.0.0.1")
        await asyncio.wait_for(changed.get(), 10)
    refused = asyncio.Event()

    async def liar(_: web.Request) -> web.StreamResponse:
        refused.set()
        return web.Response(body=b"nonsense")

    async with trainer(liar, names.TRAINER_PORT):
        await asyncio.wait_for(refused.wait(), 10)
    assert found.newest(KEY) is not None


async def test_another_pod_begins_anew_and_a_forgotten_job_is_not_asked(
    puller: tuple[ProgressPuller, asyncio.Queue[Key]],
) -> None:
    found, changed = puller
    async with trainer(answering(json.dumps(GOOD).encode()), names.TRAINER_PORT):
        found.follow(KEY, "pod", "127.0.0.1")
        await asyncio.wait_for(changed.get(), 10)
        found.follow(KEY, "another pod", "127.0.0.1")
        assert found.newest(KEY) is None
        await asyncio.wait_for(changed.get(), 10)
        found.forget(KEY)
        assert found.newest(KEY) is None


async def test_a_pod_that_cannot_be_reached_is_asked_again_soon_however_often_that_was_so(
    puller: tuple[ProgressPuller, asyncio.Queue[Key]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = puller
    waits: list[float] = []
    enough = asyncio.Event()
    plan = found._plan

    def watch(key: Key, pod: str, seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 8:
            enough.set()
        plan(key, pod, seconds)

    monkeypatch.setattr(found, "_plan", watch)
    found.follow(KEY, "pod", "127.0.0.1")  # nothing listens there
    await asyncio.wait_for(enough.wait(), 10)
    assert max(waits) <= 2 * max(progress.INTERVAL, 1 / progress.WRITES_PER_SECOND)


async def test_following_anew_does_not_read_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for flaps in (0, 5):
        count = 0

        async def read(session: Any, url: str) -> Progress:
            nonlocal count
            count += 1
            return Progress(step=1)

        monkeypatch.setattr(progress, "read", read)
        monkeypatch.setattr(progress, "INTERVAL", 0.05)
        puller = ProgressPuller(lambda key: None)
        task = asyncio.create_task(puller.run())
        puller.follow(KEY, "pod", "127.0.0.1")
        for _ in range(flaps):
            puller.forget(KEY)
            puller.follow(KEY, "pod", "127.0.0.1")
        await asyncio.sleep(0.6)
        task.cancel()
        counts.append(count)
    assert counts[1] <= counts[0] + 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (aiohttp.ClientError("refused"), "refused"),
        (ValueError("HTTP 404"), "is no progress: HTTP 404"),
    ],
)
async def test_progress_that_cannot_be_read_for_a_while_is_said_until_it_can(
    monkeypatch: pytest.MonkeyPatch, answer: Exception, words: str
) -> None:
    fails = True

    async def read(session: Any, url: str) -> Progress:
        if fails:
            raise answer
        return Progress(step=1)

    monkeypatch.setattr(progress, "read", read)
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    monkeypatch.setattr(progress, "LONGEST_INTERVAL", 0.02)
    monkeypatch.setattr(progress, "UNREADABLE_SECONDS", 0.1)
    changes: list[Any] = []
    puller = ProgressPuller(changes.append)
    task = asyncio.create_task(puller.run())
    puller.follow(KEY, "pod", "127.0.0.1")
    await asyncio.sleep(0.05)
    assert puller.unreadable(KEY) == "", "a trainer that starts does not answer for a moment"
    await asyncio.sleep(0.3)
    assert words in puller.unreadable(KEY)
    assert changes == [KEY], "the job is looked at once for it"
    fails = False
    await asyncio.sleep(0.2)
    assert (puller.unreadable(KEY), changes) == ("", [KEY, KEY])
    task.cancel()
