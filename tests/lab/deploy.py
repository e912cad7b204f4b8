"""The project in the lab: its images and its operator, built, loaded and installed as far as something has changed."""

from __future__ import annotations

import fcntl
import json
import subprocess
import tomllib

from lab import cluster, images, programs
from lab.settings import BASE_IMAGE, HOME, KUBECONFIG, SOURCE, fail, need_root, say

PROJECT = SOURCE.parents[1]
NAMESPACE = "nemo-rl-system"
RELEASE = "nemo-rl-operator"
TORCH = "tests/lab/images/torch/Dockerfile"
TRAINER = "trainer_image/Dockerfile"
OPERATOR = "trainer_image/operator.Dockerfile"
SECURITY = "pod-security.kubernetes.io/enforce=restricted"
WAIT = "120s"
SCRAPES = {"lab/scrapes": "yes"}
"""Label of the namespaces from where metrics are scraped."""


def deploy() -> None:
    """Builds and loads the images, and installs or upgrades the operator's release; a second call costs seconds."""
    need_root()
    if not cluster.is_up():
        fail("the lab is down; start it with `make lab-up`")
    programs.ensure(("helm",))
    with open(HOME / "deploy.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        version = project_version()
        trainer, operator = f"localhost/nemo-rl-trainer:{version}", f"localhost/nemo-rl-operator:{version}"
        build_images(version, trainer, operator)
        install(trainer, operator)


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


def install(trainer: str, operator: str) -> None:
    """By the chart, as users do. The image's id among the pod's annotations makes a new pod of a new image."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    name, value = SECURITY.split("=")
    namespace["metadata"]["labels"] = {name: value}  # type: ignore[index]
    cluster.kubectl("apply", "-f", "-", input=json.dumps(namespace), text=True, stdout=subprocess.DEVNULL)
    repositories = {"image": operator, "trainerImage": trainer}
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
