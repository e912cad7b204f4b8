"""A newcomer follows the quickstart on a cluster word by word, and ends with a trained model.

Files are written as the page shows them and commands are run as it shows them, in order. Replaced are only names that a
machine without a registry and a hub cannot have: of images, of the model, of namespaces.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from charts import ROOT, helm_program
from e2e.kubectl import PROGRAM, Kubectl, eventually
from e2e.manifests import MODEL, Manifests, demo
from e2e.operator_pod import OperatorPod
from e2e.release import shared_values
from e2e.scene import RESTRICTED, SECONDS
from nemo_rl.job import names
from unit.docs.blocks import DOCS, Block, all_blocks, blocks_of

HUB_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
PAGE = DOCS / "quickstart" / "cluster.md"


class Newcomer:
    """A folder with the repository's files in it, a kubeconfig of its own, and a shell."""

    def __init__(self, folder: Path, manifests: Manifests) -> None:
        self.folder, self.manifests = folder, manifests
        mark = uuid.uuid4().hex[:6]
        self.training, self.system = f"rl-training-{mark}", f"rl-newcomer-{mark}"
        self.model = Path(demo().make_model(folder / "tiny", seed=0))
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(Kubectl()("config", "view", "--raw", "--minify", "--flatten"))
        kubeconfig.chmod(0o600)
        (folder / "charts").symlink_to(ROOT / "charts")
        values = {"watchNamespaces": [self.system, self.training], "crds": {"enabled": False}}
        values |= {"userRoles": {"create": False}, "tests": {"namespace": self.system}}
        (folder / "lab.yaml").write_text(yaml.safe_dump(shared_values() | values))
        programs = [
            str(Path(sys.executable).parent),
            *(str(Path(p).parent) for p in (PROGRAM, helm_program()) if "/" in p),
        ]
        path = os.pathsep.join([*programs, os.environ["PATH"]])
        self.environment = os.environ | {"KUBECONFIG": str(kubeconfig), "PATH": path, "HOME": str(folder)}
        self.ran: list[str] = []

    def prepare(self) -> None:
        """What a release of only some namespaces needs: they must be there. Only restricted pods may run in them."""
        for namespace in (self.system, self.training):
            metadata = {"name": namespace, "labels": {RESTRICTED: "restricted"}}
            Kubectl().apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        Kubectl(self.training).apply(*self.manifests.config_maps())

    def own_names(self, text: str) -> str:
        text = text.replace("--namespace nemo-rl-system", f"--namespace {self.system}")
        text = text.replace("namespace training", f"namespace {self.training}")
        text = text.replace("kubectl create namespace", "kubectl get namespace")  # it is there, with its label
        return text.replace("helm install nemo-rl-operator", "helm install --values lab.yaml nemo-rl-operator")

    def write(self, block: Block) -> None:
        text = block.text
        if block.language == "yaml":
            text = yaml.safe_dump(self.job_of_here(text))
        (self.folder / block.title).write_text(text.replace(f'"{HUB_MODEL}"', repr(str(self.model))))

    def job_of_here(self, text: str) -> dict[str, object]:
        found: dict[str, object] = yaml.safe_load(text)
        spec = found["spec"]
        assert isinstance(spec, dict)
        assert spec["model"] == HUB_MODEL
        spec["model"] = f"bundle://{MODEL}"
        spec["bundles"] = [self.manifests.archive.spec(MODEL).model_dump(mode="json", by_alias=True, exclude_none=True)]
        spec["output"] = {"size": "1Gi"}
        return found

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-ceu", line],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=3 * SECONDS,
        )

    def succeeds(self, line: str) -> bool:
        return self.shell(self.own_names(line)).returncode == 0

    def run(self, line: str) -> str:
        line = self.own_names(line)
        result = self.shell(line)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        self.ran.append(line)
        return result.stdout + result.stderr

    def leave(self) -> None:
        subprocess.run([helm_program(), "uninstall", "nemo-rl-operator", "--namespace", self.system], check=False)
        Kubectl()("delete", "namespace", self.training, self.system, "--wait=false", check=False)


@pytest.fixture
def newcomer(operator: OperatorPod, manifests: Manifests, tmp_path: Path) -> Iterator[Newcomer]:
    made = Newcomer(tmp_path, manifests)
    made.prepare()
    yield made
    made.leave()


def test_a_newcomer_who_follows_the_cluster_quickstart_gets_trained_models(newcomer: Newcomer):
    from transformers import AutoModelForCausalLM

    said = ""
    for block in blocks_of(PAGE):
        if block.skipped:
            continue
        if block.title:
            newcomer.write(block)
        for line in block.text.splitlines() if block.language == "bash" else ():
            said += newcomer.run(line)
    assert len(newcomer.ran) >= 10
    assert "ok - a job of one step trains to its end" in said
    for run in ("sums", "from-python"):
        output = newcomer.folder / "outputs" / run
        (checkpoint,) = (output / "checkpoints").glob("step-*")
        assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() > 0, run
        steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5]


def test_single_commands_of_other_pages_do_what_they_say(newcomer: Newcomer):
    """Blocks marked `run: lab`, in the order of the pages, in a namespace where the job of the quickstart trains."""
    blocks = [block for block in all_blocks() if block.mark == "run: lab"]
    assert len(blocks) >= 4
    Kubectl()(
        "config",
        "set-context",
        "--current",
        f"--namespace={newcomer.training}",
        f"--kubeconfig={newcomer.folder}/kubeconfig",
    )
    job = newcomer.manifests.grpo("sums", steps=400, pause=0.1)
    Kubectl(newcomer.training).apply(job)
    running = f"rlj/sums -n {newcomer.training} --for=jsonpath={{.status.phase}}=Running"
    newcomer.run(f"kubectl wait {running} --timeout={SECONDS:.0f}s")
    for block in blocks:
        for line in block.text.splitlines():
            if line.startswith("kubectl auth can-i"):  # a new binding is in force a moment later
                eventually(lambda asked=line: newcomer.succeeds(asked), line, 60)
            else:
                newcomer.run(line)
    found = Kubectl(newcomer.training).json(names.PLURAL, "sums")
    assert [a["cause"] for a in found["status"]["attempts"] if a.get("endTime")] in (["Suspended"], ["Preempted"])
    assert found["spec"]["suspend"] is False
