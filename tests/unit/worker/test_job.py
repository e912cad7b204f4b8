"""The frozen job as a pod reads it: of another version of nemo-rl, and of somebody else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.worker import files
from nemo_rl.worker.digest import digest_argument
from nemo_rl.worker.job import read_job

SPEC: dict[str, Any] = {
    "model": "org/model",
    "dataset": {"inline": [{"prompt": "1", "answer": "2"}]},
    "reward": {"builtin": "exact_match"},
}


@pytest.fixture
def frozen(tmp_path: Path) -> Any:
    def write(**spec: Any) -> Path:
        path = tmp_path / "job.json"
        path.write_text(json.dumps({"metadata": {"name": "x", "namespace": "ns", "uid": "u"}, "spec": SPEC | spec}))
        return path

    return write


def test_fields_of_a_newer_operator_are_ignored_and_said_once(frozen: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = frozen(
        training={"maxSteps": 7, "fp8": True},
        novelty={"deep": 1},
        env=[{"name": "A", "value": "b", "scope": "all"}],
    )
    job = read_job(path)
    assert job.spec.training.max_steps == 7
    assert job.spec.env[0].name == "A"
    said = capsys.readouterr().err
    assert said.count("this trainer image does not know") == 1
    for field in ("spec.training.fp8", "spec.novelty", "spec.env.0.scope"):
        assert field in said


def test_one_rank_says_it_for_all(frozen: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    read_job(frozen(novelty=1))
    assert capsys.readouterr().err == ""


def test_a_known_field_with_a_wrong_value_is_an_error_in_words(frozen: Any) -> None:
    with pytest.raises(ValueError, match=r"does not fit this trainer image: training\.maxSteps"):
        read_job(frozen(training={"maxSteps": -1, "fp8": True}))


@pytest.mark.parametrize(("training", "rate"), [({}, 1e-6), ({"maxSteps": 7}, 1e-6), ({"learningRate": 3e-4}, 3e-4)])
def test_a_job_that_the_first_version_froze_goes_on_with_its_learning_rate(
    frozen: Any, training: dict[str, Any], rate: float
) -> None:
    job = read_job(frozen(algorithm="sft", reward=None, training=training))
    assert job.spec.training.learning_rate == rate


def test_the_content_that_the_operator_made_is_read(frozen: Any) -> None:
    path = frozen()
    assert read_job(path, hashlib.sha256(path.read_bytes()).hexdigest()).name == "x"


def test_another_content_is_refused_in_words(frozen: Any) -> None:
    digest = hashlib.sha256(frozen().read_bytes()).hexdigest()
    path = frozen(reward={"source": "def reward(prompt, response): return 1.0"})
    with pytest.raises(ValueError, match="the frozen job is not the one that the operator made") as refused:
        read_job(path, digest)
    assert digest[:16] in str(refused.value)
    assert "delete the job and that ConfigMap" in str(refused.value)


def test_the_digest_is_found_among_the_arguments() -> None:
    assert digest_argument(["--other", "--job-sha256=abc"]) == "abc"
    assert digest_argument([]) is None


def test_the_file_server_refuses_another_content(frozen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = frozen()
    monkeypatch.setenv("NEMO_RL_JOB_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert files.job_of(path) == ("x", None)
    path.write_text(path.read_text().replace('"x"', '"other"'))
    with pytest.raises(ValueError, match="not the one that the operator made"):
        files.job_of(path)
