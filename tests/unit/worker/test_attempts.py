"""Attempts of real jobs, each in a process of its own: what they report, how they end, and what the next one finds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.backends.kubernetes.ship.capture import capture
from nemo_rl.backends.kubernetes.ship.data import ship_directory, ship_rows
from nemo_rl.job import names
from nemo_rl.job.names import ExitCode
from nemo_rl.job.status import Progress
from nemo_rl.run.metrics import parse_step_line
from unit.fake_hub import serve_hub
from unit.worker import shipped
from unit.worker.pods import Engine, Pod, mount, surroundings, until

MANY_WORDS = (
    "def reward(prompt: str, response: str, most: int) -> float:\n    return len(set(response.split())) / most\n"
)
PROMPTS = [{"prompt": f"{i} +", "most": 4} for i in range(8)]
TEXTS = [{"prompt": f"{i} +", "completion": "yes"} for i in range(8)]


def grpo(model: Path | str, **training: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "algorithm": "grpo",
        "dataset": {"inline": PROMPTS},
        "reward": {"source": MANY_WORDS},
        "callbacks": [{"function": "pod_callbacks:Gate"}],
        "grpo": {"numGenerationsPerPrompt": 4, "maxNewTokens": 4},
        "training": {"maxSteps": 6, "maxEpochs": 9, "batchSize": 4, "learningRate": 0.01, "saveEvery": 4, **training},
    }


def sft(model: Path | str, **changes: Any) -> dict[str, Any]:
    training = {"maxSteps": 4, "maxEpochs": 9, "batchSize": 4, "learningRate": 0.01, "saveEvery": 2}
    return {"model": str(model), "algorithm": "sft", "dataset": {"inline": TEXTS}, "training": training, **changes}


# --- one job, watched


def test_a_job_reports_while_it_trains_and_ends_with_its_result(engine: Engine, tiny_model: Path, tmp_path: Path):
    spec = sft(tiny_model, callbacks=[{"function": "pod_callbacks:Gate"}], terminationGracePeriodSeconds=4)
    pod = Pod(tmp_path, engine, spec).start(HOLD_AT="3")
    pod.wait_at_gate()
    served = json.loads(pod.get("/progress"))
    progress = Progress.model_validate(served)
    assert (progress.step, progress.total_steps, progress.text, progress.percent) == (3, 4, "3/4", 75)
    assert float(progress.metrics["loss"]) > 0
    assert progress.seconds_remaining is not None
    assert progress.eta
    assert served["checkpoint"] == {
        "latest": "yes/checkpoints/step-00000002",
        "latestStep": 2,
        "best": "yes/checkpoints/step-00000002",
        "bestStep": 2,
    }
    assert pod.get("/healthz").startswith("ok: training, step 3")
    _check_metrics(pod.get("/metrics"))
    pod.open_gate()
    assert pod.end() == ExitCode.DONE
    word = pod.word()
    assert (word.kind, word.total_steps, word.exit_code) == ("result", 4, None)
    assert word.checkpoint is not None
    assert word.checkpoint.latest == "yes/checkpoints/step-00000004"
    assert "loss" in word.metrics
    steps = [row["step"] for line in pod.said().splitlines() if (row := parse_step_line(line))]
    assert steps == [1, 2, 3, 4]
    _check_startup_line(pod.said())
    assert "warning: a checkpoint will take" in pod.said()
    assert "but a stopped pod has only 4s" in pod.said()


def _check_metrics(text: str) -> None:
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["nemo_rl_train_step"]) == 3
    assert float(values["nemo_rl_train_total_steps"]) == 4
    assert float(values["nemo_rl_train_checkpoint_step"]) == 2
    assert float(values["nemo_rl_train_loss"]) > 0
    assert float(values["nemo_rl_train_tokens_total"]) > 0
    assert float(values['nemo_rl_train_seconds_total{part="step"}']) > 0
    assert float(values["nemo_rl_train_reward_errors_total"]) == 0
    assert "nemo_rl_train_reward" not in values  # supervised training has none
    assert float(values["process_resident_memory_bytes"]) > 0
    assert '"yes"' not in text  # the job's name


def _check_startup_line(said: str) -> None:
    line = next(line for line in said.splitlines() if line.startswith("phase "))
    parts = dict(part.split("=") for part in line.split()[1:])
    assert list(parts) == ["imports", "data", "model", "start", "first_step"]
    assert all(float(seconds) >= 0 for seconds in parts.values())


# --- stopped, and gone on


@pytest.fixture(scope="session")
def unbroken(engine: Engine, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Pod:
    pod = Pod(tmp_path_factory.mktemp("unbroken"), engine, grpo(tiny_model))
    assert pod.run() == ExitCode.DONE, pod.said()
    return pod


def test_grpo_with_an_inline_reward_reports_the_best_checkpoint(unbroken: Pod):
    word = unbroken.word()
    assert word.checkpoint is not None
    assert word.checkpoint.best_metric is not None
    assert word.checkpoint.best_metric.startswith("reward=")
    assert 0 < float(word.metrics["reward"]) <= 1
    assert any(row["grad_norm"] > 0 for row in unbroken.history())


@pytest.mark.parametrize("step", [2, 3], ids=["after an epoch", "within an epoch"])
def test_sigterm_saves_and_the_next_attempt_equals_an_unbroken_run(
    engine: Engine, tiny_model: Path, tmp_path: Path, unbroken: Pod, step: int
):
    pod = Pod(tmp_path, engine, grpo(tiny_model)).start(HOLD_AT=str(step))
    pod.wait_at_gate()
    pod.stop()
    pod.open_gate()
    assert pod.end() == ExitCode.PREEMPTED
    word = pod.word()
    assert (word.kind, word.cause, word.exit_code, word.total_steps) == ("failure", "Preempted", 75, step)
    assert word.checkpoint is not None
    assert word.checkpoint.latest_step == step
    assert word.traceback is None

    assert pod.run() == ExitCode.DONE, pod.said()
    assert f"going on after step {step}" in pod.said()
    assert pod.word().total_steps == 6
    assert pod.history() == unbroken.history()
    weights = "checkpoints/step-00000006/model.safetensors"
    assert (pod.output / weights).read_bytes() == (unbroken.output / weights).read_bytes()


def test_progress_of_the_next_attempt_never_falls_back_to_zero(engine: Engine, tiny_model: Path, tmp_path: Path):
    from nemo_rl.worker.run import _step_to_go_on_from

    pod = Pod(tmp_path, engine, grpo(tiny_model)).start(HOLD_AT="5")
    pod.wait_at_gate()
    pod.stop()
    assert _step_to_go_on_from(pod.output, "auto") == 4  # saved before step 5
    assert _step_to_go_on_from(pod.output, "never") == 0
    pod.open_gate()
    assert pod.end() == ExitCode.PREEMPTED
    assert _step_to_go_on_from(pod.output, "auto") == 5


def test_an_attempt_after_success_repeats_the_result_and_trains_nothing(
    unbroken: Pod, engine: Engine, tiny_model: Path
):
    word, written = unbroken.word(), (unbroken.output / "run.json").stat().st_mtime_ns
    assert unbroken.run() == ExitCode.DONE
    assert unbroken.word() == word
    assert "an earlier attempt finished this job after 6 steps" in unbroken.said()
    assert (unbroken.output / "run.json").stat().st_mtime_ns == written


def test_a_job_uploads_its_best_checkpoint_and_an_attempt_after_success_only_that(
    engine: Engine, tiny_model: Path, tmp_path: Path
):
    pod = Pod(tmp_path, engine, sft(tiny_model, output={"hub": "team/tiny"}))
    with serve_hub() as hub:
        there = {"HF_ENDPOINT": hub.endpoint}
        assert pod.run(**there) == ExitCode.USER_ERROR
        assert "there is no token" in (pod.word().message or "")
        assert not pod.output.exists()
        assert pod.run(**there, HF_TOKEN="hf_secret") == ExitCode.DONE, pod.said()
        assert f"nemo-rl: uploaded to {hub.endpoint}/me/tiny" in pod.said()
        best = pod.path(names.OUTPUT_DIR) / str(pod.word().checkpoint.best)
        assert hub.files["model.safetensors"] == (best / "model.safetensors").read_bytes()
        assert hub.tokens == {"Bearer hf_secret"}
        assert "hf_secret" not in pod.said()
        written = (pod.output / "run.json").stat().st_mtime_ns
        # the first upload was cut off, or the hub was away: training is not repeated
        hub.files.clear()
        assert pod.run(**there, HF_TOKEN="hf_secret") == ExitCode.DONE, pod.said()
        assert "an earlier attempt finished this job after 4 steps" in pod.said()
        assert hub.files["model.safetensors"] == (best / "model.safetensors").read_bytes()
        assert (pod.output / "run.json").stat().st_mtime_ns == written


def test_a_new_job_of_the_same_name_trains_anew_beside_the_old_run(engine: Engine, tiny_model: Path, tmp_path: Path):
    assert Pod(tmp_path, engine, sft(tiny_model), uid="first").run() == ExitCode.DONE
    second = Pod(tmp_path, engine, sft(tiny_model), uid="second")
    assert second.run() == ExitCode.DONE
    assert second.word().checkpoint.best.startswith("yes/run-2/checkpoints/")
    assert (second.output / "run-2" / "metrics.jsonl").read_text().count("\n") == 4
    assert len(second.history()) == 4, "the first job's record is as it was"


def test_sigterm_during_the_start_ends_at_once_and_says_so(engine: Engine, tmp_path: Path, tiny_model: Path):
    pod = Pod(tmp_path, engine, sft(tiny_model))
    pod.path(names.TERMINATION_LOG).touch()
    process = subprocess.Popen(
        [sys.executable, "-m", names.WORKER_MODULE],
        env=surroundings() | pod.environment(),
        stdout=pod.log.open("w"),
        stderr=subprocess.STDOUT,
    )
    assert json.loads(pod.get("/progress")) == {"step": 0, "text": "importing", "metrics": {}}
    assert pod.get("/healthz").startswith("ok: importing")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == ExitCode.PREEMPTED
    assert "before training" in (pod.word().message or "")


# --- failures


def failed(pod: Pod, code: int, cause: str) -> Any:
    """Runs the pod to its failure and returns the word."""
    assert pod.run() == code, pod.said()
    word = pod.word()
    assert (word.kind, word.exit_code, word.cause) == ("failure", code, cause)
    assert len((word.traceback or "").splitlines()) <= 20
    return word


def test_a_reward_that_raises_ends_the_job_with_its_own_line(engine: Engine, tiny_model: Path, tmp_path: Path):
    source = "def reward(prompt, response):\n    scores = {}\n    return scores['missing']  # here\n"
    word = failed(Pod(tmp_path, engine, {**grpo(tiny_model), "reward": {"source": source}}), 40, "UserError")
    assert "KeyError" in word.message
    assert "line 3, in reward" in word.traceback
    assert "return scores['missing']  # here" in word.traceback


def test_a_callback_that_raises_ends_the_job_with_its_own_line(engine: Engine, tiny_model: Path, tmp_path: Path):
    pod = Pod(tmp_path, engine, sft(tiny_model, callbacks=[{"function": "pod_callbacks:Broken"}]))
    word = failed(pod, 40, "UserError")
    assert "print(metrics[" in word.traceback
    assert "in callback Broken.on_step_end" in word.traceback
    assert word.total_steps == 1


def test_memory_that_runs_out_is_told_apart_and_may_be_tried_again(engine: Engine, tiny_model: Path, tmp_path: Path):
    pod = Pod(tmp_path, engine, sft(tiny_model, callbacks=[{"function": "pod_callbacks:Hungry"}]))
    word = failed(pod, 1, "OutOfMemory")
    assert "tokensPerMicrobatch" in word.message


def test_data_of_the_wrong_shape_is_refused_with_its_columns(engine: Engine, tiny_model: Path, tmp_path: Path):
    word = failed(Pod(tmp_path, engine, sft(tiny_model, dataset={"inline": [{"colour": "red"}]})), 41, "BadData")
    assert "'colour'" in word.message


def test_a_file_that_the_claim_lacks_is_bad_data_with_what_is_there(engine: Engine, tiny_model: Path, tmp_path: Path):
    pod = Pod(tmp_path, engine, sft(tiny_model, dataset={"path": "pvc://data/sets/rows.jsonl"}))
    folder = pod.path(names.CLAIMS_DIR) / "data" / "sets"
    folder.mkdir(parents=True)
    (folder / "other.jsonl").touch()
    word = failed(pod, 41, "BadData")
    assert "pvc://data/sets/rows.jsonl" in word.message
    assert "other.jsonl" in word.message


def test_weights_that_are_not_numbers_end_the_job_as_non_finite(engine: Engine, tiny_model: Path, tmp_path: Path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    spec = sft(broken)
    spec["training"]["maxSteps"] = 8
    word = failed(Pod(tmp_path, engine, spec), 42, "NonFiniteTraining")
    assert "NaN" in word.message


def test_a_field_that_this_image_does_not_know_is_said_once_and_left_out(
    engine: Engine, tiny_model: Path, tmp_path: Path
):
    pod = Pod(tmp_path, engine, sft(tiny_model))
    job = json.loads(pod.path(names.JOB_FILE).read_text())
    job["spec"]["training"]["fromTheFuture"] = 1
    pod.path(names.JOB_FILE).write_text(json.dumps(job))
    assert pod.run() == ExitCode.DONE, pod.said()
    assert pod.said().count("this trainer image does not know spec.training.fromTheFuture, and trains without") == 1
    assert pod.word().total_steps == 4


# --- what the client ships


def test_code_rows_and_model_that_the_client_ships_train(engine: Engine, tiny_model: Path, tmp_path: Path):
    rows, model = ship_rows(PROMPTS), ship_directory(tiny_model)
    bundles = [mount(tmp_path, "rows", rows.archive), mount(tmp_path, "model", model.archive)]
    entries = {}
    for name, value in (("reward", shipped.many_words), ("callback", shipped.Counting(start=10))):
        found = capture(value, name)
        bundles.append(mount(tmp_path, name, found.archive, found.python))
        entries[name] = {"bundle": name, "entrypoint": found.entrypoint}
    spec = grpo(model.uri("model"), maxSteps=2)
    spec |= {"dataset": {"path": rows.uri("rows")}, "bundles": bundles}
    spec |= {"reward": entries["reward"], "callbacks": [entries["callback"]]}
    pod = Pod(tmp_path, engine, spec)
    assert pod.run() == ExitCode.DONE, pod.said()
    assert "counted 12" in pod.said()
    assert float(pod.word().metrics["reward"]) > 0


def test_rows_on_a_claim_are_found_and_decide_which_checkpoint_is_best(
    engine: Engine, tiny_model: Path, tmp_path: Path
):
    reference = {"path": "pvc://data/rows.jsonl"}
    pod = Pod(tmp_path, engine, sft(tiny_model, dataset=reference, validationDataset=reference))
    claim = pod.path(names.CLAIMS_DIR) / "data"
    claim.mkdir(parents=True)
    (claim / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    assert pod.run() == ExitCode.DONE, pod.said()
    checkpoint = pod.word().checkpoint
    assert checkpoint is not None
    assert checkpoint.best_metric is not None
    assert checkpoint.best_metric.startswith("validation_loss=")


def test_a_changed_bundle_is_refused_before_anything_is_unpacked(engine: Engine, tiny_model: Path, tmp_path: Path):
    rows = ship_rows(TEXTS)
    entry = mount(tmp_path, "rows", rows.archive)
    part = tmp_path / names.BUNDLE_DIR.lstrip("/") / "rows" / names.bundle_part(0)
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    pod = Pod(tmp_path, engine, sft(tiny_model, dataset={"path": rows.uri("rows")}, bundles=[entry]))
    word = failed(pod, 40, "UserError")
    assert entry["sha256"] in word.message
    assert not list((tmp_path / "tmp").rglob("*.jsonl"))


# --- one of several processes


def test_the_first_failure_in_a_pod_is_the_one_that_is_told(engine: Engine, tiny_model: Path, tmp_path: Path):
    pod = Pod(tmp_path, engine, sft(tiny_model, dataset={"inline": [{"colour": "red"}]})).start()
    assert pod.end() == ExitCode.BAD_DATA
    first = pod.word()
    pod.pid = pod.engine.start(pod.log, pod.environment(RANK="1", NEMO_RL_POD_ROOT=str(_with_other_job(pod))))
    assert pod.end() != ExitCode.DONE
    assert pod.word() == first


def _with_other_job(pod: Pod) -> Path:
    """The same pod for another process, which fails for a reason of its own."""
    pod.path(names.JOB_FILE).write_text("{}")
    return pod.root


def test_a_taken_port_does_not_keep_a_job_from_training(engine: Engine, tiny_model: Path, tmp_path: Path):
    import socket

    with socket.create_server(("", 0)) as taken:
        pod = Pod(tmp_path, engine, sft(tiny_model))
        assert pod.run(NEMO_RL_POD_PORT=str(taken.getsockname()[1])) == ExitCode.DONE
    assert "no progress will be served" in pod.said()
    until(lambda: pod.word().kind == "result", "the result")
