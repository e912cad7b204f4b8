"""Experiment trackers that see each step's metrics: Weights & Biases, MLflow and Trackio, with or without a network.

Where and as whom they log is theirs to say, by their own environment variables (WANDB_MODE, WANDB_PROJECT,
MLFLOW_TRACKING_URI, TRACKIO_DIR and so on). What fails while a run is on ends the tracking, never the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from nemo_rl.extras import require
from nemo_rl.run.directory import RUN_FILE
from nemo_rl.run.metrics import plain

PROJECT = "nemo-rl"
"""Name of the project or experiment, where the tracker's own variable names none."""
_LONGEST_VALUE = 500
"""Characters of a setting: MLflow takes no more."""
State = Literal["finished", "stopped", "failed"]


class Tracker(Protocol):
    """One tracker of one run. `place` says in words where the run is seen."""

    place: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's numbers."""

    def close(self, state: State) -> None:
        """The run has ended in this way; what is on its way is sent."""


class Trackers:
    """The trackers of a run. One that fails is told of once, and left out from then on."""

    def __init__(self, trackers: dict[str, Tracker], note: Callable[[str], None]) -> None:
        self._trackers, self._note = trackers, note
        for name, tracker in trackers.items():
            note(f"{name}: {tracker.place}")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Gives the numbers of a step to each tracker; what is not finite is left out."""
        numbers = {name: _number(value) for name, value in metrics.items() if name != "step"}
        known = {name: value for name, value in numbers.items() if value is not None}
        self._each(lambda tracker: tracker.log(int(metrics["step"]), known))

    def close(self, state: State) -> None:
        self._each(lambda tracker: tracker.close(state))
        self._trackers = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # of whatever kind: training is worth more than its curves
                del self._trackers[name]
                self._note(
                    f"{name} does not take this run's metrics any more ({type(error).__name__}: {error}); the run goes on"
                )


def open_trackers(
    names: Sequence[str], run_dir: Path, settings: Mapping[str, Any], note: Callable[[str], None]
) -> Trackers:
    """Opens the run in each tracker, or goes on with it where it was opened before.

    `settings` are told with the run. Raises MissingPackage where a package is not there, ValueError where a tracker refuses, for
    example for want of a login.
    """
    key, opened = _key(run_dir), {}
    for name in names:
        require(f"report_to={name!r}", name)
        try:
            opened[name] = _KINDS[name](run_dir, key, flat_settings(settings))
        except Exception as error:
            raise ValueError(
                f"report_to={name!r}: {name} cannot be used: {type(error).__name__}: {error}; {_CURES[name]}, or leave report_to out"
            ) from error
    return Trackers(opened, note)


def _key(run_dir: Path) -> str:
    """What a run is called by everywhere: the same when it goes on, another one for any other run."""
    try:
        record = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
        about = [run_dir.name, record.get("started"), record.get("sha256")]
    except (OSError, ValueError):
        about = [str(run_dir)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


class _WandB:
    def __init__(self, run_dir: Path, key: str, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=key,
            resume="allow",
            config=settings,
            dir=str(run_dir),
            settings=wandb.Settings(silent=True),
        )
        self.place = str(self._run.url or self._run.dir)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, state: State) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)


class _MLflow:
    _STATES: Mapping[State, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    _TAG = "nemo_rl.run"

    def __init__(self, run_dir: Path, key: str, settings: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        given = os.environ.get("MLFLOW_TRACKING_URI")
        if given is None:
            # files in the run's folder: MLflow's own default is a database, which this package may have no driver for
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self.place = given or (run_dir / "mlruns").resolve().as_uri()
        self._client, self._metric = MlflowClient(self.place), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        found = self._client.search_runs([where], f"tags.`{self._TAG}` = '{key}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(where, tags={self._TAG: key}, run_name=run_dir.name)
        self._id = made.info.run_id
        params = [Param(name, str(value)[:_LONGEST_VALUE]) for name, value in settings.items()]
        self._client.log_batch(self._id, params=params)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(n, value, now, step) for n, value in metrics.items()])

    def close(self, state: State) -> None:
        self._client.set_terminated(self._id, self._STATES[state])


class _Trackio:
    def __init__(self, run_dir: Path, key: str, settings: dict[str, Any]) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{run_dir.name}-{key[:6]}"
        self._run = trackio.init(project=project, name=name, config=settings, resume="allow", embed=False)
        self.place = f"run {name} of project {project}; trackio show --project {project}"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, state: State) -> None:
        self._run.finish()


_KINDS: Mapping[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
_CURES = {
    "wandb": "log in by wandb login or WANDB_API_KEY, or set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI",
    "trackio": "check TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL",
}


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by names with points; what is not a number or a text as JSON."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat_settings(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, int | float | str)
            found[f"{prefix}{name}"] = value if plain else json.dumps(value, ensure_ascii=False)
    return found


def _number(value: Any) -> float | None:
    found = plain(value)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
