"""Kubernetes Events: each once, not too many, and those that matter always."""

from __future__ import annotations

import asyncio

import pytest

from nemo_rl_operator import events
from nemo_rl_operator.events import EventPoster, body
from nemo_rl_operator.plan import Event, Kind
from unit.operator import make
from unit.operator.fake_api import FakeApi

RESOURCE = make.resource()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PAUSE_SECONDS", 0.0)


async def post(api: FakeApi, *found: Event) -> list[str]:
    """What is posted of these."""
    poster = EventPoster(api)  # type: ignore[arg-type]
    for event in found:
        poster.post(RESOURCE, event)
    task = asyncio.create_task(poster.run())
    for _ in range(10 * len(found) + 10):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return [str(held["message"]) for (kind, _), held in api.objects.items() if kind is Kind.EVENT]


def test_an_event_is_about_the_job() -> None:
    found = body(RESOURCE, Event("Failed", "no", warning=True))
    assert found["involvedObject"]["uid"] == make.UID
    assert (found["type"], found["reason"], found["message"]) == ("Warning", "Failed", "no")
    assert found["metadata"]["name"].startswith("x.")


async def test_the_same_event_is_posted_once_even_after_a_restart() -> None:
    api = FakeApi()
    event = Event("AttemptStarted", "attempt 1 starts", key="1")
    assert len(await post(api, event, event)) == 1
    assert len(await post(api, event)) == 1
    assert len(await post(api, Event("AttemptStarted", "attempt 2 starts", key="2"))) == 2


async def test_a_flood_is_cut_but_warnings_pass() -> None:
    api = FakeApi()
    normal = [Event("CheckpointSaved", f"step {n}", key=str(n)) for n in range(3 * events.BURST)]
    warnings = [Event("AttemptEnded", f"attempt {n}", warning=True, key=str(n)) for n in range(20)]
    posted = await post(api, *normal, *warnings)
    assert events.BURST <= sum(m.startswith("step") for m in posted) < 2 * events.BURST
    assert sum(m.startswith("attempt") for m in posted) == 20
