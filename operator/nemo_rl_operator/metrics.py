"""Prometheus metrics of the operator. No label ever holds the name or uid of a job."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nemo_rl.job.status import Cause

REGISTRY = CollectorRegistry()
_PREFIX = "nemo_rl_operator"
_FAST = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)

RECONCILE_SECONDS = Histogram(
    f"{_PREFIX}_reconcile_seconds", "Time of one reconciliation.", buckets=_FAST, registry=REGISTRY
)
RECONCILES = Counter(f"{_PREFIX}_reconciles", "Reconciliations by result.", ["result"], registry=REGISTRY)
QUEUE_DEPTH = Gauge(f"{_PREFIX}_queue_depth", "Jobs that wait to be reconciled.", registry=REGISTRY)
QUEUE_SECONDS = Histogram(
    f"{_PREFIX}_queue_seconds",
    "Time from an event to the start of its reconciliation.",
    buckets=_FAST,
    registry=REGISTRY,
)
RETRIES = Counter(f"{_PREFIX}_retries", "Reconciliations that failed and are tried again.", registry=REGISTRY)
WATCH_EVENTS = Counter(f"{_PREFIX}_watch_events", "Events from the watches.", ["kind", "type"], registry=REGISTRY)
LAST_EVENT_AGE = Gauge(
    f"{_PREFIX}_last_event_age_seconds", "Time since the last event of any watch.", registry=REGISTRY
)
API_CALLS = Counter(f"{_PREFIX}_api_calls", "Calls to the API server.", ["verb", "resource", "code"], registry=REGISTRY)
API_SECONDS = Histogram(
    f"{_PREFIX}_api_seconds", "Time of calls to the API server.", ["verb"], buckets=_FAST, registry=REGISTRY
)
CACHE_OBJECTS = Gauge(f"{_PREFIX}_cache_objects", "Objects in the cache.", ["kind"], registry=REGISTRY)
GHOSTS = Counter(f"{_PREFIX}_ghosts_removed", "Objects that were gone without a word of the watch.", registry=REGISTRY)
JOBS = Gauge(f"{_PREFIX}_jobs", "Training jobs by phase.", ["phase"], registry=REGISTRY)
ATTEMPTS = Counter(f"{_PREFIX}_attempts_ended", "Attempts that ended, by cause.", ["cause"], registry=REGISTRY)
CONFLICTS = Counter(f"{_PREFIX}_conflicts", "Status writes that came too late.", registry=REGISTRY)
EVENTS_DROPPED = Counter(
    f"{_PREFIX}_events_dropped", "Kubernetes Events not posted, to spare the API.", registry=REGISTRY
)
PROGRESS_PULLS = Counter(f"{_PREFIX}_progress_pulls", "Reads of /progress by result.", ["result"], registry=REGISTRY)

# A counter that first appears when something has happened has not grown in Prometheus' eyes: what alerts count begins at 0.
for _result in ("ok", "retry", "error"):
    RECONCILES.labels(_result)
for _cause in ("Succeeded", *Cause):
    ATTEMPTS.labels(str(_cause))
for _result in ("ok", "unreachable", "invalid"):
    PROGRESS_PULLS.labels(_result)
