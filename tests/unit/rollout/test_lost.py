"""Servers of somebody else that go and come back: they are waited for, given the weights of now, and never loaded twice at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.errors import RolloutLost
from nemo_rl.job.spec import RolloutSpec
from nemo_rl.rollout.protocol import Completion, Request, Sampling
from nemo_rl.rollout.vllm import engine as engine_module
from nemo_rl.rollout.vllm.client import Client
from nemo_rl.rollout.vllm.engine import PROVED, Member, VLLMRollouts
from nemo_rl.rollout.vllm.weights import Published
from nemo_rl.run.ranks import Ranks
from unit.rollout.fake import TOKEN, FakeServer

pytestmark = pytest.mark.timeout(60)
REQUESTS = [Request([key, key + 1], key) for key in range(40)]
PROBE = [[3, 4], [5, 6, 7]]
LOGPROBS = [-1.0, -2.0, -0.5]


class Servers(VLLMRollouts):
    """The engine without a model: the trainer agrees with what the fake server gives."""

    def __init__(self, servers: list[FakeServer], folder: Path, timeout: float = 30.0) -> None:
        self.spec = RolloutSpec(engine="vllm", urls=[server.url for server in servers], timeout_seconds=timeout)
        self.members = [Member(Client(server.url, TOKEN), "policy") for server in servers]
        self.pool, self.ranks, self.returning = ThreadPoolExecutor(16), Ranks(), {}
        self.process = self.shards = self.folder = None
        self.end_ids, self.prompts, self.probe = [1], PROBE, Sampling(1, 3)
        self.version, self.proved_version, self.limit, self._expected = None, "", 1e-3, []
        self.published = Published(7, "7-abc", folder, [])
        self.adapter, self.publisher, self.notes = False, self, []
        self.poll, self.note = lambda: None, self.notes.append

    def publish(self, *_: Any, **__: Any) -> Published | None:
        return self.published

    def _score(self, policy: Any, completions: Any) -> list[list[float]]:
        return [LOGPROBS for _ in completions]

    policy: Any = type("Policy", (), {"model": None})()


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    found = [FakeServer(), FakeServer()]
    yield found
    for server in found:
        server.close()


def roll_out(engine: Servers) -> list[int]:
    counted: list[int] = []

    def take(i: int, completions: list[Completion]) -> None:
        assert [c.logprobs for c in completions] == [LOGPROBS]
        counted.append(i)

    engine.generate(REQUESTS, Sampling(1, 3), seed=1, step=3, on_group=take)
    return sorted(counted)


def test_a_run_waits_for_its_only_server_also_when_weights_are_due(servers: list[FakeServer], tmp_path: Path) -> None:
    """It is killed as the update reaches it, and somebody starts it anew."""
    server = servers[0]
    engine = Servers([server], tmp_path)
    server.down = True
    done = threading.Thread(target=engine.update, args=(engine.policy, 7))
    done.start()
    while not engine.notes:
        time.sleep(0.01)
    assert "waiting for a rollout server for at most 30 s" in engine.notes[0]
    server.start_anew()
    server.down = False
    done.join(30)
    assert server.version == "7-abc" + PROVED
    assert roll_out(engine) == list(range(len(REQUESTS)))


def test_without_one_in_time_it_ends_in_words(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = Servers(servers, tmp_path, timeout=0.5)
    servers[0].down = servers[1].down = True
    with pytest.raises(RolloutLost, match=r"no rollout server is left: .* does not answer"):
        engine.update(engine.policy, 7)


def test_one_that_was_gone_in_the_update_takes_part_when_it_is_back(
    servers: list[FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LOOK_EVERY", 0.01)
    engine = Servers(servers, tmp_path)
    servers[1].down = True
    engine.update(engine.policy, 7)
    assert len(engine.notes) == 1 and "the others go on" in engine.notes[0]

    assert roll_out(engine) == list(range(len(REQUESTS))), "nobody waits for it"
    servers[1].down = False
    while not servers[1].completed[len(PROBE) :]:
        assert roll_out(engine) == list(range(len(REQUESTS)))
    assert servers[1].version == "7-abc" + PROVED, "it had none of the weights before"


def test_an_update_waits_for_the_one_that_is_under_way(servers: list[FakeServer], tmp_path: Path) -> None:
    """A server that is being brought back when the next weights are due gets one version after the other."""
    engine = Servers(servers, tmp_path)
    engine.update(engine.policy, 7)
    servers[1].start_anew()
    servers[1].hold.clear()
    roll_out(engine)
    assert list(engine.returning) == [engine.members[1]], "it is being loaded, and the other has sampled all"
    engine.published = Published(8, "8-abc", tmp_path, [])
    threading.Timer(0.5, servers[1].hold.set).start()
    engine.update(engine.policy, 8)
    assert servers[1].overlaps == 0
    assert servers[1].version == "8-abc" + PROVED
    assert not engine.returning


def test_an_update_that_a_killed_trainer_has_begun_is_ended_first(servers: list[FakeServer], tmp_path: Path) -> None:
    """vLLM refuses to start an update while one is under way."""
    servers[0].updating = True
    engine = Servers(servers[:1], tmp_path)
    engine.update(engine.policy, 7)
    assert servers[0].version == "7-abc" + PROVED


def test_an_engine_that_died_in_an_update_is_noticed(
    servers: list[FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM then never answers the update, and is not healthy any more."""
    monkeypatch.setattr(engine_module, "HEALTH_EVERY", 0.3)
    engine = Servers(servers, tmp_path)
    servers[1].hold.clear()
    servers[1].healthy = None
    engine.update(engine.policy, 7)
    assert any("the others go on" in note for note in engine.notes)
    servers[1].hold.set()
