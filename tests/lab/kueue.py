"""Kueue in the lab: compiled from its Go module, with the definitions and the chart that the module itself carries.

Two ways. In a control plane without nodes it is an ordinary process, and its webhooks are called at their address; the
lab's authority signs their certificate. In the real lab it is a pod, installed by Kueue's own chart.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from lab import images, pki, programs
from lab.control_plane import ControlPlane
from lab.settings import HOME, KUBECONFIG, SOURCE, LabError, fail, need_root, out, say
from ports import free_ports

VERSION = "v0.17.0"
"""As in build/kueue/go.mod."""
FILES = HOME / "kueue" / VERSION
"""Kueue's definitions, webhooks and chart, copied from the module when it was compiled."""
NAMESPACE = "kueue-system"
IMAGE = f"localhost/kueue:{VERSION}"
FRAMEWORK = "RLTrainingJob.v1alpha1.nemo-rl.io"
START_SECONDS = 90
CONVERTED = ("workloads", "clusterqueues", "localqueues", "cohorts", "multikueueclusters")
"""Kinds that are served in two versions: their conversion is a webhook of Kueue's."""
WEBHOOKS = ("job", "workload", "clusterqueue", "resourceflavor", "cohort")
"""Of kinds that the tests make; the others would only be in the way of what has nothing to do with Kueue."""


def ensure() -> None:
    """Compiles Kueue and copies its files into the cache, where they are missing."""
    programs.ensure(("kueue",))
    if FILES.exists():
        return
    environment = os.environ | {"GOFLAGS": "-mod=mod"}
    module = out("go", "mod", "download", "-json", "sigs.k8s.io/kueue", cwd=SOURCE / "build/kueue", env=environment)
    folder = Path(json.loads(module)["Dir"])
    unfinished = FILES.with_name(f".{VERSION}.{os.getpid()}")
    for part in ("config/components/crd/bases", "config/components/webhook", "charts/kueue"):
        shutil.copytree(folder / part, unfinished / part, copy_function=shutil.copyfile)
    for path in unfinished.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # Go's module cache is read-only
    unfinished.rename(FILES)


def configuration(**changes: Any) -> dict[str, Any]:
    """Kueue's configuration: its own defaults, but for what it needs to know about us."""
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": NAMESPACE,
        "leaderElection": {"leaderElect": False},
        "clientConnection": {"qps": 50, "burst": 100},
        "integrations": {"frameworks": ["batch/job"], "externalFrameworks": [FRAMEWORK]},
        **changes,
    }


class Kueue:
    """Kueue as a process beside a control plane; it ends with it. `configure` starts it anew with other settings."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane, self.folder = plane, plane.folder / "kueue"
        self.webhook_port, self.health_port = 0, 0

    def start(self, **changes: Any) -> None:
        """Defines Kueue's kinds and webhooks, starts it, and waits until it serves."""
        ensure()
        self.folder.mkdir(exist_ok=True)
        authority = pki.Authority(self.plane.pki)
        authority.certificate("kueue", "/CN=kueue", "serverAuth", ["IP:127.0.0.1"])
        certificates = self.folder / "certificates"
        certificates.mkdir(exist_ok=True)
        for kind in ("crt", "key"):
            shutil.copyfile(self.plane.pki / f"kueue.{kind}", certificates / f"tls.{kind}")
        self.webhook_port, self.health_port = free_ports(2)
        self._apply(FILES / "config/components/crd/bases")
        self._kubectl("create", "namespace", NAMESPACE)
        for kind in CONVERTED:
            hook = {"conversionReviewVersions": ["v1"], "clientConfig": self._client("/convert")}
            patch = {"spec": {"conversion": {"strategy": "Webhook", "webhook": hook}}}
            self._kubectl(
                *("patch", "crd", f"{kind}.kueue.x-k8s.io", "--type=merge", f"--patch={json.dumps(patch)}"),
            )
        self.configure(**changes)
        webhooks = self.folder / "webhooks.yaml"
        webhooks.write_text(self._webhooks())
        self._apply(webhooks)

    def configure(self, **changes: Any) -> None:
        """(Re)starts Kueue with these changes of its configuration."""
        settings = configuration(
            health={"healthProbeBindAddress": f"127.0.0.1:{self.health_port}"},
            metrics={"bindAddress": "0"},
            webhook={"host": "127.0.0.1", "port": self.webhook_port, "certDir": f"{self.folder}/certificates"},
            internalCertManagement={"enable": False},
            **changes,
        )
        config = self.folder / "config.yaml"
        config.write_text(json.dumps(settings, indent=1))
        run = [str(programs.path("kueue")), f"--config={config}", "--zap-log-level=2"]
        run.append("--feature-gates=VisibilityOnDemand=false")
        # with certificates of its own it insists on those of its metrics, in a folder that is not to be made here
        place = "/etc/kueue/metrics/certs"
        prepare = f"mount -t tmpfs kueue /etc && mkdir -p {place} && cp {self.folder}/certificates/* {place}"
        script = f"{prepare} && exec env KUBECONFIG={shlex.quote(str(self.plane.kubeconfig))} {shlex.join(run)}"
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        self.plane.kill("kueue")
        self.plane.commands["kueue"] = ["unshare", *user, "--mount", "--propagation", "private", "sh", "-c", script]
        self.plane.launch("kueue")
        self._wait()

    def _wait(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while not _answers(self.health_port, "/readyz") or not self._serves_webhooks():
            process = self.plane.processes.get("kueue")
            if process is None or process.poll() is not None:
                tail = (self.plane.logs / "kueue.log").read_text(errors="replace")[-2000:]
                raise LabError(f"Kueue ended: {tail}")
            if time.monotonic() > limit:
                raise LabError(f"Kueue: not ready within {START_SECONDS} s; see {self.plane.logs}/kueue.log")
            time.sleep(0.1)

    def _serves_webhooks(self) -> bool:
        import socket

        try:
            socket.create_connection(("127.0.0.1", self.webhook_port), timeout=2).close()
        except OSError:
            return False
        return True

    def _client(self, path: str) -> dict[str, str]:
        bundle = base64.b64encode((self.plane.pki / "ca.crt").read_bytes()).decode()
        return {"url": f"https://127.0.0.1:{self.webhook_port}{path}", "caBundle": bundle}

    def _webhooks(self) -> str:
        """Kueue's webhook configurations, with its address here in place of its Service."""
        text = (FILES / "config/components/webhook/manifests.yaml").read_text()
        documents = []
        for document in text.split("---\n"):
            head, *entries = re.split(r"^- admissionReviewVersions:", document, flags=re.MULTILINE)
            wanted = [
                e for e in entries if re.search(rf"^  name: [mv]({'|'.join(WEBHOOKS)})\.kb\.io$", e, re.MULTILINE)
            ]
            if wanted:
                name = re.sub(r"^  name: ", "  name: kueue-", head, count=1, flags=re.MULTILINE)
                documents.append(name + "".join(f"- admissionReviewVersions:{entry}" for entry in wanted))
        service = r"    service:\n      name: webhook-service\n      namespace: system\n      path: (\S+)\n"

        def address(match: re.Match[str]) -> str:
            client = self._client(match[1])
            return f"    url: {client['url']}\n    caBundle: {client['caBundle']}\n"

        return "---\n".join(re.sub(service, address, document) for document in documents)

    def _apply(self, path: Path) -> None:
        self._kubectl("apply", "--server-side", "-f", str(path))

    def _kubectl(self, *arguments: str) -> None:
        kubectl = [str(programs.path("kubectl")), f"--kubeconfig={self.plane.kubeconfig}", *arguments]
        done = subprocess.run(kubectl, capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"kubectl {arguments[0]}: {done.stderr.strip()[-500:]}")


def _answers(port: int, path: str) -> bool:
    import http.client

    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def install() -> None:
    """Into the real lab, by Kueue's own chart: a pod, with webhooks, rights and certificates as in any cluster."""
    need_root()
    ensure()
    programs.ensure(("helm",))
    images.load_program(IMAGE, "kueue", "manager")
    repository, _, tag = IMAGE.rpartition(":")
    values = {
        "controllerManager.manager.image.repository": repository,
        "controllerManager.manager.image.tag": tag,
        "controllerManager.manager.image.pullPolicy": "Never",
        "controllerManager.manager.resources.requests.cpu": "50m",
        "controllerManager.manager.podSecurityContext.runAsUser": "1000",
        "controllerManager.readinessProbe.initialDelaySeconds": "1",
        "controllerManager.readinessProbe.periodSeconds": "1",
    }
    settings = configuration(
        health={"healthProbeBindAddress": ":8081"},
        metrics={"bindAddress": ":8443"},
        webhook={"port": 9443},
    )
    sets = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    config = HOME / "tmp" / "kueue.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps({"managerConfig": {"controllerManagerConfigYaml": json.dumps(settings)}}))
    command = [
        *(programs.path("helm"), f"--kubeconfig={KUBECONFIG}", "upgrade", "--install", "kueue"),
        *(FILES / "charts/kueue", "--namespace", NAMESPACE, "--create-namespace", "--values", config),
        *("--wait", "--timeout=180s", *sets),
    ]
    if subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL).returncode:
        fail("helm could not install Kueue; its error is above")
    say(f"Kueue {VERSION}: ready in namespace {NAMESPACE}")
