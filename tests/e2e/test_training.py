"""Manifests of each algorithm train a model in a pod, and the status tells of it all the way to the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.kubectl import Lines, Object, eventually
from e2e.scene import SECONDS, Scene, TrainingJob, metrics_of
from nemo_rl.job import names

STEPS = 60
PAUSE = 0.03
"""Seconds that the reward takes for a completion: steps that last long enough for the status to show several."""


class Trained:
    """A GRPO job that was followed from its manifest to its end."""

    def __init__(self, scene: Scene, table: Lines, job: TrainingJob, pod: Object, token: str) -> None:
        self.scene, self.table, self.job, self.pod, self.token = scene, table, job, pod, token


@pytest.fixture(scope="module")
def grpo(new_scene: Any) -> Iterator[Trained]:
    scene = new_scene("grpo")
    table = Lines(scene.kubectl, "get", names.SHORT_NAME, "--watch", again=True)
    job = scene.apply(scene.manifests.grpo("sort", steps=STEPS, pause=PAUSE))
    job.phase("Running")
    pod = job.pod()
    token = job.execute("ls", "/var/run/secrets", check=False)
    job.phase("Succeeded")
    yield Trained(scene, table, job, pod, token)
    table.close()


def test_a_grpo_job_passes_through_its_phases_in_order(grpo: Trained):
    assert grpo.job.phases == ["Starting", "Running", "Succeeded"]


def test_step_and_reward_advance_in_the_table_that_a_user_watches(grpo: Trained):
    eventually(
        lambda: any(f"{STEPS}/{STEPS}" in line for line in grpo.table.text), "the last step in the table", SECONDS
    )
    header, *rows = [re.split(r"\s{2,}", line) for line in grpo.table.text if "  " in line]
    columns = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header) and row != header]
    training = [row for row in columns if row["PHASE"] == "Running" and "/" in row["STEP"]]
    steps = [int(row["STEP"].split("/")[0]) for row in training]
    assert steps == sorted(steps) and len(set(steps)) >= 2, grpo.table.text
    assert len({row["SCORE"] for row in training}) >= 2, grpo.table.text


def test_a_finished_job_says_so_with_its_result_and_its_best_checkpoint(grpo: Trained):
    status = grpo.job.status
    conditions = {c["type"]: c["status"] for c in status["conditions"]}
    assert (conditions["Complete"], conditions["Finished"], conditions.get("Failed")) == ("True", "True", None)
    assert status["result"]["totalSteps"] == STEPS
    assert 0 <= float(status["result"]["metrics"]["reward"]) <= 1
    assert status["checkpoint"]["latestStep"] == STEPS
    assert status["checkpoint"]["best"].startswith("sort/")
    assert status["checkpoint"]["bestMetric"].startswith("reward=")
    assert [a["cause"] for a in status["attempts"]] == ["Succeeded"]


def test_the_checkpoint_on_the_claim_loads_as_a_transformers_model(grpo: Trained, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = grpo.job.read_output(tmp_path)
    best = tmp_path / grpo.job.status["checkpoint"]["best"]
    model = AutoModelForCausalLM.from_pretrained(best)
    tokens = AutoTokenizer.from_pretrained(best)("321=", return_tensors="pt")
    assert torch.isfinite(model(input_ids=tokens["input_ids"]).logits).all()
    records = metrics_of(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert float(grpo.job.status["result"]["metrics"]["reward"]) == pytest.approx(records[-1]["reward"], rel=1e-4)


def test_trainer_pods_hold_no_token_and_keep_to_the_restricted_level(grpo: Trained):
    assert "No such file" in grpo.token
    assert grpo.pod["spec"]["automountServiceAccountToken"] is False
    volumes = [name for volume in grpo.pod["spec"]["volumes"] for name in volume]
    assert "projected" not in volumes or all(
        "serviceAccountToken" not in source
        for volume in grpo.pod["spec"]["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
    )
    # the namespace enforces the level: it would have refused the pod otherwise
    privileged = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "root"},
        "spec": {"containers": [{"name": "root", "image": grpo.pod["spec"]["containers"][0]["image"]}]},
    }
    with pytest.raises(AssertionError, match="violates PodSecurity"):
        grpo.scene.kubectl.apply(privileged)


@pytest.fixture(scope="module")
def supervised(new_scene: Any) -> dict[str, TrainingJob]:
    """An SFT and a DPO job that were applied at the same time; the first is deleted some time after its end."""
    scene = new_scene("supervised")
    return {
        "sft": scene.apply(scene.manifests.sft("sft", steps=20)),
        "dpo": scene.apply(scene.manifests.dpo("dpo", steps=20)),
    }


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_sft_and_dpo_manifests_train_too(supervised: dict[str, TrainingJob], algorithm: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    job = supervised[algorithm]
    status = job.phase("Succeeded")
    run = job.read_output(tmp_path)
    losses = [record["loss"] for record in metrics_of(run)]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
    assert status["result"]["metrics"]["loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / status["checkpoint"]["best"])


def test_a_job_with_a_ttl_deletes_itself_and_keeps_its_claim(scene: Scene):
    job = scene.apply(scene.manifests.sft("short", steps=1, ttlSecondsAfterFinished=2))
    job.phase("Succeeded")
    job.gone()
    eventually(lambda: not job.pods(), "the pods went with the job", SECONDS)
    claim = scene.kubectl.json("pvc", names.output_claim("short"))
    assert claim["status"]["phase"] == "Bound"
    assert "deletionTimestamp" not in claim["metadata"]
