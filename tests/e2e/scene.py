"""One test's own namespace and the jobs in it: apply, follow, disturb, and read what they wrote."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2e.kubectl import Kubectl, Object, Watch, eventually
from e2e.manifests import Manifests
from nemo_rl.job import names
from nemo_rl.run.metrics import read_history

SECONDS = 240.0
"""A deadline that only a stuck cluster misses, on a loaded machine too: pods import torch for up to half a minute."""
FINAL = ("Succeeded", "Failed")
RESTRICTED = "pod-security.kubernetes.io/enforce"
# the worker, and not its launcher, which is process 1 and cannot be killed from within the pod
KILL = """
import os, signal, sys
for path in sys.argv[1:]:
    open(path, "w").close()
for entry in filter(str.isdigit, os.listdir("/proc")):
    words = open(f"/proc/{entry}/cmdline").read().split("\\0")
    if int(entry) not in (1, os.getpid()) and "nemo_rl.worker" in words:
        os.kill(int(entry), signal.SIGKILL)
        print("killed")
"""


class Scene:
    """A namespace where only pods of the restricted level may run, with the model's bundle in it."""

    def __init__(self, word: str, manifests: Manifests) -> None:
        word = "".join(c if c.isalnum() else "-" for c in word.lower())[:36].strip("-")
        self.namespace = f"e2e-{word}-{uuid.uuid4().hex[:6]}"
        self.kubectl = Kubectl(self.namespace)
        self.manifests = manifests
        self.jobs: list[TrainingJob] = []

    def open(self) -> Scene:
        metadata = {"name": self.namespace, "labels": {RESTRICTED: "restricted"}}
        Kubectl().apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        self.kubectl.apply(*self.manifests.config_maps())
        eventually(
            lambda: "default" in self.kubectl("get", "serviceaccounts", check=False), "a service account", SECONDS
        )
        return self

    def apply(self, manifest: Object) -> TrainingJob:
        job = TrainingJob(self, manifest["metadata"]["name"])
        self.jobs.append(job)
        self.kubectl.apply(manifest)
        return job

    def close(self) -> None:
        """Lets everything go, without waiting for it."""
        for job in self.jobs:
            job.close()
        Kubectl()("delete", "namespace", self.namespace, "--wait=false", check=False)

    def read_claim(self, claim: str, image: str, target: Path) -> Path:
        """Copies all files of a claim into a folder, by a pod that mounts it."""
        name = f"read-{uuid.uuid4().hex[:6]}"
        self.kubectl.apply(reader(name, claim, image))
        self.kubectl("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={SECONDS:.0f}s", seconds=SECONDS + 10)
        command = [*self.kubectl.prefix, "exec", name, "--", "tar", "-C", names.OUTPUT_DIR, "-cf", "-", "."]
        archive = subprocess.run(command, capture_output=True, check=True, timeout=SECONDS).stdout
        self.kubectl("delete", "pod", name, "--wait=false", "--grace-period=1")
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            opened.extractall(target, filter="data")
        return target

    def describe(self) -> list[tuple[str, str]]:
        """What there is in the namespace, for the report of a failure."""
        kinds = f"{names.PLURAL},jobs,pods,pvc"
        found = [
            ("objects", self.kubectl("get", kinds, "-o", "wide", check=False)),
            ("jobs", self.kubectl("get", names.PLURAL, "-o", "yaml", check=False)[-20_000:]),
            ("pods", self.kubectl("describe", "pods", check=False)[-20_000:]),
            ("events", self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)[-6_000:]),
        ]
        for job in self.jobs:
            selector = f"{names.LABEL_JOB}={job.name}"
            text = self.kubectl("logs", "--prefix", "--tail=80", "-l", selector, check=False)
            found.append((f"log of {job.name}", text[-15_000:]))
        return found


class TrainingJob:
    """One RLTrainingJob; every state of it since it was applied is kept."""

    def __init__(self, scene: Scene, name: str) -> None:
        self.scene, self.name, self.kubectl = scene, name, scene.kubectl
        # by a selector, which may name what does not exist yet
        self._watch = Watch(self.kubectl, names.PLURAL, "--field-selector", f"metadata.name={name}")

    def close(self) -> None:
        self._watch.close()

    # --- what it says

    @property
    def states(self) -> list[Object]:
        """Every status so far, oldest first."""
        return [dict(found.get("status") or {}) for _, found in list(self._watch.states)]

    @property
    def status(self) -> Object:
        states = self.states
        return states[-1] if states else {}

    @property
    def phases(self) -> list[str]:
        """The phases so far, each once for as long as it lasted."""
        seen = [state["phase"] for state in self.states if state.get("phase")]
        return [phase for i, phase in enumerate(seen) if i == 0 or phase != seen[i - 1]]

    @property
    def step(self) -> int:
        return int(self.status.get("progress", {}).get("step", 0))

    def until(self, check: Callable[[Object], Any], what: str, seconds: float = SECONDS) -> Object:
        """The status, once the check holds; AssertionError at the deadline, or when the job is over without it."""

        def asked() -> Object | None:
            status = self.status
            if _holds(check, status):
                return status
            if status.get("phase") in FINAL:
                raise AssertionError(f"{self.name} is over, without {what}: {json.dumps(status, indent=1)}")
            return None

        found = self._watch.until(asked, seconds)
        if found is None:
            raise AssertionError(f"{self.name}: not within {seconds:.0f} s: {what}; found {json.dumps(self.status)}")
        return dict(found)

    def phase(self, *wanted: str, seconds: float = SECONDS) -> Object:
        return self.until(lambda status: status.get("phase") in wanted, f"phase {' or '.join(wanted)}", seconds)

    def reached(self, step: int, attempt: int = 1, seconds: float = SECONDS) -> Object:
        """The status, once an attempt has taken so many steps of the whole run."""
        return self.until(
            lambda status: status["attempt"] == attempt and status["progress"]["step"] >= step,
            f"step {step} in attempt {attempt}",
            seconds,
        )

    def message(self, *fragments: str, seconds: float = SECONDS) -> Object:
        return self.until(
            lambda status: all(f in status["message"] for f in fragments), f"a message with {fragments}", seconds
        )

    def gone(self, seconds: float = SECONDS) -> None:
        get = ("get", names.PLURAL, self.name, "--ignore-not-found")
        eventually(lambda: not self.kubectl(*get), f"{self.name} is gone; found {self.status}", seconds)

    # --- its pods

    def pods(self, attempt: int | None = None) -> list[Object]:
        selector = f"{names.LABEL_JOB}={self.name},{names.LABEL_COMPONENT}={names.COMPONENT_TRAINER}"
        if attempt is not None:
            selector += f",{names.LABEL_ATTEMPT}={attempt}"
        return self.kubectl.items("pods", "-l", selector)

    def pod(self, index: int = 0, attempt: int = 1) -> Object:
        """The pod with that index."""

        def find() -> Object | None:
            found = [pod for pod in self.pods(attempt) if index_of(pod) == index]
            return found[0] if found else None

        return dict(eventually(find, f"pod {index} of attempt {attempt}", SECONDS))

    def no_pods(self, seconds: float = SECONDS) -> None:
        def ended() -> bool:
            return all(pod["status"]["phase"] in ("Succeeded", "Failed") for pod in self.pods())

        eventually(ended, f"the pods of {self.name} have ended", seconds)

    def log(self, attempt: int = 1, index: int = 0) -> str:
        return self.kubectl("logs", self.pod(index, attempt)["metadata"]["name"])

    def execute(self, *command: str, index: int = 0, attempt: int = 1, check: bool = True) -> str:
        return self.kubectl("exec", self.pod(index, attempt)["metadata"]["name"], "--", *command, check=check)

    def kill_worker(self, *marks: str, index: int = 0, attempt: int = 1) -> None:
        """Ends the worker in a pod without warning, as the kernel does when memory is short; `marks` are files made just before."""
        assert "killed" in self.execute("python", "-c", KILL, *marks, index=index, attempt=attempt)

    def patch(self, **spec: Any) -> None:
        self.kubectl("patch", names.PLURAL, self.name, "--type=merge", "-p", json.dumps({"spec": spec}))

    # --- what it wrote

    def read_output(self, target: Path) -> Path:
        """Copies its output claim; returns the folder of its run there."""
        pod = self.kubectl.items("pods", "-l", f"{names.LABEL_JOB}={self.name}")[0]
        image = pod["spec"]["containers"][0]["image"]
        claim = next(v for v in pod["spec"]["volumes"] if v["name"] == "output")["persistentVolumeClaim"]["claimName"]
        return self.scene.read_claim(claim, image, target) / self.name


def _holds(check: Callable[[Object], Any], status: Object) -> bool:
    try:
        return bool(check(status))
    except (KeyError, IndexError):
        return False  # the field is not there yet


def index_of(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][names.ANNOTATION_JOB_INDEX])


def metrics_of(run: Path) -> list[Object]:
    """metrics.jsonl of a run, without the fields that tell how long something took."""
    return [
        {key: value for key, value in record.items() if not key.endswith(("_seconds", "_per_second"))}
        for record in read_history(run / "metrics.jsonl")
    ]


def reader(name: str, claim: str, image: str) -> Object:
    """A pod that mounts a claim and waits to be asked."""
    container = {
        "name": "read",
        "image": image,
        "command": ["sleep", "3600"],
        "volumeMounts": [{"name": "output", "mountPath": names.OUTPUT_DIR, "readOnly": True}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": "output", "persistentVolumeClaim": {"claimName": claim}}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
