"""The pod's Prometheus metrics. No series is named after the job: a scraper knows the pod by its target's labels."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

GAUGES = {
    "epoch": "Pass over the data, from 0.",
    "reward": "Mean reward of the last step's completions (GRPO).",
    "reward_std": "Mean spread of rewards within a prompt's group (GRPO).",
    "loss": "Loss of the last step.",
    "kl": "Divergence from the reference model per token (GRPO).",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Learning rate of the last step.",
    "completion_length": "Mean length of completions, in tokens (GRPO).",
    "truncated_fraction": "Share of completions that ran into maxNewTokens (GRPO).",
    "validation_loss": "Loss on the validation data.",
    "validation_reward": "Mean reward on the validation data (GRPO).",
    "tokens_per_second": "Tokens of the last step by its seconds.",
}
"""Metric of a step → what it says. Served as nemo_rl_train_<metric>; only those that the algorithm has."""
CONTENT_TYPE = CONTENT_TYPE_LATEST


class TrainMetrics:
    """The series of one process, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._step = Gauge("nemo_rl_train_step", "Optimizer steps done, over all attempts.", registry=self._registry)
        self._total = Gauge("nemo_rl_train_total_steps", "Optimizer steps that the run takes.", registry=self._registry)
        self._time: Gauge | None = None
        self._tokens = Counter("nemo_rl_train_tokens", "Tokens processed by this process.", registry=self._registry)
        self._errors = Counter(
            "nemo_rl_train_reward_errors", "Rewards that failed in this process.", registry=self._registry
        )
        self._seconds = Counter(
            "nemo_rl_train_seconds", "Seconds spent, by part of a step.", ["part"], registry=self._registry
        )
        self._checkpoint = Gauge(
            "nemo_rl_train_checkpoint_step", "Step of the newest checkpoint.", registry=self._registry
        )
        self._gauges: dict[str, Gauge] = {}

    def begin(self, step: int, total_steps: int) -> None:
        self._step.set(step)
        self._total.set(total_steps)

    def saved(self, step: int) -> None:
        self._checkpoint.set(step)

    def step_ended(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._step.set(step)
        if self._time is None:  # before the first step there is no such time, and 0 would look like a long standstill
            self._time = Gauge(
                "nemo_rl_train_last_step_timestamp_seconds",
                "When the last step of this process ended.",
                registry=self._registry,
            )
        self._time.set(time.time())
        self._tokens.inc(_finite(metrics.get("tokens")))
        self._errors.inc(_finite(metrics.get("reward_errors")))
        for name, value in metrics.items():
            if name.endswith("_seconds") and "/" not in name:
                self._seconds.labels(name.removesuffix("_seconds")).inc(_finite(value))
            elif name in GAUGES and value is not None:
                self._gauge(name).set(float(value))

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"nemo_rl_train_{name}", GAUGES[name], registry=self._registry)
        return self._gauges[name]


def _finite(value: Any) -> float:
    """What a counter may grow by."""
    number = float(value) if value is not None else 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
