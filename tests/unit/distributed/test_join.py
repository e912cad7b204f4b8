"""A rank that finds no others says whom it waited for, and where."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from nemo_rl.run.ranks import join
from ports import free_port


@pytest.fixture
def ranks_of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return monkeypatch


def joined(seconds: float) -> None:
    import torch

    join(torch.device("cpu"), seconds)


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join(torch.device("cpu"))
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.gather(lambda: "mine") == ["mine"]


def test_the_first_rank_says_how_many_came(ranks_of_two: pytest.MonkeyPatch) -> None:
    ranks_of_two.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match=r"rank 0 waited 1 s at 127\.0\.0\.1:\d+ and found 1 of 2 ranks; expected"):
        joined(1.0)


def test_another_rank_says_that_it_cannot_reach_the_first(ranks_of_two: pytest.MonkeyPatch) -> None:
    ranks_of_two.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match=r"rank 1 waited 1 s at .* and found no connection; expected all 2"):
        joined(1.0)


def test_a_taken_port_is_told_with_the_cure(ranks_of_two: pytest.MonkeyPatch) -> None:
    ranks_of_two.setenv("RANK", "0")
    with socket.create_server(("", 0)) as taken:
        ranks_of_two.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(RuntimeError, match="set MASTER_PORT to a free one"):
            joined(30.0)


def test_the_first_rank_may_come_last(ranks_of_two: pytest.MonkeyPatch) -> None:
    """The other one tries again until the first one serves."""
    import os

    program = (
        "import torch, time; from nemo_rl.run.ranks import join\n"
        "print('here', flush=True); print(join(torch.device('cpu'), 120).gather(lambda: 7))"
    )
    command = [sys.executable, "-c", program]
    other = subprocess.Popen(command, env={**os.environ, "RANK": "1"}, stdout=subprocess.PIPE, text=True)
    assert other.stdout
    assert other.stdout.readline() == "here\n"
    first = subprocess.run(command, env={**os.environ, "RANK": "0"}, capture_output=True, text=True, check=True)
    assert first.stdout.splitlines()[-1] == "[7, 7]"
    assert other.communicate(timeout=120)[0].splitlines()[-1] == "[7, 7]"
