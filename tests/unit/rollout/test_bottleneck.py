"""The advice on a step's time, against pipelines whose times are played: what it says would save most does save most."""

from __future__ import annotations

import pytest

from nemo_rl.rollout.bottleneck import Phases, advice, changes


def play(
    *, tokens: float, rewards: float, training: float, sync: float, servers: int, workers: int, ranks: int
) -> Phases:
    """The phases of a step whose work is given in seconds of one server, one worker and one rank, played event by event:
    eight groups are sampled one after the other by each server, and each is scored when it is done."""
    groups, ends = 8, []
    for i in range(groups):
        ends.append((i // servers + 1) * tokens / groups)
    free = [0.0] * workers
    for end in sorted(ends):
        worker = min(range(workers), key=lambda w: free[w])
        free[worker] = max(free[worker], end) + rewards / groups
    sampled, scored = max(ends), max(free)
    return Phases(sampled, max(0.0, scored - sampled), training / ranks, sync, 0.1)


SLOW = {
    "server": {"tokens": 60.0, "rewards": 1.0, "training": 5.0, "sync": 0.5},
    "reward": {"tokens": 2.0, "rewards": 60.0, "training": 5.0, "sync": 0.5},
    "trainer": {"tokens": 2.0, "rewards": 1.0, "training": 60.0, "sync": 0.5},
}
CURES = {"server": "another rollout server", "reward": "reward_workers=2", "trainer": "another rank that trains"}


@pytest.mark.parametrize("slow", SLOW)
def test_the_advice_names_what_is_slow_and_saves_what_it_says(slow: str) -> None:
    setup = {"servers": 1, "workers": 1, "ranks": 1}
    phases = play(**SLOW[slow], **setup)
    said = advice(phases, servers=1, reward_workers=1, ranks=1)
    assert CURES[slow] in said
    part = {"server": "servers", "reward": "workers", "trainer": "ranks"}[slow]
    really = play(**SLOW[slow], **{**setup, part: 2})
    predicted = min(c.seconds for c in changes(phases, servers=1, reward_workers=1, ranks=1))
    assert really.whole == pytest.approx(predicted, rel=0.1)
    for other in {"servers", "workers", "ranks"} - {part}:
        assert play(**SLOW[slow], **{**setup, other: 2}).whole > really.whole, "no other change saves as much"


def play_ahead(*, tokens: float, rewards: float, training: float, sync: float, servers: int, workers: int) -> float:
    """Seconds of a step where rollouts run one step ahead, played over many steps as `play` plays one; `servers` is 0 where
    the process that trains samples."""
    groups, steps, now = 8, 200, 0.0
    free = [0.0] * workers
    sampler = 0.0
    scored: dict[int, float] = {}

    def sample(step: int) -> float:
        """Begins at once; returns when the last token is there."""
        ends = [now + (i // max(servers, 1) + 1) * tokens / groups for i in range(groups)]
        for end in sorted(ends):
            worker = min(range(workers), key=lambda w: free[w])
            free[worker] = max(free[worker], end) + rewards / groups
            scored[step] = free[worker]
        return max(ends)

    for step in range(steps):
        now = max(now, sampler) + sync
        for due in [0, 1] if step == 0 else [step + 1]:
            sampler = sample(due)
            if not servers or due == 0:
                now = sampler
        now = max(now, scored[step]) + training + 0.1
    return now / steps


@pytest.mark.parametrize(
    ("work", "servers"),
    [
        ({"tokens": 30.0, "rewards": 1.0, "training": 30.0, "sync": 0.5}, 1),
        ({"tokens": 30.0, "rewards": 30.0, "training": 20.0, "sync": 0.5}, 2),
        ({"tokens": 5.0, "rewards": 60.0, "training": 30.0, "sync": 0.0}, 0),
        ({"tokens": 20.0, "rewards": 30.0, "training": 20.0, "sync": 0.0}, 0),
    ],
)
def test_running_a_step_ahead_saves_what_the_advice_says(work: dict[str, float], servers: int) -> None:
    phases = play(**work, servers=max(servers, 1), workers=1, ranks=1)
    found = changes(phases, servers=servers, reward_workers=1, ranks=1, on_policy=True)
    (predicted,) = [change.seconds for change in found if "max_staleness" in change.what]
    assert 0.85 * predicted < play_ahead(**work, servers=servers, workers=1) < 1.02 * predicted
    assert predicted < 0.9 * phases.whole
    assert not [c for c in changes(phases, servers=servers, reward_workers=1, ranks=1) if "max_staleness" in c.what]


def test_running_ahead_is_said_where_it_saves_most() -> None:
    phases = Phases(rollout=45.0, reward=0.0, training=45.0, sync=5.0, other=5.0)
    assert advice(phases, servers=1, reward_workers=1, ranks=1, on_policy=True) == (
        "rollouts take 45% of a step: max_staleness=1, by which rollouts run a step ahead, would save about 45%"
    )


def test_the_sentence_is_plain() -> None:
    phases = Phases(rollout=71.0, reward=4.0, training=20.0, sync=3.0, other=2.0)
    assert advice(phases, servers=2, reward_workers=4, ranks=8) == (
        "rollouts take 71% of a step: another rollout server would save about 24%"
    )


def test_shares_come_from_what_was_measured_alone() -> None:
    metrics = {"generate_seconds": 3.0, "reward_seconds": 1.0, "train_seconds": 5.0, "step_seconds": 10.0}
    phases = Phases.of(metrics)
    assert phases is not None
    assert phases.shares() == {"rollout": 0.3, "reward": 0.1, "training": 0.5, "sync": 0.0, "other": 0.1}
    assert Phases.of({"step_seconds": 10.0}) is None
