"""What the status calls the bottleneck of a run with two rollout servers, where one part of it was made slow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from nemo_rl.job.status import Bottleneck, Progress
from nemo_rl.rollout.bottleneck import Phases
from nemo_rl.trainers.grpo import GRPOTrainer
from nemo_rl.worker.report import Report
from nemo_rl.worker.server import encode
from nemo_rl_operator.decide import decide
from unit.operator import make
from unit.rollout.fake import FakeServer
from unit.rollout.test_replicas import Cluster, cluster, tiny_model, train

__all__ = ["cluster", "tiny_model"]
SLOWER = 3.0
"""What is slow takes so many times what all the rest of a step took, on whatever machine."""


class Slow(nemo_rl.Callback):
    """Seconds that the slow part takes, by what the others have taken so far; and what the run says in the end."""

    def __init__(self, phase: str, servers: list[FakeServer]) -> None:
        self.phase, self.servers, self.seconds = phase, servers, 0.05
        self.verdict: Any = None

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        phases = Phases.of(metrics)
        assert phases is not None
        self.seconds = max(self.seconds, SLOWER * (phases.whole - getattr(phases, self.phase)))
        if self.phase == "rollout":
            self.servers[1].delay = self.seconds
        self.verdict = trainer.bottleneck


COMPLETIONS = 16
"""Of a step."""


@pytest.fixture
def verdict_of(
    cluster: Cluster, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Bottleneck]:
    """Trains with one part slow, and gives the bottleneck of the status."""

    def verdict(phase: str) -> Bottleneck:
        slow = Slow(phase, [cluster.add("first"), cluster.add("second")])
        train_on = GRPOTrainer.train_on

        def slowly(trainer: GRPOTrainer, *given: Any) -> Any:
            time.sleep(slow.seconds if phase == "training" else 0.0)
            return train_on(trainer, *given)

        def reward(prompt: str, response: str) -> float:
            time.sleep(slow.seconds / COMPLETIONS if phase == "reward" else 0.0)
            return response.count("a") / 6

        monkeypatch.setattr(GRPOTrainer, "train_on", slowly)
        monkeypatch.setattr(GRPOTrainer, "note_servers", lambda trainer, servers: setattr(trainer, "servers", servers))
        train(tiny_model, tmp_path / "out", reward, [slow])
        report = Report()
        report.bottleneck(slow.verdict)
        heard = Progress.of_a_pod(json.loads(encode(report.progress())))
        live = make.resource(make.status(make.record()))
        decided = decide(make.seen(live, [make.attempt()], [make.running_pod()], progress=heard), make.NOW)
        assert decided.status.bottleneck is not None
        return decided.status.bottleneck

    return verdict


def test_slow_rewards(verdict_of: Callable[[str], Bottleneck]) -> None:
    found = verdict_of("reward")
    assert found.phase == "Reward" and float(found.share) > 0.5
    assert "waiting for rewards takes" in (found.advice or "")


def test_a_slow_trainer(verdict_of: Callable[[str], Bottleneck]) -> None:
    found = verdict_of("training")
    assert found.phase == "Training" and float(found.share) > 0.5
    assert "training takes" in (found.advice or "")


def test_a_slow_replica_is_named(verdict_of: Callable[[str], Bottleneck], cluster: Cluster) -> None:
    found = verdict_of("rollout")
    assert found.phase == "Rollout" and float(found.share) > 0.5
    slow = cluster.servers["second"]
    assert f"rollout server {slow.address} samples" in (found.advice or "")
    assert (found.advice or "").endswith("replace it")
