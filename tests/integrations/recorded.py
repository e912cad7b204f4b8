"""Series of operator and trainers as Prometheus would have them, in a time that the tests make: from the programs' own metrics."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from nemo_rl.worker import prometheus
from nemo_rl.worker.prometheus import TrainMetrics
from nemo_rl_operator import metrics as operator_metrics

TICK = 30
"""Seconds between two scrapes."""
BEGIN = 1.8e9
"""When the tests' time begins: promtool's begins at 0, where a time that was never set would look like now."""
Labels = tuple[tuple[str, str], ...]


class Clock:
    """Time that passes when it is told to; `time` stands for the module in the code under test."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return BEGIN + self.now


class Trainer:
    """A trainer's own metrics, whose steps take `seconds` each; it begins its first step `late` seconds after its start."""

    def __init__(self, clock: Clock, name: str, seconds: float, total: int = 10_000, late: float = 0.0) -> None:
        self.clock, self.seconds, self.total = clock, seconds, total
        self.metrics = TrainMetrics()
        self.step, self.hangs, self.reward_errors = 0, False, 0
        self.due = late + seconds
        self.begun = False
        self.labels = {"namespace": "team", "pod": f"{name}-1-0", "container": "trainer", "nemo_rl_io_job": name}

    def advance(self) -> None:
        if not self.begun:
            self.metrics.begin(0, self.total)
            self.begun = True
        while self.clock.now >= self.due and not self.hangs and self.step < self.total:
            self.step += 1
            self.due += self.seconds
            said = {"reward": 0.5, "loss": 0.1, "tokens": 4096, "step_seconds": self.seconds}
            self.metrics.step_ended(self.step, said | {"reward_errors": self.reward_errors})

    def text(self) -> str:
        return self.metrics.text().decode()


OPERATOR = {"namespace": "rl-system", "pod": "rl-0", "container": "operator", "service": "rl-metrics"}
"""What the chart's ServiceMonitor makes of the operator's target."""


class Operator:
    """The operator's own metrics, as its queue, its reconciliations and its status writer move them."""

    def __init__(self) -> None:
        self.labels = OPERATOR
        self.metrics: Any = anew()
        self.wait, self.gone = 0.02, False

    def advance(self) -> None:
        for _ in range(6):
            self.metrics.QUEUE_SECONDS.observe(self.wait)
            self.metrics.RECONCILE_SECONDS.observe(0.05)
            self.metrics.RECONCILES.labels("ok").inc()

    def text(self) -> str:
        return "" if self.gone else generate_latest(self.metrics.REGISTRY).decode()


def anew() -> Any:
    """The operator's metrics as a process has them that just began: the module is loaded once more, beside itself."""
    spec = importlib.util.spec_from_file_location("metrics_anew", str(operator_metrics.__file__))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(
    seconds: int, programs: list[Any], clock: Clock, happens: Callable[[float], None] = lambda _: None
) -> list[dict[str, str]]:
    """promtool's input_series: what each program serves at each scrape; `happens` is told the time before it."""
    seen: dict[tuple[str, Labels], list[str]] = {}
    ticks = seconds // TICK + 1
    for tick in range(ticks):
        clock.now = float(tick * TICK)
        happens(clock.now)
        for program in programs:
            program.advance()
            for family in text_string_to_metric_families(program.text()):
                for sample in family.samples:
                    value = sample.value
                    if sample.name.endswith("_timestamp_seconds"):
                        value -= BEGIN
                    elif sample.name == "process_start_time_seconds":
                        value = 0.0  # that of this process is none of the tests' time
                    key = sample.name, tuple(sorted({**sample.labels, **program.labels}.items()))
                    seen.setdefault(key, ["_"] * ticks)[tick] = repr(value)
    return [{"series": notation(*key), "values": " ".join(values)} for key, values in seen.items()]


def notation(name: str, labels: Labels) -> str:
    """A series as promtool reads it: name{label="value",...}."""
    return name + "{" + ",".join(f'{label}="{value}"' for label, value in labels) + "}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(prometheus, "time", made)
    return made
