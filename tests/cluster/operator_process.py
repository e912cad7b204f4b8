"""The operator as a process of its own, as a cluster would run it: started, killed, and its log kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from cluster.api import eventually
from lab.control_plane import free_ports
from nemo_rl.job import names

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/trainer:test"
SETTINGS = {names.IMAGE_VARIABLE: IMAGE, "NEMO_RL_OPERATOR_RESYNC_SECONDS": "5"}


class Operator:
    """One operator process. kill() is kill -9; start() after it is a restart."""

    def __init__(
        self, kubeconfig: Path, log: Path, namespaces: Sequence[str] = (), settings: dict[str, str] | None = None
    ) -> None:
        self.kubeconfig, self.log, self.namespaces = kubeconfig, log, list(namespaces)
        self.settings = SETTINGS | (settings or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.health_port, self.metrics_port = 0, 0

    def start(self) -> Operator:
        self.health_port, self.metrics_port = free_ports(2)
        command = [sys.executable, "-m", "cluster.quick_operator", "run"]
        for namespace in self.namespaces:
            command += ["--namespace", namespace]
        command += ["--health-port", str(self.health_port), "--metrics-port", str(self.metrics_port)]
        environment = os.environ | self.settings
        environment |= {"KUBECONFIG": str(self.kubeconfig), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "operator", "tests"))
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return self

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_ready(self) -> Operator:
        def ready() -> bool:
            assert self.running, f"the operator ended: {self.tail()}"
            return self.probe("/readyz") == 200

        eventually(ready, "the operator is ready", 60)
        return self

    def probe(self, path: str) -> int:
        """The status code of the health server's answer; 0 when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}{path}", timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metrics(self) -> dict[str, float]:
        """Every sample by its full name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as response:
            text = response.read().decode()
        found = re.findall(r"^([^#\s].*) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def stop(self) -> float:
        """SIGTERM; the seconds until the process ended."""
        if not self.running or self.process is None:
            return 0.0
        begin = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the operator did not end within 20 s of SIGTERM: {self.tail()}") from None
        return time.monotonic() - begin

    def tail(self, count: int = 40) -> str:
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


class Operators:
    """All operator processes of the session: one that many tests share, and those of single tests.

    The shared one serves all namespaces, so it does not run beside an operator that a test starts for itself.
    """

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.kubeconfig, self.folder = kubeconfig, folder
        self.shared: Operator | None = None
        self.own: list[Operator] = []

    def share(self) -> Operator:
        if self.shared is None:
            self.shared = Operator(self.kubeconfig, self.folder / "shared.log")
        if not self.shared.running:
            self.shared.start().wait_ready()
        return self.shared

    def make(self, namespace: str, kubeconfig: Path | None = None, **settings: str) -> Operator:
        """An operator for the namespace alone, not started yet."""
        if self.shared and self.shared.running:
            self.shared.stop()
        log = self.folder / f"{namespace}-{len(self.own)}.log"
        operator = Operator(kubeconfig or self.kubeconfig, log, [namespace], settings)
        self.own.append(operator)
        return operator

    def end(self) -> None:
        for operator in self.own:
            operator.kill()
        self.own.clear()
