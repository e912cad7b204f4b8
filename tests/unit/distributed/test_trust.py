"""Ranks know each other by the job's secret: a stranger who reaches their port can neither join nor send."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemo_rl.job import names
from ports import free_port

SECONDS = 240
"""Until a process counts as hanging."""
STRANGER = """
import os, pickle, sys, time, torch, torch.distributed as dist
from datetime import timedelta
marker, port = sys.argv[1:]
class Evil:
    def __reduce__(self):
        return (eval, (f"open({marker!r}, 'w').write('ran')",))
until = time.monotonic() + 180
while True:
    try:
        store = dist.TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        break
    except dist.DistError:
        assert time.monotonic() < until
        time.sleep(0.1)
evil = pickle.dumps(Evil())
for name in ("nemo_rl/joined/1", "nemo_rl/joined", "nemo_rl/complete", "nemo_rl/left/0", "nemo_rl/asked/0"):
    store.set(name, evil)
store.add("nemo_rl/count", 1)
print("wrote", flush=True)
time.sleep(300)
"""
RANK = """
import sys, torch
from nemo_rl.run.ranks import join
ranks = join(torch.device("cpu"), float(sys.argv[1]))
print("got", ranks.gather(lambda: {"rank": ranks.rank, "ids": [1, 2], "logprob": 0.1}), flush=True)
"""


def start(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rank(number: int, port: int, token: Path, seconds: float = 180.0) -> subprocess.Popen[str]:
    place = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return start(RANK, str(seconds), **place, **{names.TOKEN_VARIABLE: str(token)})


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("a secret of the job")
    return path


def test_a_stranger_cannot_take_the_place_of_a_rank(token: Path, tmp_path: Path) -> None:
    port, marker = free_port(), tmp_path / "ran"
    first = rank(0, port, token, seconds=15)
    stranger = start(STRANGER, str(marker), str(port))
    try:
        said, _ = first.communicate(timeout=SECONDS)
    finally:
        stranger.kill()
        stranger.communicate()
    assert "waited 15 s" in said and "found 1 of 2 ranks" in said
    assert not marker.exists()


def test_what_a_stranger_writes_to_the_store_changes_nothing(token: Path, tmp_path: Path) -> None:
    port, marker = free_port(), tmp_path / "ran"
    first = rank(0, port, token)
    stranger = start(STRANGER, str(marker), str(port))
    try:
        assert stranger.stdout
        assert any(line == "wrote\n" for line in stranger.stdout), "it reached the store"
        second = rank(1, port, token)
        told = [process.communicate(timeout=SECONDS)[0] for process in (first, second)]
    finally:
        stranger.kill()
        stranger.communicate()
    expected = [{"rank": number, "ids": [1, 2], "logprob": 0.1} for number in range(2)]
    assert all(f"got {expected}" in text for text in told), told
    assert not marker.exists()


def test_a_rank_with_another_secret_does_not_join(token: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("a guess")
    port = free_port()
    ranks = [rank(0, port, token, seconds=15), rank(1, port, other, seconds=15)]
    first, second = (process.communicate(timeout=SECONDS)[0] for process in ranks)
    assert "found 1 of 2 ranks" in first
    # whoever came later may still wait when the first one ends
    assert "found 1 of 2 ranks" in second or "rank 0, where they meet, went away" in second


def test_torchs_own_exchanges_run_nothing(tmp_path: Path) -> None:
    """torch.distributed.checkpoint plans a save by pickles; a forged one is refused."""
    import torch
    from torch.distributed import distributed_c10d

    from nemo_rl.run import unpickle

    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (eval, (f"open({str(marker)!r}, 'w').write('ran')",))

    before = distributed_c10d._tensor_to_object
    try:
        unpickle.guard_collectives()
        data = pickle.dumps(Evil())
        with pytest.raises(unpickle.ForbiddenPickle, match=r"a message between ranks names builtins\.eval"):
            distributed_c10d._tensor_to_object(torch.frombuffer(bytearray(data), dtype=torch.uint8), len(data), None)
    finally:
        distributed_c10d._tensor_to_object = before
    assert not marker.exists()
