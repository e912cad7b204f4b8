"""What `nemo-rl ps`, `logs` and `fetch` say of jobs that write to an object store."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_rl.cli import jobs
from nemo_rl.job.status import JobStatus

URI = "s3://bucket/results/maths/checkpoints/step-00000003-g1"


def job(name: str, output: dict[str, Any], best: str) -> Any:
    kept = {"best": best, "bestStep": 3, "latest": best, "latestStep": 3}
    status = {"phase": "Succeeded", "checkpoint": kept}
    resource = {"metadata": {"name": name}, "spec": {"algorithm": "sft", "model": "m", "output": output}}
    return SimpleNamespace(
        name=name,
        namespace="team",
        resource=resource | {"status": status},
        last_status=JobStatus.load(status),
        logs=lambda follow: iter(["step=1/1"]),
    )


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found = [
        job("maths", {"uri": "s3://bucket/results"}, URI),
        job("here", {}, "here/checkpoints/step-00000003"),
        job("forged", {"uri": "s3://bucket/results"}, "s3://elsewhere/x"),
    ]
    backend = SimpleNamespace(
        jobs=lambda namespace: found, attach=lambda name, namespace: next(j for j in found if j.name == name)
    )
    monkeypatch.setattr(jobs, "kubernetes_backend", lambda purpose: backend)
    return found


def test_ps_shows_where_checkpoints_are(cluster: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.ps(None, as_json=False) == 0
    lines = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert lines == {"NAME": "CHECKPOINT", "maths": URI, "here": "-", "forged": "-"}
    assert jobs.ps(None, as_json=True) == 0
    told = {one["name"]: one["checkpointUri"] for one in json.loads(capsys.readouterr().out)}
    assert told == {"maths": URI, "here": None, "forged": None}
    del cluster[0], cluster[1]
    assert jobs.ps(None, as_json=False) == 0
    assert "CHECKPOINT" not in capsys.readouterr().out


def test_logs_say_where_the_whole_log_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.logs("maths", None, follow=False, as_json=False) == 0
    found = capsys.readouterr()
    assert found.out == "step=1/1\n"
    assert "s3://bucket/results/maths/run.log" in found.err
    assert jobs.logs("here", None, follow=False, as_json=False) == 0
    assert "run.log" not in capsys.readouterr().err
