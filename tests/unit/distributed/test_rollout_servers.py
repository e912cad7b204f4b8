"""Ranks that share rollout servers train as one rank does, and give the servers the weights that they train."""

from __future__ import annotations

from pathlib import Path

import pytest

from unit.distributed.conftest import Launcher, assert_same_run, completions_of, metrics_of
from unit.rollout.fake import TOKEN, FakeServer

pytestmark = pytest.mark.slow


def test_two_ranks_with_two_servers_train_as_one_with_one(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_RL_ROLLOUT_TOKEN", TOKEN)
    servers = [FakeServer(tokens=15), FakeServer(tokens=15)]
    launcher = Launcher()
    try:
        for size in (1, 2):
            # the tokens are the fake's, not the model's: what the gate says of them is another test's
            rollout = {"engine": "vllm", "urls": [server.url for server in servers[:size]], "mismatch_limit": 10}
            job = {"algorithm": "grpo", "model": tiny_model, "keywords": {"rollout": rollout}}
            assert launcher.run(size, tmp_path / str(size), **job) == [0] * size
    finally:
        launcher.close()
        for server in servers:
            server.close()
    assert_same_run(tmp_path / "2", tmp_path / "1", 3)
    names = [[update["shards"] for update in server.updates] for server in servers]
    assert len(names[0]) == 6 and len(names[1]) == 3, "one update for each step and run"
    assert names[0][3:] == names[1], "both servers of a run get the same weights"
    assert names[0][0] == names[0][3] and names[0][0] != names[0][1], "each step has its own"


def test_rollouts_run_ahead_on_two_ranks_as_on_one(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process it is the same run; by a server, which version samples what depends on who is faster, within the bound."""
    monkeypatch.setenv("NEMO_RL_ROLLOUT_TOKEN", TOKEN)
    server, launcher = FakeServer(tokens=15), Launcher()
    server_too = {"engine": "vllm", "urls": [server.url], "mismatch_limit": 10}
    try:
        for name, rollout in {"own": {}, "server": server_too}.items():
            for size in (1, 2):
                job = {
                    "algorithm": "grpo",
                    "model": tiny_model,
                    "keywords": {"rollout": {**rollout, "max_staleness": 1}},
                }
                assert launcher.run(size, tmp_path / f"{name}-{size}", **job) == [0] * size
    finally:
        launcher.close()
        server.close()
    assert_same_run(tmp_path / "own-2", tmp_path / "own-1", 3)
    assert completions_of(tmp_path / "server-2") == completions_of(tmp_path / "server-1")
    for size in (1, 2):
        found = [line["rollout_staleness"] for line in metrics_of(tmp_path / f"server-{size}") if line["step"]]
        assert all(0 <= staleness <= 1 for staleness in found)
