"""The chart on a real cluster: it installs, tests itself, lets the right people train, upgrades under running jobs, leaves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from charts import CHART, helm_program
from e2e.client.desk import Desk
from e2e.kubectl import Kubectl, Object, eventually
from e2e.manifests import Manifests
from e2e.operator_pod import OperatorPod
from e2e.release import OPERATOR, Release
from e2e.scene import SECONDS, Scene, metrics_of
from generated import load
from nemo_rl.job import names

ALLOWED = "registry.example.com/ml/"


@pytest.fixture(scope="module")
def place(new_scene: Callable[[str], Scene]) -> Scene:
    return new_scene("chart")


@pytest.fixture(scope="module")
def release(place: Scene) -> Iterator[Release]:
    """An operator for the namespace of these tests, by the chart as it is."""
    made = Release("chart", [place.namespace], tests={"trainSeconds": int(SECONDS)}).open()
    try:
        made.install()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def alice(place: Scene, release: Release, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk whose user has the role of editors in this namespace, and nothing else."""
    return desk_of(place, "alice", f"{release.roles}-edit", tmp_path_factory.mktemp("alice"))


def desk_of(place: Scene, user: str, role: str, folder: Path) -> Desk:
    """A desk with the token of a service account that is bound to the role."""
    desk = Desk(folder, place)
    place.kubectl("create", "serviceaccount", user)
    account = f"{place.namespace}:{user}"
    place.kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--serviceaccount={account}")
    config = yaml.safe_load(desk.kubeconfig.read_text())
    token = place.kubectl("create", "token", user, "--duration=2h").strip()
    config["users"] = [{"name": entry["name"], "user": {"token": token}} for entry in config["users"]]
    desk.kubeconfig.write_text(yaml.safe_dump(config))
    return desk


def by(desk: Desk, *words: str, manifest: Object | None = None) -> str:
    """kubectl as the desk's user: output and errors, whatever comes of it."""
    text = json.dumps(manifest) if manifest else ""
    return Kubectl()(f"--kubeconfig={desk.kubeconfig}", *words, stdin=text, check=False)


def test_the_operator_of_a_fresh_release_is_ready_and_sees_its_namespace(release: Release, place: Scene):
    deployment = release.kubectl.json("deployment", release.name)
    assert deployment["status"]["readyReplicas"] == 1
    log = release.kubectl("logs", "-l", OPERATOR, "--tail=-1")
    assert "orbidden" not in log, log
    command = deployment["spec"]["template"]["spec"]["containers"][0]["command"]
    assert f"--namespace={place.namespace}" in command


def test_helm_test_passes_to_the_end_of_a_training_job(release: Release):
    said = release.helm("test", release.name, "--logs", f"--timeout={2 * SECONDS:.0f}s")
    # helm prints the log once for the pod, and once for the rights that are a hook of the same name
    _, *logs = said.split("POD LOGS:")
    assert logs
    for log in logs:
        checks = re.findall(r"^(ok|not ok) - (.*)$", log, re.MULTILINE)
        assert [result for result, _ in checks] == ["ok"] * 5, said
        assert checks[-1][1] == "a job of one step trains to its end"


def test_a_user_with_the_role_of_editors_alone_trains_and_brings_the_result_home(
    alice: Desk, manifests: Manifests, tmp_path_factory: pytest.TempPathFactory
):
    model = load(CHART.parents[1] / "examples/demo.py").make_model(alice.folder / "tiny", seed=0)
    script = alice.folder / "train.py"
    script.write_text(
        "import nemo_rl\n"
        f"rows = {[{'prompt': r['prompt'], 'completion': r['answer']} for r in manifests.rows]!r}\n"
        f"result = nemo_rl.train({str(model)!r}, rows, algorithm='sft', max_steps=2, batch_size=8, gpus=0, size='1Gi')\n"
        "print('TRAINED', result.total_steps, result.checkpoint_path)\n"
    )
    text = alice.run("train.py")
    found = re.search(r"^TRAINED 2 (.+)$", text, re.MULTILINE)
    assert found, text
    assert (alice.folder / found[1] / "model.safetensors").is_file()


def test_a_user_with_the_role_of_viewers_sees_and_cannot_create(
    place: Scene, release: Release, manifests: Manifests, tmp_path: Path
):
    viewer = desk_of(place, "victor", f"{release.roles}-view", tmp_path)
    eventually(lambda: "rror" not in by(viewer, "get", "rlj"), "a viewer sees jobs", SECONDS)
    refused = by(viewer, "create", "-f", "-", manifest=manifests.sft("seen", steps=1))
    assert 'cannot create resource "rltrainingjobs"' in refused
    assert "no" in by(viewer, "auth", "can-i", "get", "secrets")


def test_the_refusals_of_the_admission_policy_can_be_read(alice: Desk, release: Release, manifests: Manifests):
    release.install(admissionPolicy={"allowedImages": [ALLOWED]})
    secret = {"env": [{"name": "T", "valueFrom": {"secretKeyRef": {"name": "theirs", "key": "k"}}}]}
    expected = {
        f"this cluster runs images that begin with {ALLOWED} only": {"image": "docker.io/evil/miner:1"},
        "which may be another image tomorrow; name a fixed tag or a digest": {"image": f"{ALLOWED}trainer:latest"},
        "alice may not read the Secrets named in the job (theirs)": secret,
    }
    for words, spec in expected.items():
        manifest = manifests.sft("refused", steps=1, **spec)
        eventually(
            lambda w=words, m=manifest: w in by(alice, "create", "--dry-run=server", "-f", "-", manifest=m),
            f"a refusal with {words!r}",
            60,
        )
    release.install(admissionPolicy={"allowedImages": []})
    good = manifests.sft("accepted", steps=1)
    eventually(
        lambda: "created" in by(alice, "create", "--dry-run=server", "-f", "-", manifest=good), "an accepted job", 60
    )


def test_every_metric_of_the_dashboard_is_in_a_live_scrape(place: Scene, operator: OperatorPod):
    """A GRPO job with a reference model and an SFT job, both with validation data, have all metrics between them."""
    scenery = {"validationDataset": {"inline": place.manifests.rows[:2]}, "training": {"evalEvery": 1, "saveEvery": 1}}
    grpo = place.manifests.grpo("scraped", steps=400, pause=0.05, **scenery)
    grpo["spec"]["grpo"]["beta"] = 0.01
    rows = place.manifests.sft("x", steps=1)["spec"]["dataset"]["inline"][:2]
    sft = place.manifests.sft("scraped-too", steps=400, **{**scenery, "validationDataset": {"inline": rows}})
    found: set[str] = set()
    for job in (place.apply(grpo), place.apply(sft)):
        job.reached(2)
        pod = job.pod()["metadata"]["name"]
        found |= scrape(place.kubectl, f"pods/{pod}:{names.TRAINER_PORT}")
        place.kubectl("delete", names.PLURAL, job.name, "--wait=false")
    pod = operator.wait_ready()["metadata"]["name"]
    found |= eventually(lambda: counted(operator.kubectl, f"pods/{pod}:9090"), "an attempt that ended", SECONDS)
    monitoring = load(CHART.parents[1] / "tests/unit/chart/test_monitoring.py")
    expressions = monitoring.dashboard_expressions() + monitoring.alert_expressions()
    used = {name for text in expressions for name in monitoring.METRIC.findall(text)} - monitoring.LABELS
    assert len(used) > 30
    assert used - found == set()


def counted(kubectl: Kubectl, target: str) -> set[str] | None:
    found = scrape(kubectl, target)
    return found if "nemo_rl_operator_attempts_ended_total" in found else None


def scrape(kubectl: Kubectl, target: str) -> set[str]:
    """Names of all samples that a pod serves, through the API server's proxy."""
    namespace = kubectl.prefix[kubectl.prefix.index("--namespace") + 1]
    text = Kubectl()("get", "--raw", f"/api/v1/namespaces/{namespace}/{target}/proxy/metrics")
    return set(re.findall(r"^([a-zA-Z_:][\w:]*)", text, re.MULTILINE))


def test_a_job_trains_on_while_its_operator_is_upgraded_to_a_changed_definition(
    place: Scene, operator: OperatorPod, tmp_path: Path
):
    """The shared release is upgraded to a chart with a new field in the definition, and back, under a running job."""
    deployment = operator.kubectl.items("deployments", "-l", "app.kubernetes.io/name=nemo-rl-operator")[0]
    annotations = deployment["metadata"]["annotations"]
    assert "meta.helm.sh/release-name" in annotations, "the operator of this cluster was not installed by helm"
    name, namespace = annotations["meta.helm.sh/release-name"], annotations["meta.helm.sh/release-namespace"]
    job = place.apply(place.manifests.grpo("upgraded", steps=60, pause=0.03))
    job.reached(2)
    pod = job.pod()["metadata"]["uid"]
    before = operator.wait_ready()["metadata"]["uid"]
    wait = ["--namespace", namespace, "--wait", f"--timeout={SECONDS:.0f}s"]
    try:
        helm = [helm_program(), "upgrade", name, str(next_chart(tmp_path)), *wait, "--reset-then-reuse-values"]
        subprocess.run([*helm, "--set-string", "podAnnotations.round=next"], check=True, capture_output=True, text=True)
        assert "noticed" in Kubectl()("explain", "rlj.spec.training.noticed")
        assert operator.wait_ready()["metadata"]["uid"] != before
        job.reached(job.step + 5)
        assert job.pod()["metadata"]["uid"] == pod
    finally:
        subprocess.run([helm_program(), "rollback", name, *wait], check=True, capture_output=True, text=True)
    status = job.phase("Succeeded")
    assert [attempt["number"] for attempt in status["attempts"]] == [1]
    assert [record["step"] for record in metrics_of(job.read_output(tmp_path))] == list(range(1, 61)), "each step once"


def next_chart(folder: Path) -> Path:
    """The chart as a next version might be: its definition has more fields, which it fills into jobs that run."""
    target = folder / "nemo-rl-operator"
    shutil.copytree(CHART, target)
    chart = yaml.safe_load((target / "Chart.yaml").read_text())
    (target / "Chart.yaml").write_text(yaml.safe_dump({**chart, "version": "0.1.1-next"}))
    file = target / "files" / "nemo-rl.io_rltrainingjobs.yaml"
    definition, *policy = yaml.safe_load_all(file.read_text())
    root = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    fields = root["spec"]["properties"]
    fields["training"]["properties"]["noticed"] = {"type": "string", "description": "A new field."}
    fields["training"]["properties"]["fp8"] = {
        "type": "boolean",
        "default": False,
        "description": "One with a default.",
    }
    fields["later"] = {
        "type": "object",
        "default": {},
        "properties": {"mode": {"type": "string", "default": "auto"}},
        "description": "A new section.",
    }
    file.write_text(yaml.safe_dump_all([definition, *policy], sort_keys=False))
    return target


def test_uninstalling_leaves_jobs_and_their_data(place: Scene, tmp_path: Path):
    own = Release("gone", [place.namespace], tests={"enabled": False}).open()
    try:
        own.install()
        job = place.apply(place.manifests.sft("kept", steps=2))
        job.phase("Succeeded")
        own.uninstall()
        assert own.kubectl.items("deployments") == []
        assert [found["metadata"]["name"] for found in place.kubectl.items(names.PLURAL, "-l", "!none")].count(
            "kept"
        ) == 1
        assert [record["step"] for record in metrics_of(job.read_output(tmp_path))] == [1, 2]
    finally:
        own.close()


def test_nothing_of_a_release_is_left_behind(release: Release):
    """Last in this file: takes the release of these tests away and looks for what it made."""
    kinds = {
        (found["kind"], found["metadata"].get("namespace"), found["metadata"]["name"]) for found in release.manifests()
    }
    release.uninstall()
    left = []
    for kind, namespace, name in sorted(kinds, key=str):
        answer = Kubectl(namespace)("get", kind, name, "-o", "name", check=False)
        if "NotFound" not in answer:
            left.append((kind, namespace, name, answer))
    assert left == []
    assert names.CRD_NAME in Kubectl()("get", "crd", names.CRD_NAME, "-o", "name")
