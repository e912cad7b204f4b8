"""Liveness tells the truth, and the resync heals and notices what a watch missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest

from nemo_rl.job import names
from nemo_rl_operator.plan import Kind
from nemo_rl_operator.runtime import health, resync
from nemo_rl_operator.runtime.cache import Cache, Key
from nemo_rl_operator.runtime.client import ApiError
from nemo_rl_operator.runtime.health import Health
from nemo_rl_operator.runtime.queue import KeyedQueue
from nemo_rl_operator.runtime.resync import Resync

KEY = ("ns", "x")


def resource(version: int, name: str = "x") -> dict[str, Any]:
    return {
        "metadata": {"namespace": "ns", "name": name, "uid": f"uid-{name}", "resourceVersion": str(version)},
        "spec": {},
    }


def make() -> tuple[Cache, KeyedQueue[Key], Health]:
    cache: Cache = Cache()
    queue: KeyedQueue[Key] = KeyedQueue()
    return cache, queue, Health(cache, queue)


async def test_a_healthy_operator_has_no_problems() -> None:
    assert make()[2].problems() == []


async def test_a_write_that_the_watch_never_reports_back_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ECHO_LIMIT", -1.0)
    cache, _, found = make()
    cache.put("resource", resource(5))
    found.wrote(KEY, "6")
    assert "the watch has not reported a write back" in found.problems()[0]
    found.echoed(KEY, 5)
    assert found.problems() != [], "an older version is no answer"
    found.echoed(KEY, 7)
    assert found.problems() == []


async def test_an_echo_that_comes_before_the_answer_to_the_write_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are read by one thread, and nothing says which is read first. After the last write of a job no other echo comes."""
    monkeypatch.setattr(health, "ECHO_LIMIT", -1.0)
    cache, _, found = make()
    cache.put("resource", resource(6))
    found.echoed(KEY, 6)
    found.wrote(KEY, "6")
    assert found.problems() == []
    found.wrote(KEY, "8")
    assert found.problems() != [], "a newer one is yet to come"
    found.echoed(("other", "x"), 9)
    assert found.problems() != [], "another namespace may be another watch"
    found.echoed(("ns", "y"), 9)
    assert found.problems() == [], "the watch is past it"


async def test_a_job_that_was_deleted_meanwhile_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ECHO_LIMIT", -1.0)
    _, _, found = make()
    found.wrote(KEY, "6")
    assert found.problems() == []


async def test_a_queue_that_nobody_serves_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WAIT_LIMIT", -1.0)
    _, queue, found = make()
    queue.add(KEY)
    assert "jobs wait" in found.problems()[0]


async def test_a_part_that_ended_by_itself_is_a_problem() -> None:
    found = make()[2]
    found.broken = "resync ended: KeyError('x')"
    assert found.problems() == ["resync ended: KeyError('x')"]


async def test_it_is_served_over_http(unused_tcp_port: int) -> None:
    cache, _, found = make()
    cache.put("resource", resource(5) | {"status": {"phase": "Running"}})
    runners = await found.serve(unused_tcp_port, unused_tcp_port, "127.0.0.1")
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{unused_tcp_port}") as session:

            async def get(path: str) -> tuple[int, str]:
                async with session.get(path) as answer:
                    return answer.status, await answer.text()

            assert await get("/healthz") == (200, "ok\n")
            assert (await get("/readyz"))[0] == 500
            found.started = True
            assert (await get("/readyz"))[0] == 200
            found.deaf = "the watches missed 3 changes"
            assert await get("/healthz") == (500, "the watches missed 3 changes\n")
            text = (await get("/metrics"))[1]
            assert 'nemo_rl_operator_jobs{phase="Running"} 1.0' in text
            assert "uid-x" not in text
    finally:
        for runner in runners:
            await runner.cleanup()


class Lists:
    """Answers lists; `gone` are objects that are listed but no longer there when asked for."""

    def __init__(self, **objects: dict[str, int]) -> None:
        self.objects = objects
        self.gone: set[str] = set()
        self.away = False

    async def metadata(
        self, kind: Kind, namespace: str | None, params: Mapping[str, str]
    ) -> AsyncIterator[tuple[list[Any], str]]:
        assert bool(params.get("labelSelector")) is (kind is not Kind.RESOURCE)
        found = self.objects.get(kind.name.lower(), {})
        items = [resource(version, name) for name, version in found.items()]
        for item in items if kind is not Kind.RESOURCE else ():
            item["metadata"]["labels"] = {names.LABEL_JOB: ""}
        yield items, "50"

    async def exists(self, kind: Kind, namespace: str, name: str) -> bool:
        if self.away:
            raise ApiError(0, "Unreachable", "away")
        return name not in self.gone


def resyncer(lists: Lists, cache: Cache, queue: KeyedQueue[Key], found: Health) -> Resync:
    return Resync(lists, cache, queue, found, (), 0.01)  # type: ignore[arg-type]


async def test_ghosts_are_dropped_and_what_is_newer_than_the_list_stays() -> None:
    cache, queue, found = make()
    pod = {"namespace": "ns", "uid": "p", "labels": {names.LABEL_JOB: "x"}}
    cache.put("resource", resource(5))
    cache.put("pod", {"metadata": pod | {"name": "ghost", "resourceVersion": "6"}})
    cache.put("pod", {"metadata": pod | {"name": "young", "resourceVersion": "60"}})
    await resyncer(Lists(resource={"x": 5}), cache, queue, found).once()
    assert list(cache.get(KEY).pods) == ["young"]
    assert queue.depth == 1, "what lost something is looked at at once"
    assert queue.delayed == 1, "and every job again soon"


async def test_a_deaf_watch_is_noticed_and_one_that_catches_up_is_not_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "DEAF_SECONDS", 0.05)
    cache, queue, found = make()
    task = asyncio.create_task(resyncer(Lists(resource={"x": 5}), cache, queue, found).once())
    await asyncio.sleep(0.02)
    assert found.deaf == "", "for a while it is merely late"
    await asyncio.sleep(0.2)
    assert found.deaf == "the watches missed 1 changes"
    cache.put("resource", resource(5))
    await task
    assert found.deaf == ""


async def test_an_api_server_that_is_away_is_no_deaf_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "DEAF_SECONDS", 0.0)
    cache, queue, found = make()
    lists = Lists(resource={"x": 5})
    lists.away = True
    task = asyncio.create_task(resyncer(lists, cache, queue, found).once())
    await asyncio.sleep(0.1)
    assert found.deaf == ""
    task.cancel()


async def test_objects_of_others_with_our_label_are_no_missed_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "DEAF_SECONDS", 0.0)
    cache, queue, found = make()
    lists = Lists(pod={"innocent": 500})
    await asyncio.wait_for(resyncer(lists, cache, queue, found).once(), 1)
    assert found.deaf == ""


async def test_no_echo_is_awaited_from_an_api_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ECHO_LIMIT", -1.0)
    cache, _, found = make()
    cache.put("resource", resource(5))
    found.wrote(KEY, "6")
    found.reachable = False
    assert found.problems() == []
    found.reachable = True
    assert found.problems() != []


async def test_a_watch_that_is_merely_late_is_not_deaf() -> None:
    cache, queue, found = make()
    task = asyncio.create_task(resyncer(Lists(resource={"x": 5}), cache, queue, found).once())
    await asyncio.sleep(0)
    cache.put("resource", resource(5))
    await task
    assert found.deaf == ""


async def test_an_object_that_went_meanwhile_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "DEAF_SECONDS", 0.0)
    cache, queue, found = make()
    lists = Lists(resource={"x": 5})
    lists.gone.add("x")
    await resyncer(lists, cache, queue, found).once()
    assert found.deaf == ""


def test_the_grace_is_shorter_than_the_interval() -> None:
    assert resync.GRACE < resync.INTERVAL
