"""The write lease: of two attempts that write at the same time one publishes, whatever moment the other one was stopped at."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rl.errors import LeaseLost
from nemo_rl.run.lease import Claim, Lease

ROUNDS = 60


def claim(output: Path, number: int, owner: str = "uid-1") -> Claim:
    return Claim.on(output, owner, number, f"x-{number}-0")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "x").mkdir()
    return tmp_path / "x"


def publish(lease: Lease, target: Path, text: str) -> None:
    """As a checkpoint is published: a folder with files, in place of one that may be there."""
    aside = lease.staging / target.name
    with lease.guard():
        aside.mkdir()
        for name in ("a", "b", "c"):
            (aside / name).write_text(text)
        if target.exists():
            lease.retire(target, f"replaced-{target.name}-{time.time_ns()}")
        lease.publish(aside, target)


def test_what_is_published_is_there_and_replaces_what_was(output: Path):
    lease = claim(output, 1).take()
    publish(lease, output / "step-1", "one")
    publish(lease, output / "step-1", "two")
    assert (output / "step-1" / "a").read_text() == "two"


def test_the_next_attempt_takes_the_lease_and_the_earlier_one_can_publish_nothing_more(output: Path):
    first = claim(output, 1).take()
    (first.staging / "half").mkdir()
    second = claim(output, 2).take()
    assert (first.held(), second.held()) == (False, True)
    with pytest.raises(LeaseLost, match=r"attempt 1 lost the right .* to attempt 2 \(pod x-2-0\)"):
        first.publish(first.staging / "half", output / "step-1")
    with pytest.raises(LeaseLost):
        first.check()
    publish(second, output / "step-1", "second")
    with pytest.raises(LeaseLost):
        first.retire(output / "step-1", "old")
    assert (output / "step-1" / "a").read_text() == "second"


def test_an_attempt_that_comes_later_than_a_higher_one_is_refused(output: Path):
    claim(output, 3).take()
    with pytest.raises(LeaseLost, match=r"attempt 2 came too late: attempt 3"):
        claim(output, 2).take()
    assert claim(output, 3).take().held(), "another pod of the same attempt"
    assert claim(output, 1, owner="uid-2").take().held(), "a job that was made anew"


def test_an_error_of_another_kind_stays_what_it_is(output: Path):
    lease = claim(output, 1).take()
    with pytest.raises(FileNotFoundError):
        lease.publish(lease.staging / "nothing", output / "step-1")


def test_what_was_taken_away_to_be_replaced_comes_to_the_next_holder(output: Path):
    first = claim(output, 1).take()
    publish(first, output / "step-1", "one")
    first.retire(output / "step-1", "replaced-step-1")  # and then it is killed
    second = claim(output, 2).take()
    assert (second.staging / "replaced-step-1" / "a").read_text() == "one"


def test_a_descriptor_of_an_earlier_holder_leads_nowhere(output: Path):
    first = claim(output, 1).take()
    (first.staging / "metrics").write_text("1\n")
    stream = open(first.staging / "metrics", "a")  # noqa: SIM115
    first.publish(first.staging / "metrics", output / "metrics")
    stream.write("2\n")
    stream.flush()
    assert (output / "metrics").read_text() == "1\n2\n"
    second = claim(output, 2).take()
    (second.staging / "metrics").write_text((output / "metrics").read_text())
    second.publish(second.staging / "metrics", output / "metrics")
    stream.write("3\n")
    stream.close()
    assert (output / "metrics").read_text() == "1\n2\n"


# --- two processes at the same time


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        work()
        code = 0
    except LeaseLost:
        code = 7
    finally:
        os._exit(code)


def write_for_ever(output: Path, number: int) -> None:
    """What an attempt does that does not know of any other: it publishes and prunes, as fast as it can."""
    lease = claim(output, number).take()
    (output.parent / f"began-{number}").touch()
    step = 0
    while True:
        step += 1
        publish(lease, output / f"step-{step % 3}", json.dumps([number, step]))
        with lease.guard():
            link = lease.staging / "latest"
            link.symlink_to(f"step-{step % 3}")
            lease.publish(link, output / "latest")


def seen(output: Path) -> dict[str, str]:
    return {str(path.relative_to(output)): path.read_text() for path in output.glob("step-*/*")}


def test_two_attempts_that_write_at_the_same_time_never_mix_whenever_one_was_stopped(output: Path):
    chance = random.Random(1)
    before = fork(lambda: write_for_ever(output, 1))
    wait_for(output.parent / "began-1")
    for number in range(2, ROUNDS + 2):
        time.sleep(chance.random() * 0.01)
        sleeps = chance.random() < 0.7
        if sleeps:  # in the midst of a write; a node that is cut off does that for any length of time
            os.kill(before, signal.SIGSTOP)
        lease = claim(output, number).take()
        taken = seen(output)
        if sleeps:
            os.kill(before, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(before, 0)[1]) == 7, "the earlier one ends by LeaseLost"
        assert seen(output) == taken, "nothing of the earlier one came after the lease was taken"
        publish(lease, output / "own", f"[{number}, 0]")
        before = fork(lambda number=number: write_for_ever(output, number))  # another pod of the same attempt
        wait_for(output.parent / f"began-{number}")
        deadline = time.monotonic() + 30
        while not any(json.loads(text or "[0]")[0] == number for text in seen_now(output).values()):
            assert time.monotonic() < deadline
    os.kill(before, signal.SIGKILL)
    os.waitpid(before, 0)
    assert [folder.name for folder in (output.parent / ".leases" / "x").iterdir()] == [f"{2 * ROUNDS + 1:08d}"]


def seen_now(output: Path) -> dict[str, str]:
    with contextlib.suppress(OSError):
        return seen(output)
    return {}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.001)


def test_of_many_that_ask_at_once_one_holds_it(output: Path):
    for _ in range(5):
        pids = [fork(lambda: claim(output, 1).take().check()) for _ in range(8)]
        codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
        assert codes <= {0, 7}
        assert len(list((output.parent / ".leases" / "x").glob("[0-9]*"))) == 1
