"""The schedule of rollouts that run ahead: whatever happens when, the bound holds and each step is trained once, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.rollout.schedule import Schedule


@given(
    st.integers(0, 6),
    st.integers(1, 30),
    st.lists(st.sampled_from(["begin", "wait", "killed", "killed, half of it saved"]), max_size=60),
)
def test_the_bound_is_never_exceeded_and_each_step_is_trained_once_in_order(
    bound: int, total: int, happens: list[str]
) -> None:
    """At each step the trainer begins what is due, or trains first what is there; it may be killed and go on."""
    schedule = Schedule(bound, total)
    sampled: dict[int, int] = {}
    trained: list[int] = []
    begun = version = 0
    events = iter(happens)
    while version < total:
        event = next(events, "begin")
        if event.startswith("killed"):
            kept = sorted(step for step in sampled if step > version)
            if "half" in event:
                kept = kept[: len(kept) // 2]
            sampled = {step: sampled[step] for step in kept}
            begun = version
        if event != "wait" or version + 1 not in sampled:
            due = schedule.to_sample(version, begun)
            for step in due:
                sampled.setdefault(step, version)  # what a checkpoint has is not sampled again
            begun = max([begun, *due])
        step = version + 1
        staleness = schedule.staleness(step, sampled.pop(step))
        assert 0 <= staleness <= bound
        trained.append(step)
        version = step
    assert trained == list(range(1, total + 1))
    assert not sampled, "nothing is sampled that is never trained"


@given(st.integers(1, 30))
def test_on_policy_each_step_is_sampled_after_the_one_before_it(total: int) -> None:
    schedule = Schedule(0, total)
    assert [list(schedule.to_sample(version, version)) for version in range(total)] == [[s + 1] for s in range(total)]


@given(st.integers(0, 6), st.integers(1, 30))
def test_what_may_run_ahead_is_begun_at_once(bound: int, total: int) -> None:
    schedule, begun = Schedule(bound, total), 0
    for version in range(total):
        due = schedule.to_sample(version, begun)
        begun = max([begun, *due])
        assert begun == min(total, version + 1 + bound), "one more would be too old when it is trained"
        with pytest.raises(ValueError, match="max_staleness"):
            schedule.staleness(version + 2 + bound, version)


def test_weights_of_the_future_are_refused() -> None:
    with pytest.raises(ValueError, match="sampled by version 4 of the weights; expected one of 2 to 3"):
        Schedule(1, 9).staleness(4, 4)
