"""Dashboard and alerts speak of metrics that the operator and the trainers really serve."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from nemo_rl.worker.prometheus import GAUGES, TrainMetrics

FILES = Path(__file__).parents[3] / "charts" / "nemo-rl-operator" / "files"
METRIC = re.compile(r"\b(?:nemo_rl|process|python)_[a-z0-9_]+\b")
LABELS = {"nemo_rl_io_job"}


def served_by_the_operator() -> set[str]:
    from prometheus_client import generate_latest

    from nemo_rl_operator import metrics

    metrics.RECONCILES.labels("ok")
    metrics.API_CALLS.labels("GET", "jobs", "200")
    metrics.API_SECONDS.labels("GET")
    metrics.WATCH_EVENTS.labels("job", "ADDED")
    metrics.CACHE_OBJECTS.labels("job")
    metrics.JOBS.labels("Running")
    metrics.ATTEMPTS.labels("Error")
    metrics.PROGRESS_PULLS.labels("ok")
    return names_in(generate_latest(metrics.REGISTRY).decode())


def served_by_a_trainer() -> set[str]:
    metrics = TrainMetrics()
    metrics.begin(0, 10)
    metrics.saved(1)
    metrics.step_ended(1, {**dict.fromkeys(GAUGES, 1.0), "tokens": 8, "step_seconds": 0.5, "reward_errors": 0})
    return names_in(metrics.text().decode())


def names_in(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def dashboard_expressions() -> list[str]:
    board = json.loads((FILES / "dashboard.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return found + [v["definition"] for v in board["templating"]["list"] if "definition" in v]


def alert_expressions() -> list[str]:
    text = re.sub(r"\{\{.*?\}\}", "60", (FILES / "alerts.yaml").read_text())
    return [rule["expr"] for rule in yaml.safe_load(text)]


def test_every_metric_of_dashboard_and_alerts_exists():
    used = {name for e in dashboard_expressions() + alert_expressions() for name in METRIC.findall(e)} - LABELS
    assert len(used) > 30
    assert used <= served_by_the_operator() | served_by_a_trainer()


def test_every_metric_of_operator_and_trainer_is_on_the_dashboard():
    used = {name for e in dashboard_expressions() for name in METRIC.findall(e)}
    served = {n for n in served_by_the_operator() | served_by_a_trainer() if n.startswith("nemo_rl_")}
    shown = {n for n in served if n in used or re.sub(r"_(sum|count|bucket)$", "_bucket", n) in used}
    assert {n for n in served - shown if not n.endswith("_created")} == set()


def test_what_alerts_count_is_served_from_the_operators_start():
    """A counter that appears together with what it counts has not grown: the first failures would raise no alert."""
    from prometheus_client import generate_latest

    from nemo_rl.job.status import Cause
    from nemo_rl_operator import metrics

    families = text_string_to_metric_families(generate_latest(metrics.REGISTRY).decode())
    served = {(s.name, value) for f in families for s in f.samples for value in s.labels.values()}
    ended = {("nemo_rl_operator_attempts_ended_total", cause) for cause in ("Succeeded", *Cause)}
    looked_at = {("nemo_rl_operator_reconciles_total", result) for result in ("ok", "retry", "error")}
    assert ended | looked_at <= served


def test_causes_in_alerts_are_causes_of_attempts():
    from nemo_rl.job.status import Cause

    text = (FILES / "alerts.yaml").read_text()
    named = {cause for group in re.findall(r'cause=~?"([^"]+)"', text) for cause in group.split("|")}
    assert named
    assert named <= {cause.value for cause in Cause}


def test_panels_have_titles_of_their_own_and_do_not_overlap():
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    assert len({p["title"] for p in panels}) == len({p["id"] for p in panels}) == len(panels)
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
