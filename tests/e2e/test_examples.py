"""Every file of examples/ trains in pods; replaced are only names that a machine without hub, registry and GPUs cannot have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import ROOT
from documented import helpsteer2, openmath, write_language_model
from e2e.client.desk import Desk
from e2e.kubectl import Object
from e2e.scene import SECONDS, Scene
from nemo_rl.backends.kubernetes.ship.archive import Archive
from nemo_rl.backends.kubernetes.ship.data import ship_directory
from nemo_rl.job import names

EXAMPLES = ROOT / "examples"
RUN_ELSEWHERE = {
    "demo.py": "make demo",
    "arithmetic.py": "tests/unit/docs/test_tutorial.py",
    "grpo_replicas.yaml": "tests/cluster/test_replicas.py, and with vLLM tests/replicas",
}
ROWS: dict[str, list[dict[str, object]]] = {
    "nvidia/HelpSteer2": helpsteer2(8),
    "nvidia/OpenMathInstruct-2": openmath(8),
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    write_language_model(folder, chat=True)
    return folder


@pytest.fixture(scope="module")
def archive(chat_model: Path) -> Archive:
    return ship_directory(chat_model).archive


@pytest.fixture(scope="module")
def place(new_scene: Callable[[str], Scene], archive: Archive) -> Scene:
    scene = new_scene("examples")
    scene.kubectl.apply(*archive.config_maps())
    return scene


def test_every_file_of_examples_is_run_by_a_test():
    found = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml", ".ipynb")}
    assert found == {*RUN_ELSEWHERE, *MANIFESTS, "grpo_parts.py", "train.ipynb"}


MANIFESTS = {
    "grpo.yaml": "",
    "sft.yaml": "",
    "dpo.yaml": "",
    "two_nodes.yaml": "",
    "private_model.yaml": "kubectl create secret generic hf-token --from-literal=HF_TOKEN=...",
}
"""Files that are applied, with the command that their comment asks for first."""


def of_here(found: Object, archive: Archive) -> Object:
    """The manifest with a tiny model, local rows, a few steps, and no GPU."""
    if found["kind"] != names.KIND:
        found["spec"]["resources"]["requests"]["storage"] = "1Gi"
        return found
    spec: Any = found["spec"]
    spec["model"] = "bundle://model"
    spec["bundles"] = [archive.spec("model").model_dump(mode="json", by_alias=True, exclude_none=True)]
    for section in ("dataset", "validationDataset"):
        if name := spec.get(section, {}).get("name"):
            spec[section] = {"inline": ROWS[name]}
    spec["training"] |= {"maxSteps": 2, "batchSize": 4, "maxEpochs": 4}
    spec["resources"] = {key: value for key, value in spec["resources"].items() if key == "nodes"} | {"gpusPerNode": 0}
    spec["output"] = {"size": "1Gi"}
    return found


@pytest.mark.parametrize("file", MANIFESTS)
def test_a_manifest_of_the_examples_trains(file: str, place: Scene, archive: Archive):
    text = (EXAMPLES / file).read_text()
    if first := MANIFESTS[file]:
        assert f"#   {first}\n" in text
        place.kubectl(*first.split()[1:])
    *others, job = [of_here(found, archive) for found in yaml.safe_load_all(text)]
    if others:
        place.kubectl.apply(*others)
    status = place.apply(job).phase("Succeeded", seconds=2 * SECONDS)
    assert status["result"]["totalSteps"] == 2


@pytest.fixture(scope="module")
def desk(place: Scene, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), place)


def short(text: str, model: Path) -> str:
    """The code with a tiny model for the hub's, and fewer steps."""
    text = text.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(model)))
    for steps in ("max_steps=20", "max_steps=10"):
        text = text.replace(steps, 'max_steps=2, size="1Gi"')
    return text


def test_the_script_of_the_examples_trains_on_the_cluster_and_brings_the_model_home(desk: Desk, chat_model: Path):
    script = short((EXAMPLES / "grpo_parts.py").read_text(), chat_model)
    (desk.folder / "grpo_parts.py").write_text(script)
    text = desk.run("grpo_parts.py")
    assert "step 2: " in text, "the callback's words come from the pod"
    assert "TrainResult(total_steps=2" in text
    assert list((desk.folder / "outputs/grpo_parts/checkpoints").glob("step-*/model.safetensors"))


def test_the_notebook_of_the_examples_runs_from_top_to_bottom(
    desk: Desk, chat_model: Path, monkeypatch: pytest.MonkeyPatch
):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "train.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = short(cell.source, chat_model)
    for name, value in desk.environment.items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=2 * SECONDS, resources={"metadata": {"path": str(desk.folder)}}).execute()
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "TrainResult" in outputs
    assert "image/png" in outputs
