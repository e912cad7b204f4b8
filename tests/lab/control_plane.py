"""etcd, API server and controller manager as ordinary processes: no root, no namespaces, several at once.

There is no scheduler and no kubelet, so pods stay as they are made until somebody plays their part.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import pki, programs
from lab.settings import LabError
from ports import free_ports

START_SECONDS = 90
# what a training job needs of the controller manager; the others would only cost memory and time
CONTROLLERS = (
    "job-controller",
    "statefulset-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "resourcequota-controller",
    "persistentvolumeclaim-protection-controller",
)


class ControlPlane:
    """One control plane, with its data, keys and logs in `folder`.

    start() starts everything; kill() and restart() are for tests of faults; stop() ends what start() began.
    """

    def __init__(self, folder: Path, controllers: tuple[str, ...] = CONTROLLERS) -> None:
        self.folder = folder
        self.controllers = controllers
        self.pki = folder / "pki"
        self.logs = folder / "logs"
        self.kubeconfig = folder / "kubeconfig"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.commands: dict[str, list[str]] = {}
        self.etcd_port, self.peer_port, self.port = 0, 0, 0

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def start(self, before_controllers: Callable[[], None] | None = None) -> None:
        """Starts the programs and waits until they serve.

        before_controllers runs when the API server is ready: definitions applied there are known to the garbage
        collector from its start, rather than half a minute later.
        """
        programs.ensure(programs.CONTROL_PLANE)
        self.logs.mkdir(parents=True, exist_ok=True)
        self._make_keys()
        self.etcd_port, self.peer_port, self.port = free_ports(3)
        self.kubeconfig.write_text(pki.kubeconfig(self.pki, "admin", self.server))
        self.kubeconfig.chmod(0o600)
        self.commands = self._commands()
        self.launch("etcd")
        self.launch("kube-apiserver")
        self.wait_ready()
        if before_controllers:
            before_controllers()
        self.launch("kube-controller-manager")
        self._until("service account", lambda: self.get("/api/v1/namespaces/default/serviceaccounts/default"))

    def stop(self) -> None:
        for name in [*reversed(self.processes)]:
            self.kill(name)

    def launch(self, name: str) -> None:
        with open(self.logs / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                self.commands[name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def kill(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def restart(self, name: str) -> None:
        self.kill(name)
        self.launch(name)
        self.wait_ready()

    def resume(self) -> None:
        """Starts the API server again after it was killed.

        The controller manager is started anew too: of itself it would come back up to half a minute later.
        """
        self.restart("kube-apiserver")
        self.restart("kube-controller-manager")

    def compact(self) -> None:
        """Forgets all old revisions: a watch that asks for one of them is told to list again."""
        current = self._etcd("/v3/kv/range", {"key": "AA=="})["header"]["revision"]
        self._etcd("/v3/kv/compaction", {"revision": current, "physical": True})

    def wait_ready(self) -> None:
        self._until("API server", lambda: self.get("/readyz") is not None)

    def get(self, path: str) -> Any:
        """The parsed answer (text where it is not JSON); None unless it is 200 or nobody answers."""
        context = ssl.create_default_context(cafile=str(self.pki / "ca.crt"))
        context.load_cert_chain(self.pki / "admin.crt", self.pki / "admin.key")
        try:
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=5, context=context)
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
        if response.status != 200:
            return None
        return json.loads(body) if body[:1] == b"{" else body.decode()

    def _etcd(self, path: str, body: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.etcd_port, timeout=10)
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise LabError(f"etcd answered {response.status} to {path}: {answer[:200]!r}")
        return json.loads(answer)

    def _until(self, what: str, check: Callable[[], Any]) -> None:
        limit = time.monotonic() + START_SECONDS
        while not check():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    tail = (self.logs / f"{name}.log").read_text(errors="replace")[-2000:]
                    raise LabError(f"{name} ended with {process.returncode}: {tail}")
            if time.monotonic() > limit:
                raise LabError(f"{what}: not ready within {START_SECONDS} s; see {self.logs}")
            time.sleep(0.05)

    def _make_keys(self) -> None:
        if (self.pki / "sa.pub").exists():
            return
        authority = pki.Authority(self.pki)
        names = ["IP:127.0.0.1", "IP:10.0.0.1", "DNS:localhost"]
        authority.certificate("apiserver", "/CN=kube-apiserver", "serverAuth", names)
        authority.certificate("admin", f"{pki.ADMINISTRATORS}/CN=lab-admin", "clientAuth")
        pki.service_account_keys(self.pki)

    def _commands(self) -> dict[str, list[str]]:
        keys, etcd = self.pki, f"http://127.0.0.1:{self.etcd_port}"
        peer = f"http://127.0.0.1:{self.peer_port}"
        return {
            "etcd": [
                str(programs.path("etcd")),
                "--name=lab",
                f"--data-dir={self.folder}/etcd",
                f"--listen-client-urls={etcd}",
                f"--advertise-client-urls={etcd}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=lab={peer}",
                "--unsafe-no-fsync",
                "--log-level=warn",
            ],
            "kube-apiserver": [
                str(programs.path("kube-apiserver")),
                f"--etcd-servers={etcd}",
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                f"--secure-port={self.port}",
                "--endpoint-reconciler-type=none",
                "--service-cluster-ip-range=10.0.0.0/16",
                "--authorization-mode=RBAC",
                f"--client-ca-file={keys}/ca.crt",
                f"--tls-cert-file={keys}/apiserver.crt",
                f"--tls-private-key-file={keys}/apiserver.key",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={keys}/sa.pub",
                f"--service-account-signing-key-file={keys}/sa.key",
            ],
            "kube-controller-manager": [
                str(programs.path("kube-controller-manager")),
                f"--kubeconfig={self.kubeconfig}",
                f"--root-ca-file={keys}/ca.crt",
                f"--service-account-private-key-file={keys}/sa.key",
                f"--controllers={','.join(self.controllers)}",
                "--use-service-account-credentials=false",
                "--leader-elect=false",
                "--secure-port=0",
                "--kube-api-qps=500",
                "--kube-api-burst=1000",
                "--concurrent-namespace-syncs=20",
                "--namespace-sync-period=5s",
            ],
        }


def _die_with_parent() -> None:
    """Asks the kernel to end this process when the thread that started it ends: nothing outlives a killed test run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
