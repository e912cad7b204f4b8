"""Tries the reward before a job is submitted: loaded from its bundle in a fresh process, as the pod will load it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rl.backends.kubernetes.contents import Contents
from nemo_rl.backends.kubernetes.ship.check import write_files
from nemo_rl.errors import DatasetError, RewardError

_PROGRAM = """
import sys
sys.path.append(sys.argv[1])
from nemo_rl.backends.kubernetes.trial import answer
answer(sys.argv[2])
"""
_GRACE_SECONDS = 120.0


def try_reward(contents: Contents) -> list[str]:
    """Warnings about the reward; nothing is tried for an algorithm without one.

    Raises RewardError for a reward that fails on the first rows (unless on_reward_error says otherwise), TypeError for
    one that names columns which the data lacks.
    """
    spec = contents.spec.reward
    if spec is None:
        return []
    with tempfile.TemporaryDirectory(prefix="nemo-rl-trial-") as folder:
        if contents.reward is not None and contents.reward.files:
            write_files(contents.reward.files, Path(folder, "bundle"))
        task = {"reward": spec.model_dump(mode="json"), "rows": contents.rows}
        Path(folder, "task.json").write_text(json.dumps(task), encoding="utf-8")
        calls = 2 * (len(contents.rows) + 6)
        found = _run(folder, _GRACE_SECONDS + min(spec.timeout_seconds, 600.0) * calls)
    if found.get("missing"):
        # A name that is only in the image: what is not here cannot be tried here.
        return [f"the reward {spec.function} cannot be imported here, so it was not tried: {found['error']}"]
    if "error" in found:
        if found["kind"] in ("TypeError", "ValueError"):
            raise {"TypeError": TypeError, "ValueError": ValueError}[found["kind"]](found["error"])
        if found["kind"] == "DatasetError":
            raise DatasetError(found["error"])
        error = RewardError(found["error"], found.get("traceback", ""))
        if error.traceback:
            error.add_note(error.traceback.rstrip())
        raise error
    return list(found["warnings"])


def _run(folder: str, seconds: float) -> dict[str, Any]:
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, root, folder],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RewardError(
            f"the reward took more than {seconds:.0f} s on its first calls; lower reward_timeout"
        ) from None
    try:
        return dict(json.loads(Path(folder, "answer.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RewardError(f"trying the reward ended the process with {done.returncode}: {' '.join(last)}") from None


def answer(folder: str) -> None:
    """The other process: loads, scores, and writes its answer. Only JSON goes back."""
    task = json.loads(Path(folder, "task.json").read_text(encoding="utf-8"))
    try:
        found: dict[str, Any] = {"warnings": _score(task, Path(folder, "bundle"))}
    except Exception as error:
        kind = next(k.__name__ for k in type(error).__mro__ if k in (*_TOLD, Exception))
        missing = bool(task["reward"]["function"]) and "found no module" in str(error)
        trace = getattr(error, "traceback", "")
        found = {"error": str(error), "kind": kind, "traceback": trace, "missing": missing}
    Path(folder, "answer.json").write_text(json.dumps(found), encoding="utf-8")


_TOLD = (DatasetError, RewardError, TypeError, ValueError)


def _score(task: dict[str, Any], bundle: Path) -> list[str]:
    from nemo_rl.environments import RewardCall, RewardRunner, bind_rewards, load_reward, preflight
    from nemo_rl.job.spec import RewardSpec

    spec = RewardSpec.model_validate({name: value for name, value in task["reward"].items() if value is not None})
    reward = load_reward(spec, {spec.bundle: bundle} if spec.bundle else {})
    rows: Sequence[Any] = []
    if task["rows"]:
        from nemo_rl.data import to_prompt_rows

        rows, _ = to_prompt_rows(task["rows"])
    columns = sorted({column for row in rows for column in row.columns}) if rows else None
    rewards = bind_rewards(reward, spec.weights, columns)
    calls = [RewardCall(row.prompt, "", row.messages, row.columns, (0, 0, number)) for number, row in enumerate(rows)]
    with RewardRunner(rewards, timeout_seconds=spec.timeout_seconds, on_error=spec.on_error) as runner:
        return preflight(runner, calls, on_error=spec.on_error)
