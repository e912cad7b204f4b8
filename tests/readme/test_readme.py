"""README.md in the hands of a newcomer: a fresh clone, fresh environments, each command and each snippet as it stands there.

Replaced are only what a machine without the hub cannot have (the models and data sets that the README names lie in the folder,
under the same names) and the number of steps. `make test-readme` runs it; it needs the package index.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from documented import helpsteer2, openmath, write_models, write_rows
from readme.commands import HERE, ROOT, RUN, commands, job, snippets

UV = Path(sysconfig.get_path("scripts")) / "uv"
SECONDS = 3600.0
ran: set[str] = set()
"""Commands of the README that this module has run."""


def run(line: str, folder: Path, environment: dict[str, str], stdin: str = "") -> str:
    result = subprocess.run(
        ["bash", "-ceu", line],
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 0, f"{line}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout + result.stderr


class Newcomer:
    """A clone, a virtual environment with nothing in it, and a shell in which it is active."""

    def __init__(self, clone: Path, folder: Path) -> None:
        self.clone, self.folder = clone, folder
        folder.mkdir()
        run(f"{UV} venv --quiet --python {sys.executable} env", folder, dict(os.environ))
        keep = {
            k: v
            for k, v in os.environ.items()
            if k not in ("PYTHONPATH", "VIRTUAL_ENV", "KUBECONFIG", "NEMO_RL_BACKEND")
        }
        path = f"{folder / 'env' / 'bin'}{os.pathsep}/usr/local/bin{os.pathsep}/usr/bin{os.pathsep}/bin"
        self.environment = keep | {"PATH": path, "VIRTUAL_ENV": str(folder / "env"), "HF_HUB_OFFLINE": "1"}
        self.environment |= {"KUBECONFIG": str(folder / "none"), "XDG_CACHE_HOME": str(folder / "cache")}

    def install(self, command: str) -> None:
        """A `pip install` of the README, by uv and with the versions that the project is tested with."""
        assert command.startswith("pip install ")
        cache = self.environment | {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))}
        run(f"{UV} {command.replace('pip install', 'pip install --quiet -c constraints.txt')}", self.clone, cache)
        ran.add(command)

    def command(self, line: str, as_written: str | None = None) -> str:
        ran.add(as_written or line)
        return run(line, self.folder, self.environment)

    def python(self, code: str) -> str:
        (self.folder / "snippet.py").write_text(code)
        return run("python snippet.py", self.folder, self.environment)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as `git clone` gives it, so without what lies about here; what is not committed yet is not in it."""
    folder = tmp_path_factory.mktemp("clone")
    (line,) = (line for line in RUN if line.startswith("git clone "))
    run(line.replace("<address of this repository>", str(ROOT)), folder, dict(os.environ))
    ran.update({line, "cd nemo-rl"})
    return folder / "nemo-rl"


@pytest.fixture(scope="module")
def newcomer(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    """With the engine, and with what the README's examples name in its folder."""
    found = Newcomer(clone, tmp_path_factory.mktemp("newcomer") / "work")
    found.install("pip install '.[engine]'")
    write_models(found.folder)
    write_rows(found.folder / "nvidia" / "HelpSteer2", "train", helpsteer2(16))
    write_rows(found.folder / "nvidia" / "OpenMathInstruct-2", "train_1M", openmath(32))
    (found.folder / "job.yaml").write_text(job())
    return found


def short(code: str) -> str:
    code = re.sub(r"max_steps=\d+", "max_steps=2", code)
    return re.sub(r"max_new_tokens=(?:64|256)", "max_new_tokens=16", code)


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("heading", snippets())
def test_a_snippet_runs_in_a_fresh_environment(heading: str, newcomer: Newcomer) -> None:
    code = snippets()[heading]
    if "result.plot(" in code:  # plots are an extra, as the README says
        run(f"{UV} pip install --quiet matplotlib", newcomer.clone, newcomer.environment | {"XDG_CACHE_HOME": _cache()})
    said = newcomer.python(short(code))
    wanted = "step=2/2" if heading == "Trainers" else "step=1/"  # its one row is trained as often as it asks for
    assert wanted in said, said


def _cache() -> str:
    return os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))


@pytest.mark.timeout(SECONDS)
def test_the_job_is_trained_by_the_commands_that_are_shown(newcomer: Newcomer) -> None:
    assert "torch" in newcomer.command("nemo-rl doctor")
    assert "GiB" in newcomer.command("nemo-rl plan job.yaml")
    assert "kind: RLTrainingJob" in newcomer.command("nemo-rl train job.yaml --dry-run")
    assert "CustomResourceDefinition" in newcomer.command("nemo-rl crd")
    assert "step=10/10" in newcomer.command("nemo-rl train job.yaml --set training.maxSteps=10")
    command = "nemo-rl train job.yaml"
    newcomer.command(f"{command} --set training.maxSteps=12", as_written=command)  # the hundred steps, but fewer
    history = (newcomer.folder / "outputs/sums/metrics.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["step"] == 12
    said = run("nemo-rl chat outputs/sums", newcomer.folder, newcomer.environment, stdin="What is 2 + 2?\n")
    ran.add("nemo-rl chat FOLDER")
    assert said.strip()
    rows = newcomer.folder / "rows.jsonl"
    rows.write_text('{"prompt": "What is 2 + 2?", "answer": "4"}\n')
    evaluated = newcomer.command("nemo-rl eval outputs/sums rows.jsonl --reward exact_match", "nemo-rl eval")
    assert "pass@1" in evaluated


@pytest.mark.timeout(SECONDS)
def test_further_extras_are_installed_as_written(newcomer: Newcomer) -> None:
    newcomer.install("pip install '.[engine,lora]'")
    newcomer.python("import peft, nemo_rl")


@pytest.mark.timeout(SECONDS)
def test_a_machine_that_submits_needs_no_torch(clone: Path, tmp_path: Path) -> None:
    light = Newcomer(clone, tmp_path / "light")
    light.install("pip install '.[kubernetes]'")
    said = light.python(
        "import importlib.util, nemo_rl, nemo_rl.backends.kubernetes\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "print(nemo_rl.train.__name__)\n"
    )
    assert said.strip() == "train"
    assert light.command("nemo-rl crd") == (clone / "crds/nemo-rl.io_rltrainingjobs.yaml").read_text()


@pytest.fixture
def shell() -> dict[str, str]:
    """The surroundings of somebody who has a Python and nothing else of ours."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "KUBECONFIG", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    return {k: v for k, v in os.environ.items() if k not in hidden}


@pytest.mark.timeout(2 * SECONDS)
def test_a_fresh_clone_reaches_a_trained_model_in_three_commands(clone: Path, shell: dict[str, str]) -> None:
    """The clone is the first, the folder the second, and the third trains."""
    python = shutil.which("python3", path=shell["PATH"])
    said = run(f"make demo PYTHON={python}", clone, shell)
    assert "held-out accuracy after GRPO" in said, said[-2000:]
    before, after = (
        float(re.findall(rf"held-out accuracy {when} GRPO: +([0-9.]+)", said)[0]) for when in ("before", "after")
    )
    assert after > before
    check = "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('outputs/demo/grpo/checkpoints/best').dtype)"
    assert "float32" in run(f'.venv/bin/python -c "{check}"', clone, shell)
    assert "demo " in run("make help", clone, shell)
    ran.update({"make demo", "make help"})


def test_every_command_that_is_to_run_here_has_run() -> None:
    assert {line for line, where in RUN.items() if where == HERE and line in commands()} <= ran
