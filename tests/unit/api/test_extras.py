"""What an extra brings and is not installed ends in one sentence with a command that works, from every entry point."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from nemo_rl import extras
from nemo_rl.cli.main import app
from unit.api import base_environment

JOB = """\
apiVersion: nemo-rl.io/v1alpha1
kind: RLTrainingJob
metadata: {name: sums}
spec:
  model: ./model
  algorithm: sft
  dataset: {inline: [{prompt: a, completion: b}]}
"""

COMMANDS: dict[str, tuple[list[str], str | None]] = {
    "train": (["job.yaml", "--backend", "local"], "engine"),
    "init": (["new.yaml"], None),
    "plan": (["job.yaml"], "engine"),
    "chat": (["./model"], "engine"),
    "eval": (["./model", "job.yaml", "--reward", "length"], "engine"),
    "data": (["job.yaml"], "engine"),
    "ps": ([], "kubernetes"),
    "status": (["x"], "kubernetes"),
    "wait": (["x"], "kubernetes"),
    "logs": (["x"], "kubernetes"),
    "cancel": (["x"], "kubernetes"),
    "resume": (["x"], "kubernetes"),
    "rm": (["x"], "kubernetes"),
    "scale": (["x", "2"], "kubernetes"),
    "cp": (["x"], "kubernetes"),
    "ui": (["./model"], "ui"),
    "crd": ([], None),
    "version": ([], None),
    "doctor": ([], "engine"),
}
"""Every subcommand: arguments with which it gets as far as it can, and the extra that it lacks."""

INSTALLS_THE_OTHER = re.compile(r"\b(?:pip|uv) (?:install|add) (?:[^\n&;|`#]*[ '\"])?nemo[-_]rl\b(?!/)")
"""A command that installs by the name that another project has on the registry."""

ROWS = "[{'prompt': 'a', 'completion': 'b'}]"
CALLS = {
    "nemo_rl.train('./model', ROWS, algorithm='sft', backend='local')": "engine",
    "nemo_rl.train('./model', ROWS, lambda prompt, response: 1.0, backend='local')": "engine",
    "nemo_rl.train('m', ROWS, algorithm='sft', backend='kubernetes')": "kubernetes",
    "nemo_rl.attach('x')": "kubernetes",
    "nemo_rl.jobs()": "kubernetes",
    "nemo_rl.GRPOTrainer": "engine",
    "nemo_rl.SFTTrainer": "engine",
    "nemo_rl.DPOTrainer": "engine",
    "nemo_rl.api.get_algorithm('grpo')": "engine",
    "nemo_rl.api.create_trainer('sft', model='m')": "engine",
    "nemo_rl.TrainResult(history=[{'step': 1, 'loss': 1.0}]).plot()": "demo",
    "nemo_rl.TrainResult(checkpoint_path='model').generate('x')": "engine",
    "nemo_rl.TrainResult(checkpoint_path='model').push_to_hub('me/model')": "engine",
}

PROGRAM = """
import contextlib, io, json, sys, traceback
import nemo_rl, nemo_rl.api
from nemo_rl.cli.main import app
ROWS, found = {rows}, {{}}
for call in {calls}:
    try:
        eval(call)
        found[call] = ["", "returned"]
    except Exception as error:
        found[call] = [type(error).__name__, str(error)]
for name, arguments in {commands}.items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            app([name, *arguments[0]], prog_name="nemo-rl")
        except SystemExit as error:
            code = error.code
        except BaseException:
            code = traceback.format_exc()
    found[name] = [code, out.getvalue()]
print(json.dumps(found))
"""


def run(python: Path, folder: Path, calls: dict[str, str], commands: dict[str, Any]) -> dict[str, list[Any]]:
    program = PROGRAM.format(rows=ROWS, calls=list(calls), commands=commands)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(JOB)
    environment = {"PATH": "", "HOME": str(folder), "NEMO_RL_BACKEND": "auto"}
    done = subprocess.run(
        [python, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What every entry point answers where nemo-rl is installed without any extra."""
    folder = tmp_path_factory.mktemp("base")
    return run(base_environment.make(folder / "environment"), folder, CALLS, COMMANDS)


def test_every_subcommand_is_tried() -> None:
    assert {c.name or (c.callback and c.callback.__name__) for c in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_subcommand_without_its_extra_says_so_in_one_sentence(base: dict[str, list[Any]], name: str) -> None:
    code, said = base[name]
    extra = COMMANDS[name][1]
    if extra is None:
        assert code in (0, None)
        return
    assert code == (2 if name == "plan" else 1), said
    assert extras.install_command(extra) in said
    assert "Traceback" not in said
    assert "No module named" not in said
    if name != "doctor":
        assert len([line for line in said.splitlines() if line.startswith("nemo-rl: ") and "needs" in line]) == 1, said


@pytest.mark.parametrize("call", CALLS)
def test_a_call_without_its_extra_says_so_in_one_sentence(base: dict[str, list[Any]], call: str) -> None:
    kind, said = base[call]
    assert kind == "MissingPackage", said
    assert said.endswith(extras.install_command(CALLS[call]))
    assert said.count("\n") == 0


def test_adapters_and_boards_without_their_extra_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    calls = {
        "nemo_rl.train('./model', ROWS, algorithm='sft', backend='local', lora_rank=4)": "lora",
        "nemo_rl.train('./model', ROWS, algorithm='sft', backend='local', tensorboard=True)": "tensorboard",
    }
    calls |= {
        f"nemo_rl.train('./model', ROWS, algorithm='sft', backend='local', report_to='{name}')": name
        for name in ("wandb", "mlflow", "trackio")
    }
    found = run(base_environment.make(tmp_path / "environment", "engine"), tmp_path, calls, {})
    for call, extra in calls.items():
        kind, said = found[call]
        assert kind == "MissingPackage", said
        trackers = rf"pip install '?{extra}[^ ]*$"  # found by their own names, too, in an installation that is older
        assert said.endswith(extras.install_command(extra)) or re.search(trackers, said), said


def test_a_cluster_that_cannot_be_asked_for_want_of_its_client_is_named_in_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_rl import backends

    monkeypatch.setattr(backends, "cluster_context", lambda: "KUBECONFIG")
    monkeypatch.setattr(backends, "is_there", lambda module: False)
    where, why = backends.choose("auto")
    assert where == "local"
    assert "KUBECONFIG found, but no client" in why
    assert extras.install_command("kubernetes") in why


def test_commands_name_packages_and_never_the_name_that_another_project_has_on_the_registry() -> None:
    for extra in ("engine", "kubernetes", "lora", "math", "tensorboard", "demo", "notebook", "worker"):
        command = extras.install_command(extra)
        packages = re.findall(r"'([^']+)'", command)
        assert packages, extra
        assert all(Requirement(package).name != "nemo-rl" for package in packages)
    root = base_environment.ROOT
    folders = ("nemo_rl", "operator", "docs", "examples", "charts", "trainer_image")
    files = [path for folder in folders for path in (root / folder).rglob("*")]
    for path in [*files, root / "README.md", root / "CONTRIBUTING.md", root / "Makefile"]:
        if path.suffix in (".py", ".md", ".txt", ".yaml", ".ipynb", ".Dockerfile", "") and path.is_file():
            assert not INSTALLS_THE_OTHER.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("pip install nemo-rl", True),
        ("pip install 'nemo-rl[engine]'", True),
        ('pip install -U "nemo-rl"', True),
        ("python -m pip install nemo_rl[engine]", True),
        ("uv pip install torch nemo-rl==0.1", True),
        ("uv add nemo-rl", True),
        ("pip install '.[engine]' && nemo-rl doctor", False),
        ("pip install /usr/share/nemo-rl/nemo_rl.whl", False),
    ],
)
def test_the_name_of_the_other_project_is_found_however_it_is_written(line: str, other: bool) -> None:
    assert bool(INSTALLS_THE_OTHER.search(line)) == other
