"""`nemo-rl init`: the job that it writes is one for --dry-run, for the definition on the cluster, and for a reader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from typer.testing import CliRunner

from nemo_rl import backends
from nemo_rl.cli import init
from nemo_rl.cli.main import app
from nemo_rl.job.manifest import load_manifest

DEFINITION = Path(__file__).parents[3] / "crds" / "nemo-rl.io_rltrainingjobs.yaml"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "cluster_context", lambda: None)
    return tmp_path


def nemo(*arguments: Any, **options: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def schema() -> dict[str, Any]:
    """The definition's schema, in which an unknown field is an error, as for kubectl's strict validation."""
    found: Any = next(yaml.safe_load_all(DEFINITION.read_text()))["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec = found["properties"]["spec"]

    def closed(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
                node["additionalProperties"] = False
            for child in node.values():
                closed(child)

    closed(spec)
    return spec


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_the_file_passes_the_dry_run_and_the_definition(algorithm: str, here: Path) -> None:
    assert nemo("init", "--algorithm", algorithm, "--model", "org/Base_7B").exit_code == 0
    found = nemo("train", "job.yaml", "--dry-run", "--backend", "local")
    assert found.exit_code == 0, found.output
    job = yaml.safe_load((here / "job.yaml").read_text())
    jsonschema.Draft4Validator(schema()).validate(job["spec"])
    assert job["metadata"]["name"] == f"base-7b-{algorithm}"
    assert job["spec"]["algorithm"] == algorithm


@pytest.mark.parametrize("algorithm", ["grpo", "sft", "dpo"])
def test_each_line_that_is_commented_out_can_be_set(algorithm: str, here: Path) -> None:
    nemo("init", "--algorithm", algorithm)
    lines = (here / "job.yaml").read_text().splitlines()
    commented = [i for i, line in enumerate(lines) if re.match(r" +# [a-z]\w+: \S", line)]
    assert len(commented) >= 6
    for i in commented:
        changed = [
            line.replace("{}  # every setting at its default: remove {} where you set one", "") for line in lines
        ]
        changed[i] = changed[i].replace("# ", "", 1)
        (here / "changed.yaml").write_text("\n".join(changed))
        field = changed[i].split(":")[0].strip()
        spec = load_manifest(here / "changed.yaml").spec
        written = json.dumps(spec.model_dump(by_alias=True, exclude_unset=True))
        assert f'"{field}"' in written, changed[i]


def test_what_is_given_is_in_the_job(here: Path) -> None:
    (here / "rewards.py").write_text("def correct(prompt, response):\n    return 1.0\n")
    (here / "rows.jsonl").write_text('{"prompt": "a"}\n')
    flags = ("--dataset", "rows.jsonl", "--reward", "rewards.py:correct", "--name", "mine", "--gpus", 0)
    found = nemo("init", "jobs/mine.yaml", *flags, "-o", "json")
    assert json.loads(found.stdout)["name"] == "mine"
    spec = load_manifest(here / "jobs/mine.yaml").spec
    assert spec.dataset.path == "rows.jsonl"
    assert (spec.reward.entrypoint, spec.resources.gpus_per_node) == ("correct", 0)
    assert "return 1.0" in spec.reward.source
    nemo("init", "hub.yaml", "--dataset", "org/rows@test[:10]", "--reward", "math_answer")
    spec = load_manifest(here / "hub.yaml").spec
    assert (spec.dataset.name, spec.dataset.split, spec.reward.builtin) == ("org/rows", "test[:10]", "math_answer")


def test_a_terminal_is_asked_for_what_is_not_given(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def prompt(question: str, default: str, show_default: bool) -> str:
        asked.append(question.split()[0])
        return {"algorithm": "DPO", "name": "of-mine"}.get(question.split()[0], default)

    monkeypatch.setattr(typer, "prompt", prompt)
    monkeypatch.setattr(
        init, "sys", type("sys", (), {"stdin": type("stdin", (), {"isatty": staticmethod(lambda: True)})})
    )
    assert init.init_job(
        Path("job.yaml"),
        algorithm=None,
        model="org/m",
        dataset=None,
        reward=None,
        name=None,
        gpus=0,
        force=False,
        as_json=False,
    ) == 0  # fmt: skip
    assert asked == ["algorithm", "data", "name"]
    assert load_manifest(here / "job.yaml").spec.algorithm == "dpo"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--algorithm", "ppo"), "Unknown algorithm 'ppo'"),
        (("--algorithm", "sft", "--reward", "length"), "which uses none"),
        (("--name", "My_Job"), "must be lower-case letters"),
        (("--reward", "nowhere.py:f"), "is not a file here"),
        (("--reward", "lenght"), "builtin"),
    ],
)
def test_an_answer_that_cannot_be_used_is_said_and_nothing_is_written(
    flags: tuple[str, ...], words: str, here: Path
) -> None:
    found = nemo("init", *flags)
    assert found.exit_code == 2, found.output
    assert words in found.stderr
    assert not (here / "job.yaml").exists()


def test_a_file_that_is_there_is_kept(here: Path) -> None:
    (here / "job.yaml").write_text("mine\n")
    found = nemo("init")
    assert found.exit_code == 2
    assert "--force" in found.stderr
    assert (here / "job.yaml").read_text() == "mine\n"
    assert nemo("init", "--force").exit_code == 0
