"""What the Dockerfiles promise: pinned, non-root, cached by what changes least, and complete."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "trainer_image"
DOCKERFILES = ["Dockerfile", "operator.Dockerfile", "ui.Dockerfile"]
REQUIREMENTS = {
    "Dockerfile": "requirements.txt",
    "operator.Dockerfile": "operator-requirements.txt",
    "ui.Dockerfile": "ui-requirements.txt",
}

Instruction = tuple[str, str]


def instructions(name: str) -> list[Instruction]:
    """(keyword, rest) of each instruction, comments and line breaks removed."""
    lines = [line for line in (FOLDER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0].upper(), line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def last_stage(name: str) -> list[Instruction]:
    found = instructions(name)
    return found[max(i for i, (keyword, _) in enumerate(found) if keyword == "FROM") :]


def distributions(lines: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!\[;]", line)[0].lower() for line in lines if line.strip() and not line.startswith("#")}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_base_is_an_argument_with_a_fixed_version(name: str):
    found = instructions(name)
    bases = {rest.split()[0] for keyword, rest in found if keyword == "FROM"}
    assert bases <= {"${BASE}", "${DEPENDENCIES}"}
    default = next(rest for keyword, rest in found if keyword == "ARG" and rest.startswith("BASE="))
    assert re.fullmatch(r"BASE=[\w./-]+:\d[\w.-]*", default)
    assert ":latest" not in (FOLDER / name).read_text()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_container_runs_as_a_user_that_the_kubelet_can_tell_from_root(name: str):
    stage = last_stage(name)
    assert [rest for keyword, rest in stage if keyword == "USER"] == ["1000:1000"]
    after = stage[[keyword for keyword, _ in stage].index("USER") :]
    assert {keyword for keyword, _ in after} <= {"USER", "CMD"}


def test_the_images_user_is_the_one_that_the_operator_asks_for():
    from nemo_rl_operator.build import USER

    assert ("USER", f"{USER}:{USER}") in last_stage("Dockerfile")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dependencies_are_installed_before_any_code_is_copied(name: str):
    installing = next(
        i for i, (_, rest) in enumerate(instructions(name)) if REQUIREMENTS[name] in rest and "pip" in rest
    )
    stage_begin = max(i for i, (keyword, _) in enumerate(instructions(name)[:installing]) if keyword == "FROM")
    copied = " ".join(rest for keyword, rest in instructions(name)[stage_begin:installing] if keyword == "COPY")
    assert "constraints.txt" in copied
    assert not re.search(r"nemo_rl|operator/|pyproject|\s\.\s", copied.replace("operator-requirements", ""))
    assert "-c " in instructions(name)[installing][1]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_only_named_parts_of_the_repository_are_copied(name: str):
    allowed = {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "nemo_rl", "operator"}
    allowed |= {f"trainer_image/{file}" for file in REQUIREMENTS.values()}
    for keyword, rest in instructions(name):
        assert keyword != "ADD"
        if keyword == "COPY" and not rest.startswith("--from=wheel "):
            assert set(rest.split()[:-1]) <= allowed


def test_the_builder_is_given_nothing_but_that():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    given = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert given == {
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "nemo_rl",
        "operator",
        "trainer_image",
    }
    assert any(fnmatch.fnmatch("nemo_rl/worker/__pycache__", rule.replace("**/", "*/")) for rule in rules)


def test_the_listed_requirements_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def wanted(*names: str) -> set[str]:
        found = distributions(project["dependencies"])
        for name in names:
            found |= distributions(extras[name])
        return found - {"nemo-rl"}

    def listed(file: str) -> set[str]:
        return distributions((FOLDER / file).read_text().splitlines())

    assert listed("requirements.txt") == wanted("engine", "object-storage", "worker", "lora", "tensorboard")
    assert listed("operator-requirements.txt") == wanted("operator") - {"kubernetes"}
    assert listed("ui-requirements.txt") == wanted("ui", "kubernetes")


def test_every_requirement_is_pinned():
    pinned = distributions((ROOT / "constraints.txt").read_text().splitlines())
    for file in REQUIREMENTS.values():
        assert distributions((FOLDER / file).read_text().splitlines()) <= pinned


@pytest.mark.parametrize("file", ["operator-requirements.txt", "ui-requirements.txt"])
def test_the_images_of_operator_and_page_have_no_torch(file: str):
    assert "torch" not in (FOLDER / file).read_text()


def test_the_trainers_volumes_are_where_the_operator_mounts_them():
    from nemo_rl.job import names

    text = (FOLDER / "Dockerfile").read_text()
    assert f"HOME={names.HOME_DIR} " in text
    assert f"HF_HOME={names.CACHE_DIR}/" in text
    assert f'"{names.WORKER_MODULE}"' in text
