"""The chart's alerts by promtool: each fires in its own fault, and none in hours of healthy jobs. Time is promtool's."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from charts import ROOT, render
from integrations.recorded import OPERATOR, TICK, Clock, Operator, Trainer, clock, record
from lab.prometheus import promtool
from nemo_rl.job.status import Cause

__all__ = ["clock"]
HOUR = 3600
RUNBOOKS = "https://docs.example.com/howto/monitoring/"
Object = dict[str, Any]


@functools.cache
def rules(**values: Any) -> list[Object]:
    """The rules as the chart renders them."""
    settings = {"metrics": {"rules": {"enabled": True, **values}}}
    (found,) = [o for o in render(settings) if o["kind"] == "PrometheusRule"]
    (group,) = found["spec"]["groups"]
    return list(group["rules"])


@dataclass
class Lab:
    """A healthy cluster: an operator, a job of short steps, one of long ones, and one whose first step comes late."""

    clock: Clock

    def __post_init__(self) -> None:
        self.operator = Operator()
        self.short = Trainer(self.clock, "short", seconds=7)
        self.long = Trainer(self.clock, "long", seconds=1200)
        self.late = Trainer(self.clock, "late", seconds=600, late=2000)
        self.short_run = Trainer(self.clock, "done", seconds=30, total=20)
        self.programs = [self.operator, self.short, self.long, self.late, self.short_run]


def everyday(lab: Lab, now: float) -> None:
    """What happens in a cluster where nothing is wrong with it: users' mistakes, preemptions, conflicts, a hang."""
    metrics = lab.operator.metrics
    if now and now % 600 == 0:
        for cause in ("Succeeded", "Succeeded", Cause.PREEMPTED, Cause.USER_ERROR, Cause.OUT_OF_MEMORY):
            metrics.ATTEMPTS.labels(str(cause)).inc()
        metrics.RECONCILES.labels("retry").inc(2)
    if now == 1200:
        metrics.ATTEMPTS.labels(str(Cause.STALLED)).inc()
        metrics.RECONCILES.labels("error").inc()


def check(folder: Path, series: list[Object], seconds: int, expected: dict[str, list[Object]], **values: Any) -> None:
    """promtool: `expected` (name → alerts) fires at the end, and nothing else does at any minute."""
    found = rules(runbooks=RUNBOOKS, **values)
    (folder / "rules.json").write_text(json.dumps({"groups": [{"name": "nemo-rl", "rules": found}]}))
    asked = []
    for rule in found:
        name = rule["alert"]
        if name in expected:
            asked.append({"alertname": name, "eval_time": f"{seconds}s", "exp_alerts": expected[name]})
        else:
            asked += [{"alertname": name, "eval_time": f"{at}s"} for at in range(0, seconds + 1, 60)]
    test = {"interval": f"{TICK}s", "input_series": series, "alert_rule_test": asked}
    content = {"rule_files": ["rules.json"], "evaluation_interval": f"{TICK}s", "tests": [test]}
    (folder / "test.json").write_text(json.dumps(content))
    result = promtool("test", "rules", folder / "test.json")
    assert result.returncode == 0, (result.stdout + result.stderr)[:6000]


def annotations(name: str, summary: str) -> Object:
    (description,) = [r["annotations"]["description"] for r in rules() if r["alert"] == name]
    return {"summary": summary, "description": description, "runbook_url": f"{RUNBOOKS}#{name.lower()}"}


def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "nemo-rl", "rules": rules()}]}))
    result = promtool("check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 rules found" in result.stdout + result.stderr


def test_no_alert_in_two_hours_of_healthy_jobs(clock: Clock, tmp_path: Path) -> None:
    lab = Lab(clock)
    check(tmp_path, record(2 * HOUR, lab.programs, clock, lambda now: everyday(lab, now)), 2 * HOUR, {})


@dataclass
class Fault:
    """`happens` is told the lab and the time at each scrape; the alert fires at `seconds`."""

    happens: Callable[[Lab, float], None]
    seconds: int
    labels: Object
    summary: str


def gone(lab: Lab, now: float) -> None:
    lab.operator.gone = now >= 600


def errors_at_once(lab: Lab, now: float) -> None:
    """The first errors ever, all between two scrapes: a counter that only appears with them would not have grown."""
    if now == 600:
        lab.operator.metrics.RECONCILES.labels("error").inc(5)


def slow(lab: Lab, now: float) -> None:
    lab.operator.wait = 25.0 if now >= 600 else 0.02


def attempts_fail(cause: Cause) -> Callable[[Lab, float], None]:
    def happens(lab: Lab, now: float) -> None:
        if now == 600:
            lab.operator.metrics.ATTEMPTS.labels(str(cause)).inc(7)

    return happens


def hangs(lab: Lab, now: float) -> None:
    lab.short.hangs = now >= 600


def hangs_before_its_first_step(lab: Lab, now: float) -> None:
    lab.late.hangs = True


def reward_fails(lab: Lab, now: float) -> None:
    lab.short.reward_errors = 2 if now >= 600 else 0


TRAINER = {"namespace": "team", "container": "trainer"}
SHORT = TRAINER | {"pod": "short-1-0", "nemo_rl_io_job": "short"}
LATE = TRAINER | {"pod": "late-1-0", "nemo_rl_io_job": "late"}
STALLED = "The job of pod {} in namespace team has finished no step for 60 minutes or more."
BY = "More than 5 attempts of training jobs ended by {} within an hour."
FAULTS: dict[tuple[str, str], Fault] = {
    ("NemoRLOperatorDown", "it is gone"): Fault(
        *(gone, 1800, {"severity": "critical"}),
        "No nemo-rl operator is scraped; new training jobs are not started, failed ones not retried.",
    ),
    ("NemoRLOperatorErrors", "its first errors come at once"): Fault(
        *(errors_at_once, 900, OPERATOR | {"severity": "warning", "result": "error"}),
        "The nemo-rl operator fails on jobs in a way that it does not expect.",
    ),
    ("NemoRLOperatorSlow", "its queue is slow"): Fault(
        *(slow, 2400, {"severity": "warning"}),
        "Changes of training jobs wait for more than 10 s before the operator looks at them.",
    ),
    **{
        ("NemoRLJobsFail", f"the first attempts end by {cause}"): Fault(
            *(attempts_fail(cause), 1200, {"severity": "warning", "cause": str(cause)}), BY.format(cause)
        )
        for cause in (
            *(Cause.START_FAILED, Cause.NODE_REJECTED, Cause.NO_RESULT, Cause.UNKNOWN),
            *(Cause.STALLED, Cause.NODE_LOST, Cause.STARTUP_TIMEOUT),
        )
    },
    ("NemoRLTrainingStalled", "a step hangs"): Fault(
        *(hangs, 5400, SHORT | {"severity": "warning"}), STALLED.format("short-1-0")
    ),
    ("NemoRLTrainingStalled", "the first step hangs"): Fault(
        *(hangs_before_its_first_step, 4800, LATE | {"severity": "warning"}), STALLED.format("late-1-0")
    ),
    ("NemoRLRewardErrors", "the reward fails"): Fault(
        *(reward_fails, 1800, SHORT | {"severity": "info"}),
        "The reward of pod short-1-0 in namespace team fails often.",
    ),
}


@pytest.mark.parametrize(("alert", "what"), FAULTS)
def test_an_alert_fires_in_its_own_fault_and_no_other_does(alert: str, what: str, clock: Clock, tmp_path: Path) -> None:
    fault, lab = FAULTS[alert, what], Lab(clock)
    series = record(fault.seconds, lab.programs, clock, lambda now: fault.happens(lab, now))
    fired = {"exp_labels": fault.labels, "exp_annotations": annotations(alert, fault.summary)}
    check(tmp_path, series, fault.seconds, {alert: [fired]})


def test_every_alert_has_a_fault() -> None:
    assert {name for name, _ in FAULTS} == {rule["alert"] for rule in rules()}


def test_the_time_of_a_stall_is_the_charts(clock: Clock, tmp_path: Path) -> None:
    """Ten minutes: the long steps of the healthy job are a stall then, and the sentence says how long."""
    lab = Lab(clock)
    lab.programs = [lab.operator, lab.short, lab.long]
    series = record(1100, lab.programs, clock)
    labels = TRAINER | {"pod": "long-1-0", "nemo_rl_io_job": "long", "severity": "warning"}
    summary = STALLED.replace("60", "10").format("long-1-0")
    fired = {"exp_labels": labels, "exp_annotations": annotations("NemoRLTrainingStalled", summary)}
    check(tmp_path, series, 1080, {"NemoRLTrainingStalled": [fired]}, stalledMinutes=10)


def test_each_alert_has_its_section_in_the_documentation() -> None:
    """Meaning and cure, at the anchor that runbook_url names; without an address there is no such annotation."""
    page = (ROOT / "docs/howto/monitoring.md").read_text()
    for rule in rules():
        section = page.partition(f"### {rule['alert']}\n")[2].partition("\n#")[0]
        assert "**Cure:**" in section, rule["alert"]
        assert "runbook_url" not in rule["annotations"]
