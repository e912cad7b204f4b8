"""Where the time of a GRPO step goes, and which one change would save most of it, by a small model of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

PHASES = ("rollout", "reward", "training", "sync", "other")
_NAMES = {
    "rollout": "rollouts take",
    "reward": "waiting for rewards takes",
    "training": "training takes",
    "sync": "giving weights to the rollout servers takes",
    "other": "all that is neither rollout, reward nor training takes",
}
WORTH_SAYING = 0.05
"""Share of a step that a change must save to be worth a sentence."""


@dataclass(frozen=True)
class Phases:
    """Seconds of a step by phase. Rewards overlap with rollouts: `reward` is what is waited for after the last token."""

    rollout: float
    reward: float
    training: float
    sync: float
    other: float

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> Phases | None:
        """Of a step's metrics; None where they do not tell."""
        needed = ("generate_seconds", "reward_seconds", "train_seconds", "step_seconds")
        if any(not isinstance(metrics.get(name), int | float) for name in needed):
            return None
        rollout, reward, training, whole = (float(metrics[name]) for name in needed)
        sync = float(metrics.get("weight_sync_seconds") or 0.0)
        return cls(rollout, reward, training, sync, max(0.0, whole - rollout - reward - training - sync))

    @property
    def whole(self) -> float:
        return sum(getattr(self, phase) for phase in PHASES)

    def shares(self) -> dict[str, float]:
        """The share of each phase in the step, by its name; all of them sum to 1."""
        whole = self.whole
        return {phase: getattr(self, phase) / whole if whole > 0 else 0.0 for phase in PHASES}

    def __add__(self, others: Phases) -> Phases:
        return Phases(*(getattr(self, phase) + getattr(others, phase) for phase in PHASES))


@dataclass(frozen=True)
class Change:
    """Something that one can do, in words, and the seconds that a step takes then."""

    what: str
    seconds: float


def changes(phases: Phases, *, servers: int, reward_workers: int, ranks: int, on_policy: bool = False) -> list[Change]:
    """What can be done about a step's time, by the model that phases follow each other and shared work is divided evenly.

    `servers`: rollout servers, 0 where the processes that train sample. Rewards that were hidden behind rollouts are not
    seen, so that faster rollouts may save less than this says where `reward` is not 0. `on_policy`: rollouts do not run
    ahead, but might. One step ahead, training overlaps with rewards, and with sampling where that is the work of servers;
    rewards that have enough workers may overlap more than this says.
    """
    whole = phases.whole
    found = []
    if servers:
        saved = phases.rollout / (servers + 1)
        found.append(Change("another rollout server", whole - saved))
    else:
        found.append(Change("a rollout server on a GPU of its own (rollout engine vllm)", whole - phases.rollout / 2))
    saved = phases.reward * reward_workers / (2 * reward_workers)
    found.append(Change(f"reward_workers={2 * reward_workers}", whole - saved))
    found.append(Change("another rank that trains", whole - phases.training / (ranks + 1)))
    if servers:
        found.append(
            Change("LoRA, of which only the adapter travels, or a faster network or disk", whole - 0.9 * phases.sync)
        )
    if on_policy:
        rest = phases.sync + phases.other
        if servers:
            seconds = max(phases.rollout + phases.reward, phases.training) + rest
        else:
            seconds = phases.rollout + max(phases.reward, phases.training) + rest
        found.append(Change("max_staleness=1, by which rollouts run a step ahead,", seconds))
    return found


def advice(phases: Phases, *, servers: int, reward_workers: int, ranks: int, on_policy: bool = False) -> str:
    """One sentence: the phase that takes most, and what would save how much of a step, where that is worth it."""
    shares = phases.shares()
    longest = max(PHASES, key=lambda phase: shares[phase])
    sentence = f"{_NAMES[longest]} {shares[longest]:.0%} of a step"
    setup = {"servers": servers, "reward_workers": reward_workers, "ranks": ranks}
    best = min(changes(phases, **setup, on_policy=on_policy), key=lambda c: c.seconds)
    saved = 1 - best.seconds / phases.whole if phases.whole > 0 else 0.0
    if longest == "other" or saved < WORTH_SAYING:
        return sentence
    return f"{sentence}: {best.what} would save about {saved:.0%}"


STATUS_NAMES = {
    "rollout": "Rollout",
    "reward": "Reward",
    "training": "Training",
    "sync": "WeightSync",
    "other": "Data",
}
"""How the status of a job calls the phases."""
SLOW_SERVER = 0.5
"""A server that samples less than this share of what the median of the others does is the bottleneck of rollouts."""


@dataclass(frozen=True)
class Verdict:
    """What takes most of a step: the phase as a status calls it, its share of a step, and one sentence."""

    phase: str
    share: float
    advice: str


def bottleneck(
    phases: Phases,
    server_rates: Sequence[Mapping[str, Any]] = (),
    *,
    servers: int,
    reward_workers: int,
    ranks: int,
    on_policy: bool = False,
) -> Verdict:
    """What takes most of a step. `server_rates`: of each rollout server its address, and the tokens_per_second that it
    sampled where that was measured: where rollouts take longest and one server lags behind the others, it is named."""
    shares = phases.shares()
    longest = max(PHASES, key=lambda phase: shares[phase])
    sentence = advice(phases, servers=servers, reward_workers=reward_workers, ranks=ranks, on_policy=on_policy)
    if longest == "rollout" and (slow := slow_server(server_rates)):
        sentence = f"{_NAMES[longest]} {shares[longest]:.0%} of a step: {slow}"
    return Verdict(STATUS_NAMES[longest], shares[longest], sentence)


def slow_server(server_rates: Sequence[Mapping[str, Any]]) -> str:
    """The slowest of several servers in words, where it is far slower than the others; else empty."""
    rates = sorted(
        (float(one["tokens_per_second"]), str(one["address"]))
        for one in server_rates
        if one.get("tokens_per_second") is not None
    )
    if len(rates) < 2:
        return ""
    usual = median(rate for rate, _ in rates[1:])
    rate, address = rates[0]
    if rate >= SLOW_SERVER * usual:
        return ""
    return f"rollout server {address} samples {rate:.0f} tokens a second, the others {usual:.0f}; replace it"
