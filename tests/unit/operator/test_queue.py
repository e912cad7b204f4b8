"""The work queue: no key twice, none worked on twice at once, back-off and delays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl_operator.runtime.queue import KeyedQueue


class Clock:
    """A time that tests move; timers of the event loop are replaced by `release_due`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Callable[[], float]) -> KeyedQueue[str]:
    return KeyedQueue(base=1.0, cap=8.0, clock=clock, jitter=lambda: 0.0)


async def take(queue: KeyedQueue[str]) -> str:
    key, _ = await asyncio.wait_for(queue.get(), 5)
    return key


async def test_a_waiting_key_is_not_added_twice() -> None:
    queue = make(Clock())
    queue.add("a")
    queue.add("a")
    assert await take(queue) == "a"
    assert queue.depth == 0


async def test_keys_come_in_their_order() -> None:
    queue = make(Clock())
    for key in "bca":
        queue.add(key)
    assert [await take(queue) for _ in range(3)] == ["b", "c", "a"]


async def test_a_key_added_while_it_is_worked_on_comes_once_more_afterwards() -> None:
    queue = make(Clock())
    queue.add("a")
    assert await take(queue) == "a"
    queue.add("a")
    queue.add("a")
    assert queue.depth == 0, "nobody else may get it now"
    queue.done("a")
    assert await take(queue) == "a"
    queue.done("a")
    assert queue.depth == 0


async def test_failures_in_a_row_wait_longer_and_longer() -> None:
    queue = make(Clock())
    assert [queue.fail("a") for _ in range(6)] == [1, 2, 4, 8, 8, 8]
    queue.forget("a")
    assert queue.fail("a") == 1


async def test_jitter_adds_up_to_a_half() -> None:
    queue: KeyedQueue[str] = KeyedQueue(base=1.0, cap=8.0, clock=Clock(), jitter=lambda: 1.0)
    assert queue.fail("a") == 1.5


async def test_the_earliest_of_several_times_holds() -> None:
    clock = Clock()
    queue = make(clock)
    queue.add_after("a", 10)
    queue.add_after("a", 5)
    queue.add_after("a", 20)
    clock.now = 4.9
    queue.release_due()
    assert queue.depth == 0
    clock.now = 5.0
    queue.release_due()
    assert await take(queue) == "a"
    queue.done("a")
    clock.now = 30.0
    queue.release_due()
    assert queue.depth == 0, "the later times were for the same wish"


async def test_adding_at_once_overrides_a_delay() -> None:
    clock = Clock()
    queue = make(clock)
    queue.add_after("a", 5)
    queue.add("a")
    assert await take(queue) == "a"
    queue.done("a")
    clock.now = 6.0
    queue.release_due()
    assert queue.depth == 0


async def test_a_delay_ends_by_itself() -> None:
    queue: KeyedQueue[str] = KeyedQueue()
    queue.add_after("a", 0.01)
    assert await take(queue) == "a"


async def test_a_worker_that_is_cancelled_while_it_waits_loses_no_key() -> None:
    queue = make(Clock())
    first, second = (asyncio.create_task(queue.get()) for _ in range(2))
    await asyncio.sleep(0)
    queue.add("a")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    key, _ = await asyncio.wait_for(second, 5)
    assert key == "a"


async def test_it_says_for_how_long_it_stands_still_and_workers_work() -> None:
    clock = Clock()
    queue = make(clock)
    queue.add("a")
    clock.now = 3.0
    assert queue.stalled() == 3.0
    await take(queue)
    clock.now = 7.0
    assert (queue.stalled(), queue.longest_work()) == (0.0, 4.0)


async def test_a_long_queue_that_moves_does_not_stand_still() -> None:
    clock = Clock()
    queue = make(clock)
    for key in "abc":
        queue.add(key)
    for now in (100.0, 200.0):
        clock.now = now
        await take(queue)
    clock.now = 210.0
    assert queue.stalled() == 10.0, "c has waited for 210 seconds, but b was served"


async def test_keys_that_can_wait_give_way_but_are_not_starved() -> None:
    queue: KeyedQueue[str] = KeyedQueue(clock=Clock(), can_wait=str.isupper)
    for key in "ABCabcdefg":
        queue.add(key)
    assert queue.depth == 10
    assert "".join([await take(queue) for _ in range(10)]) == "abcAdefBgC"


async def test_a_key_that_can_no_longer_wait_moves_ahead() -> None:
    patient = {"a", "b", "c"}
    clock = Clock()
    queue: KeyedQueue[str] = KeyedQueue(clock=clock, can_wait=patient.__contains__)
    for key in "abc":
        queue.add(key)
    patient.discard("c")
    clock.now = 3.0
    queue.add("c")
    queue.add("c")
    assert queue.depth == 3
    assert await queue.get() == ("c", 3.0), "it has waited since it was first added"
    assert [await take(queue) for _ in range(2)] == ["a", "b"]


async def test_waiting_keys_of_both_kinds_count_as_a_stand_still() -> None:
    clock = Clock()
    queue: KeyedQueue[str] = KeyedQueue(clock=clock, can_wait=str.isupper)
    queue.add("A")
    clock.now = 2.0
    queue.add("b")
    clock.now = 5.0
    assert queue.stalled() == 5.0


@given(
    st.lists(st.tuples(st.sampled_from(["add", "after", "take", "done", "time", "calm"]), st.sampled_from("abc"))),
)
def test_no_key_is_lost_and_none_is_out_twice(steps: list[tuple[str, str]]) -> None:
    clock = Clock()
    patient: set[str] = set()
    queue: KeyedQueue[str] = KeyedQueue(
        base=1.0, cap=8.0, clock=clock, jitter=lambda: 0.0, can_wait=patient.__contains__
    )
    out: set[str] = set()
    wanted: set[str] = set()

    async def play() -> None:
        for what, key in steps:
            if what == "add":
                queue.add(key)
                wanted.add(key)
            elif what == "after":
                queue.add_after(key, 2.0)
                queue._timer and queue._timer.cancel()
                wanted.add(key)
            elif what == "calm":
                patient.symmetric_difference_update(key)
            elif what == "time":
                clock.now += 1.0
                queue.release_due()
            elif what == "take" and queue.depth:
                taken = await take(queue)
                assert taken not in out
                out.add(taken)
                wanted.discard(taken)
            elif what == "done" and out:
                queue.done(out.pop())
        while out:
            queue.done(out.pop())
        clock.now += 10.0
        queue.release_due()
        left = {await take(queue) for _ in range(queue.depth)}
        assert wanted <= left

    asyncio.run(play())
