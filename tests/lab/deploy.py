"""The project in the lab: its images and its operator, built, loaded and installed as far as something has changed."""

from __future__ import annotations

import fcntl
import json
import runpy
import subprocess
import tomllib

from lab import cluster, images, programs
from lab.settings import BASE_IMAGE, HOME, KUBECONFIG, SOURCE, fail, need_root, say

PROJECT = SOURCE.parents[1]
NAMESPACE = "nemo-rl-system"
RELEASE = "nemo-rl-operator"
TORCH = "tests/lab/images/torch/Dockerfile"
TRAINER = "trainer_image/Dockerfile"
VLLM = "tests/lab/images/vllm/Dockerfile"
ROLLOUT = "trainer_image/rollout.Dockerfile"
OPERATOR = "trainer_image/operator.Dockerfile"
SECURITY = "pod-security.kubernetes.io/enforce=restricted"
WAIT = "120s"
SCRAPES = {"lab/scrapes": "yes"}
"""Label of the namespaces from where metrics are scraped."""


def deploy(*, replicas: bool = False) -> None:
    """Builds and loads the images, and installs or upgrades the operator's release; a second call costs seconds.

    replicas: also the image of rollout replicas, and the operator knows it.
    """
    need_root()
    if not cluster.is_up():
        fail("the lab is down; start it with `make lab-up`")
    programs.ensure(("helm",))
    with open(HOME / "deploy.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        version = project_version()
        trainer, operator = f"localhost/nemo-rl-trainer:{version}", f"localhost/nemo-rl-operator:{version}"
        build_images(version, trainer, operator)
        install(trainer, operator, build_rollout_image(version) if replicas else "")


def project_version() -> str:
    return str(tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"])


def build_images(version: str, trainer: str, operator: str) -> None:
    base = ["--build-arg", f"BASE={BASE_IMAGE}"]
    torch = f"localhost/nemo-rl-lab-torch:{version}"
    ignore = ["--ignorefile", str(PROJECT / f"{TORCH}.dockerignore")]
    images.build(torch, str(PROJECT), [*base, "--file", str(PROJECT / TORCH), *ignore], into_node=False)
    dependencies = ["--build-arg", f"DEPENDENCIES={torch}"]
    images.build(trainer, str(PROJECT), [*base, *dependencies, "--file", str(PROJECT / TRAINER)])
    images.build(operator, str(PROJECT), [*base, "--file", str(PROJECT / OPERATOR)])


def build_rollout_image(version: str, *, into_node: bool = True) -> str:
    """vLLM comes from the environment of tests/real_vllm, which is made where it is missing (6 GB, once)."""
    environment = runpy.run_path(str(PROJECT / "tests/real_vllm/environment.py"))
    vllm = f"localhost/nemo-rl-lab-vllm:{environment['VLLM']}-torch-{environment['TORCH']}"
    base = ["--build-arg", f"BASE={BASE_IMAGE}"]
    if vllm not in images.built():
        packages = environment["interpreter"]().parents[1] / f"lib/python{environment['PYTHON']}/site-packages"
        stand_ins = ["--build-context", f"torch={PROJECT / TORCH}".removesuffix("/Dockerfile")]
        files = ["--file", str(PROJECT / VLLM), "--ignorefile", str(PROJECT / f"{VLLM}.dockerignore")]
        images.build(vllm, str(packages), [*base, *stand_ins, *files], into_node=False)
    rollout = f"localhost/nemo-rl-rollout:{version}"
    dependencies = ["--build-arg", f"DEPENDENCIES={vllm}"]
    images.build(rollout, str(PROJECT), [*base, *dependencies, "--file", str(PROJECT / ROLLOUT)], into_node=into_node)
    return rollout


def install(trainer: str, operator: str, rollout: str = "") -> None:
    """By the chart, as users do. The image's id among the pod's annotations makes a new pod of a new image."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    name, value = SECURITY.split("=")
    namespace["metadata"]["labels"] = {name: value}  # type: ignore[index]
    cluster.kubectl("apply", "-f", "-", input=json.dumps(namespace), text=True, stdout=subprocess.DEVNULL)
    repositories = {"image": operator, "trainerImage": trainer} | ({"rolloutImage": rollout} if rollout else {})
    values = [f"podAnnotations.image-id={images.image_id(operator)}"]
    for key, image in repositories.items():
        repository, _, tag = image.rpartition(":")
        values += [f"{key}.repository={repository}", f"{key}.tag={tag}"]
    chart = PROJECT / "charts/nemo-rl-operator"
    sets = [word for value in values for word in ("--set-string", value)]
    scraper = {"namespaceSelector": {"matchLabels": SCRAPES}}
    sets += ["--set-json", f"networkPolicy.metricsFrom={json.dumps([scraper])}"]
    command = [
        *(programs.path("helm"), f"--kubeconfig={KUBECONFIG}", "upgrade", "--install", RELEASE, chart),
        *("--namespace", NAMESPACE, "--wait", f"--timeout={WAIT}", *sets),
    ]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        cluster.kubectl("--namespace", NAMESPACE, "get", "events,pods")
        fail(f"helm could not install {chart.relative_to(PROJECT)}; its error is above")
    say(f"{RELEASE}: ready in namespace {NAMESPACE}, trains with {trainer}")
