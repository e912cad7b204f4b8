"""Whether a job on the cluster is this call's own: by what it says it computes, not by a label that anybody can write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.backends.kubernetes.errors import ApiError, JobNotFound
from nemo_rl.backends.kubernetes.job import Job
from nemo_rl.backends.kubernetes.naming import LABEL_DIGEST, spec_digest
from nemo_rl.backends.kubernetes.outputs import build_result
from nemo_rl.backends.kubernetes.submit import same_content
from nemo_rl.job import names
from nemo_rl.job.spec import RLTrainingJobSpec

MINE: dict[str, Any] = {"model": "org/m", "dataset": {"name": "org/rows"}, "reward": {"builtin": "exact_match"}}
DIGEST = spec_digest(RLTrainingJobSpec.model_validate(MINE))


class Served:
    """A cluster whose definition has two fields that this version does not know, with defaults."""

    namespace = "ns"

    def request(self, verb: str, path: str, *more: Any, **query: Any) -> Any:
        if path != f"/openapi/v3/apis/{names.API_VERSION}":
            raise ApiError(404, "NotFound", path)
        training = {"properties": {"fp8": {"type": "boolean", "default": False}}}
        novelty = {"default": {}, "properties": {"deep": {"type": "integer", "default": 1}}}
        spec = {"properties": {"training": training, "novelty": novelty}}
        kinds = [{"group": names.GROUP, "kind": names.KIND, "version": names.VERSION}]
        schema = {"properties": {"spec": spec}, "x-kubernetes-group-version-kind": kinds}
        return {"components": {"schemas": {"other": {}, "io.nemo-rl.RLTrainingJob": schema}}}


def job(**spec: Any) -> dict[str, Any]:
    meta = {"name": "x", "namespace": "ns", "uid": "u", "labels": {LABEL_DIGEST: DIGEST}}
    return {"metadata": meta, "spec": MINE | spec, "status": {"phase": "Succeeded"}}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "evil/model"},
        {"algorithm": "sft", "reward": None},
        {"training": {"trustRemoteCode": True}},
        {"reward": {"source": "def reward(prompt, response): return 1.0"}},
        {"image": "evil:1"},
        {"env": [{"name": "LD_PRELOAD", "value": "/evil.so"}]},
        {"training": {"fp8": True}},
        {"novelty": {"deep": 2}},
        {"novelty": {"deep": 1, "code": "evil"}},
        {"model": 3},
    ],
)
def test_a_strangers_job_with_my_label_is_not_mine(change: dict[str, Any]) -> None:
    assert not same_content(Served(), job(**change), DIGEST)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"training": {"seed": 42}},
        {"suspend": False, "backoffLimit": 9},
        {"training": {"fp8": False}},
        {"novelty": {"deep": 1}, "training": {"fp8": False}},
    ],
)
def test_a_job_that_computes_the_same_is_mine(change: dict[str, Any]) -> None:
    """Also with defaults that a newer definition filled in."""
    assert same_content(Served(), job(**change), DIGEST)  # type: ignore[arg-type]


def evil_checkpoint(folder: Path, marker: Path) -> Path:
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    config = {"model_type": "evil", "architectures": ["EvilModel"]}
    config |= {"auto_map": {"AutoConfig": "code.EvilConfig", "AutoModelForCausalLM": "code.EvilModel"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "code.py").write_text(
        f"open({str(marker)!r}, 'w').write('ran')\n"
        "from transformers import PretrainedConfig, PreTrainedModel\n"
        "class EvilConfig(PretrainedConfig):\n    model_type = 'evil'\n"
        "class EvilModel(PreTrainedModel):\n    config_class = EvilConfig\n"
    )
    return checkpoint


def test_a_job_that_trusts_its_code_does_not_make_this_machine_run_it(tmp_path: Path) -> None:
    checkpoint = evil_checkpoint(tmp_path / "out", tmp_path / "ran")
    result = build_result(job(training={"trustRemoteCode": True}), tmp_path / "out", checkpoint)
    with pytest.raises(Exception, match="trust_remote_code"):
        _ = result.trainer
    assert not (tmp_path / "ran").exists()


def test_news_of_another_job_of_the_name_is_not_this_jobs() -> None:
    handle = Job(Served(), job())  # type: ignore[arg-type]
    other = job()
    other["metadata"]["uid"] = "evil"
    with pytest.raises(JobNotFound, match="was deleted, and another has its name now"):
        handle._see(other)
