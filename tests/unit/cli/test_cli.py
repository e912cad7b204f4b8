"""The command line: its help, its errors and exit codes, through typer's runner and as a process."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from nemo_rl import backends
from nemo_rl.api.result import TrainResult
from nemo_rl.backends import Run, local
from nemo_rl.cli.main import app
from nemo_rl.errors import DatasetError, NonFiniteTraining, RewardError, TrainingInterrupted
from nemo_rl.extras import install_command
from nemo_rl.job.names import ExitCode

JOB = """\
apiVersion: nemo-rl.io/v1alpha1
kind: RLTrainingJob
metadata: {name: sums}
spec:
  model: org/model
  dataset: {inline: [{prompt: "1+1=", answer: "2"}]}
  reward: {builtin: exact_match}
  training: {maxSteps: 3}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEMO_RL_BACKEND", raising=False)
    monkeypatch.setattr(backends, "cluster_context", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def nemo_rl(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _ending(monkeypatch: pytest.MonkeyPatch, ending: BaseException | TrainResult) -> list[Run]:
    """Lets the local backend end like this; returns the runs that it gets."""
    runs: list[Run] = []

    def run(run: Run) -> TrainResult:
        runs.append(run)
        if isinstance(ending, BaseException):
            raise ending
        return ending

    monkeypatch.setattr(local, "run", run)
    return runs


# --- train


def test_a_job_is_trained_into_a_folder_of_its_name(job: Path, monkeypatch: pytest.MonkeyPatch):
    runs = _ending(monkeypatch, TrainResult(total_steps=3, checkpoint_path="outputs/sums/best"))
    result = nemo_rl("train", job, "--set", "training.maxSteps=5", "--set", "training.seed=7")
    assert result.exit_code == 0, result.output
    (run,) = runs
    assert (run.name, run.output_dir) == ("sums", Path("outputs/sums"))
    assert (run.spec.training.max_steps, run.spec.training.seed) == (5, 7)
    assert "on this machine (no Kubernetes context here)" in result.output
    assert "done after 3 steps; checkpoint in outputs/sums/best" in result.output


def test_the_output_folder_and_backend_can_be_given(job: Path, monkeypatch: pytest.MonkeyPatch):
    runs = _ending(monkeypatch, TrainResult())
    result = nemo_rl("train", job, "--output-dir", "elsewhere", "--backend", "local")
    assert result.exit_code == 0
    assert runs[0].output_dir == Path("elsewhere")
    assert "(asked for)" in result.output


def test_quiet_log_levels_print_nothing(job: Path, monkeypatch: pytest.MonkeyPatch):
    _ending(monkeypatch, TrainResult())
    assert nemo_rl("train", job, "--log-level", "error").output == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (TrainingInterrupted("saved step 7", "x/step-7", 7), ExitCode.PREEMPTED, "saved step 7"),
        (DatasetError("no rows"), ExitCode.BAD_DATA, "no rows"),
        (RewardError("it raised", "File you.py, line 3"), ExitCode.USER_ERROR, "File you.py, line 3"),
        (ValueError("no folder"), ExitCode.USER_ERROR, "no folder"),
        (TypeError("no argument answer"), ExitCode.USER_ERROR, "no argument answer"),
        (NonFiniteTraining("loss is NaN"), ExitCode.NON_FINITE, "loss is NaN"),
        (OSError("disk full"), 1, "disk full"),
        (ZeroDivisionError("division by zero"), 1, "this is a ZeroDivisionError; --log-level debug shows where"),
        (AssertionError(), 1, "AssertionError"),
    ],
)
def test_every_ending_has_its_exit_code_and_message(
    job: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
):
    _ending(monkeypatch, error)
    result = nemo_rl("train", job)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(job: Path, monkeypatch: pytest.MonkeyPatch):
    _ending(monkeypatch, ZeroDivisionError("division by zero"))
    result = nemo_rl("train", job, "--log-level", "debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "missing.yaml: cannot be read"),
        (["job.yaml", "--set", "training.maxStep=1"], "did you mean maxSteps?"),
        (["job.yaml", "--backend", "slurm"], "slurm"),
        (["job.yaml", "--log-level", "loud"], "loud"),
        (["job.yaml", "--nonsense"], "--nonsense"),
        ([], "JOB.yaml"),
    ],
)
def test_a_wrong_file_or_option_exits_with_2(job: Path, arguments: list[str], message: str):
    result = nemo_rl("train", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_asking_for_the_cluster_without_its_backend_says_so(job: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_has_kubernetes_backend", lambda: False)
    result = nemo_rl("train", job, "--backend", "kubernetes")
    assert result.exit_code == 1
    assert "needs the kubernetes backend" in result.stderr


def test_a_dry_run_prints_the_job_with_its_overrides_and_trains_nothing(job: Path, monkeypatch: pytest.MonkeyPatch):
    runs = _ending(monkeypatch, TrainResult())
    result = nemo_rl("train", job, "--dry-run", "--set", "training.maxSteps=5", "--log-level", "debug")
    assert result.exit_code == 0
    assert runs == []
    printed = yaml.safe_load(result.output)
    assert printed["spec"]["training"] == {"maxSteps": 5, "logLevel": "debug"}
    assert printed["metadata"] == {"name": "sums"}


SOURCE = "  reward:\n    source: |\n      def reward(prompt, response):\n          return 1.0\n"


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("reward(prompt", "reward((prompt", ExitCode.USER_ERROR, ["inline source of the reward", "SyntaxError"]),
        ("def reward(", "def score(", ExitCode.USER_ERROR, ["defines no 'reward'", "found score"]),
        ('prompt: "1+1="', 'colour: "red"', ExitCode.BAD_DATA, ["'colour'", "prompt"]),
        ('inline: [{prompt: "1+1=", answer: "2"}]', "path: ./rows.jsonl", ExitCode.BAD_DATA, ["rows.jsonl", "line 2"]),
        ('inline: [{prompt: "1+1=", answer: "2"}]', "path: ./none.jsonl", ExitCode.BAD_DATA, ["none.jsonl", "not a file"]),
        ("model: org/model", "model: ./nothing", ExitCode.USER_ERROR, ["./nothing", "not a folder"]),
    ],
)  # fmt: skip
def test_a_dry_run_looks_at_reward_rows_and_places(job: Path, old: str, new: str, code: int, words: list[str]):
    text = JOB.replace("  reward: {builtin: exact_match}\n", SOURCE)
    (job.parent / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": oops}\n')
    job.write_text(text)
    assert nemo_rl("train", job, "--dry-run").exit_code == 0
    assert old in text
    job.write_text(text.replace(old, new))
    result = nemo_rl("train", job, "--dry-run")
    assert result.exit_code == code, result.output
    assert not [word for word in words if word not in result.stderr], result.stderr
    assert result.stdout == ""


# --- the other commands


def test_the_resource_definition_is_printed():
    result = nemo_rl("crd")
    assert result.exit_code == 0
    found = [(part["kind"], part["metadata"]["name"]) for part in yaml.safe_load_all(result.output)]
    changes = "changes.rltrainingjobs.nemo-rl.io"
    assert found == [
        ("CustomResourceDefinition", "rltrainingjobs.nemo-rl.io"),
        ("ValidatingAdmissionPolicy", changes),
        ("ValidatingAdmissionPolicyBinding", changes),
    ]


def test_the_version_is_printed():
    import nemo_rl as package

    assert nemo_rl("version").output.strip() == package.__version__
    assert nemo_rl("--version").output.strip() == package.__version__


@pytest.mark.parametrize("arguments", [(), ("train",), ("ps",), ("status",), ("cp",), ("doctor",)])
def test_help_has_a_short_name(arguments: tuple[str, ...]):
    assert nemo_rl(*arguments, "-h").output == nemo_rl(*arguments, "--help").output != ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str):
    asked = {"COMP_WORDS": "nemo-rl sta", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "nemo-rl sta"}
    code = "from nemo_rl.cli.main import main; import sys; sys.argv = ['nemo-rl']; main()"
    command = [sys.executable, "-c", code]
    environment = {
        **os.environ,
        **asked,
        "_NEMO_RL_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "status" in done.stdout
    assert "resume" not in done.stdout


def test_doctor_finds_what_this_machine_has():
    result = nemo_rl("doctor")
    assert result.exit_code == 0, result.output
    assert "ok  torch" in result.output
    assert "This machine can train." in result.output


def test_doctor_names_the_cure_of_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    import importlib.metadata

    from nemo_rl.cli import doctor

    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("transformers", "peft"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "datasets" else real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    result = nemo_rl("doctor")
    lines = result.output.splitlines()
    assert result.exit_code == 1
    assert any(line.startswith("BAD transformers") for line in lines)
    assert any(line.startswith("BAD datasets") and ">=4 is needed" in line for line in lines)
    assert any(line.startswith("-   lora") for line in lines)
    assert f"→ {install_command('engine')}" in result.output
    assert f"→ {install_command('lora')}" in result.output


# --- as a process


def _process(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_rl.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "NEMO_RL_BACKEND": "local"}
    )


def test_help_lists_the_commands():
    result = _process("--help")
    assert result.returncode == 0
    commands = (
        "train",
        "ps",
        "logs",
        "status",
        "wait",
        "cancel",
        "resume",
        "scale",
        "rm",
        "cp",
        "doctor",
        "crd",
        "version",
    )
    for command in commands:
        assert f"  {command} " in result.stdout


def test_help_takes_less_than_a_third_of_a_second():
    def processor_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _process("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    # of the processor, so that other work on this machine does not count
    assert min(processor_seconds() for _ in range(3)) < 0.3


def test_a_missing_file_ends_a_process_with_2_and_one_line(tmp_path: Path):
    result = _process("train", "job.yaml", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "nemo-rl: job.yaml: cannot be read: No such file or directory; give the path of a job's YAML file"
    ]


def test_a_missing_model_folder_ends_a_process_with_40_and_without_a_traceback(tmp_path: Path):
    (tmp_path / "job.yaml").write_text(JOB.replace("org/model", "./missing"))
    result = _process("train", "job.yaml", cwd=tmp_path)
    assert result.returncode == ExitCode.USER_ERROR
    assert "'./missing' is not a folder on this machine" in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------ plan


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """A folder with the configuration of a small model and nothing else."""
    from transformers import Qwen2Config

    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    Qwen2Config(vocab_size=2000, **shape, num_key_value_heads=2).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_plan_says_what_fits_from_a_configuration_alone(job: Path, configuration: Path):
    options = ["--set", f"model={configuration}", "--set", "training.maxSequenceLength=256"]
    result = nemo_rl("plan", job, *options, "--gpus", 2, "--gpu-memory", 8)
    assert result.exit_code == 0, result.output
    assert "memory: about " in result.output
    assert "activation checkpointing off (chosen)" in result.output
    for part in ("weights", "optimizer", "gradients", "activations and logits", "cache", "training", "rollout", "save"):
        assert part in result.output
    answer = json.loads(nemo_rl("plan", "--model", configuration, "--algorithm", "sft", "-o", "json").output)
    assert answer["fits"]
    assert answer["ranks"] == 1
    assert answer["peakBytes"] == max(sum(parts.values()) for parts in answer["phases"].values())


def test_plan_refuses_what_cannot_fit_and_names_a_change_that_would(configuration: Path):
    options = ["--model", configuration, "--algorithm", "sft", "--set", "training.maxSequenceLength=131072"]
    result = nemo_rl("plan", *options, "--gpu-memory", 3)
    assert result.exit_code == 1
    assert "found 1 × 3 GiB, but this run needs about " in result.output
    assert " would fit" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give the file of a job, or --model"),
        (["--model", "nowhere/at-all-x"], "found no configuration of the model 'nowhere/at-all-x'"),
        (["--model", "m", "--algorithm", "ppo"], "found --algorithm ppo; expected one of grpo, sft, dpo"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_plan_explains_what_it_cannot_read(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = nemo_rl("plan", *arguments)
    assert result.exit_code == 2
    assert said in result.output
