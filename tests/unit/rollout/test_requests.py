"""Requests to rollout servers: each is counted once, by a server that has the weights, whatever happens on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nemo_rl.errors import RolloutLost, WeightSyncMismatch
from nemo_rl.job.spec import RolloutSpec
from nemo_rl.rollout.protocol import Completion, Request, Sampling
from nemo_rl.rollout.vllm import engine as engine_module
from nemo_rl.rollout.vllm.client import Client, RequestRefused, ServerGone
from nemo_rl.rollout.vllm.engine import PROVED, Member, VLLMRollouts, request_seed
from nemo_rl.run.ranks import Ranks
from unit.rollout.fake import TOKEN, FakeServer

REQUESTS = [Request([key, key + 1], key) for key in range(8)]
VERSION = "7-abc"


class Servers(VLLMRollouts):
    """The engine with servers that have passed the gate; what brings a lost one back is counted."""

    def __init__(self, *servers: FakeServer, timeout: float = 20.0) -> None:
        self.spec = RolloutSpec(engine="vllm", urls=[server.url for server in servers], timeout_seconds=timeout)
        self.members = [Member(Client(server.url, TOKEN), "policy") for server in servers]
        self.servers = servers
        self.pool = ThreadPoolExecutor(16)
        self.end_ids, self.version, self.proved_version = [1], 7, VERSION + PROVED
        self.process = self.shards = self.folder = None
        self.ranks, self.brought_back, self.returning = Ranks(), 0, {}
        for server in servers:
            server.version = VERSION + PROVED

    def bring_back(self, member: Member, poll: Any) -> bool:
        self.brought_back += 1
        server = next(server for server in self.servers if server.url == member.client.url)
        if not server.healthy:
            return False
        server.version = VERSION + PROVED
        return True


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    found = [FakeServer(), FakeServer()]
    yield found
    for server in found:
        server.close()


def roll_out(engine: Servers, **arguments: Any) -> tuple[list[list[Completion]], list[int]]:
    counted: list[int] = []
    groups = engine.generate(
        REQUESTS, Sampling(2, 3), seed=1, step=3, on_group=lambda i, _: counted.append(i), **arguments
    )
    return groups, counted


def expected() -> list[list[int]]:
    """The tokens that the fake server gives, worked out here."""
    found = []
    for request in REQUESTS:
        seed = request_seed(1, 3, request.key)
        found += [[(seed + index + t + sum(request.ids)) % 50 + 2 for t in range(3)] for index in range(2)]
    return found


def tokens(groups: list[list[Completion]]) -> list[list[int]]:
    return [completion.ids for group in groups for completion in group]


def test_completions_carry_tokens_logprobs_end_and_version(servers: list[FakeServer]) -> None:
    groups, counted = roll_out(Servers(*servers))
    assert tokens(groups) == expected()
    assert groups[0][0] == Completion(expected()[0], [-1.0, -2.0, -0.5], True, 7)
    assert sorted(counted) == list(range(8))
    assert servers[0].completed and servers[1].completed, "both servers take part"


@pytest.mark.parametrize("fault", ["drop", "unavailable", "engine died", "restart"])
def test_what_a_fault_takes_is_asked_again_and_counted_once(servers: list[FakeServer], fault: str) -> None:
    servers[0].faults = ["", fault, "", fault]
    engine = Servers(*servers[: 1 if fault == "restart" else 2])  # another server would do its work meanwhile
    groups, counted = roll_out(engine)
    assert tokens(groups) == expected()
    assert sorted(counted) == list(range(8))
    if fault == "restart":
        assert engine.brought_back >= 1, "a process without the weights is given them before it is asked again"
        assert sum(map(len, (server.completed for server in servers))) > 8, "what it said before is thrown away"


def test_a_server_that_hangs_is_left_for_another(servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HEALTH_EVERY", 0.3)
    servers[0].faults = ["hang"]
    groups, counted = roll_out(Servers(*servers))
    assert tokens(groups) == expected() and sorted(counted) == list(range(8))


def test_one_that_is_brought_back_does_not_stop_the_others(servers: list[FakeServer]) -> None:
    """Loading weights takes minutes for large models: what is asked of the other server goes on meanwhile."""
    engine, done = Servers(*servers), threading.Event()
    servers[1].start_anew()
    engine.bring_back = lambda member, poll: not done.wait(60)  # type: ignore[method-assign]
    try:
        groups, counted = roll_out(engine)
    finally:
        done.set()
    assert tokens(groups) == expected() and sorted(counted) == list(range(8))
    assert not servers[1].completed


def test_without_a_server_the_run_ends_in_words() -> None:
    server = FakeServer()
    engine = Servers(server, timeout=1.0)
    server.close()
    engine.bring_back = lambda member, poll: False  # type: ignore[method-assign]
    with pytest.raises(RolloutLost, match="no rollout server has been ready for 1 s"):
        roll_out(engine)


def test_weights_of_another_run_are_noticed(servers: list[FakeServer]) -> None:
    servers[0].faults = ["", "", "other weights"]
    with pytest.raises(WeightSyncMismatch, match=r"was given version 3-of-others .* give each server to one run only"):
        roll_out(Servers(servers[0]))


def test_the_same_weights_once_more_are_nobody_elses(servers: list[FakeServer]) -> None:
    """A replica that joined late was given them by two threads of its trainer, and the job ended (seen in a pod)."""
    engine = Servers(servers[0])

    def given_again(i: int, _: Any) -> None:
        servers[0].version = VERSION

    groups = engine.generate(REQUESTS, Sampling(2, 3), seed=1, step=3, on_group=given_again)
    assert all(len(group) == 2 for group in groups)


def test_a_server_that_only_fails_ends_the_run_in_words(servers: list[FakeServer]) -> None:
    servers[0].faults = ["engine died"] * 10_000
    engine = Servers(servers[0], timeout=0.2)
    with pytest.raises(
        RolloutLost, match=r"no request has succeeded for .* the last one: .* (EngineDeadError|timed out)"
    ):
        roll_out(engine)


def test_a_refused_request_is_not_repeated(servers: list[FakeServer]) -> None:
    servers[0].faults = ["refuse"] * 8
    with pytest.raises(RequestRefused, match="refused /v1/completions: too long"):
        roll_out(Servers(servers[0]))
    assert len(servers[0].faults) >= 1, "the first refusal ends it"


def test_a_stop_ends_the_waiting_and_closes_the_connections(servers: list[FakeServer]) -> None:
    servers[0].faults = ["hang"] * 8
    looks = iter(range(3))

    def poll() -> None:
        if next(looks, None) is None:
            raise KeyboardInterrupt

    engine = Servers(servers[0])
    with pytest.raises(KeyboardInterrupt):
        roll_out(engine, poll=poll)
    engine.pool.shutdown(wait=True)  # hangs where a connection stayed open


def test_seeds_differ_by_run_step_and_prompt_and_leave_room_for_samples() -> None:
    seeds = {request_seed(seed, step, key) for seed in range(3) for step in range(3) for key in range(50)}
    assert len(seeds) == 450
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_an_adapter_takes_the_place_of_the_one_before(servers: list[FakeServer]) -> None:
    client = Client(servers[0].url, TOKEN)
    client.load_adapter("/weights/version-3", [], "adapter", "3-abc")
    assert servers[0].adapters == [{"lora_name": "adapter", "lora_path": "/weights/version-3", "load_inplace": True}]
    assert client.weight_version().content == "3-abc"


def test_a_wrong_token_is_said(servers: list[FakeServer]) -> None:
    with pytest.raises(RequestRefused, match="refuses the token; give the trainer the NEMO_RL_ROLLOUT_TOKEN"):
        Client(servers[0].url, "another").get("/health")


def test_what_is_no_server_is_said() -> None:
    with pytest.raises(ValueError, match="'ftp://x' is no address of a rollout server"):
        Client("ftp://x", TOKEN)
    with pytest.raises(ServerGone, match=r"http://127\.0\.0\.1:9 does not answer"):
        Client("http://127.0.0.1:9", TOKEN).get("/health")
