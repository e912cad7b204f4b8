"""The operator as a process of its own, as a cluster would run it: started, killed, and its log kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.api import eventually
from nemo_rl.job import names
from ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/trainer:test"
ROLLOUT_IMAGE = "localhost/rollout:test"
SETTINGS = {
    names.IMAGE_VARIABLE: IMAGE,
    names.ROLLOUT_IMAGE_VARIABLE: ROLLOUT_IMAGE,
    "NEMO_RL_OPERATOR_RESYNC_SECONDS": "5",
}


class Nursery:
    """Starts operator processes quickly; see quick_operator."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> int:
        with self.lock:
            if self.process is None:
                paths = os.pathsep.join(str(ROOT / part) for part in (".", "operator", "tests"))
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "cluster.quick_operator"],
                    env=os.environ | {"PYTHONPATH": paths},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            assert self.process.stdin
            assert self.process.stdout
            wish = {"arguments": arguments, "environment": environment, "log": str(log)}
            self.process.stdin.write(json.dumps(wish) + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())

    def close(self) -> None:
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait(10)


class Operator:
    """One operator process. kill() is kill -9; start() after it is a restart."""

    def __init__(
        self,
        nursery: Nursery,
        kubeconfig: Path,
        log: Path,
        namespaces: Sequence[str] = (),
        settings: dict[str, str] | None = None,
    ) -> None:
        self.nursery, self.kubeconfig, self.log, self.namespaces = nursery, kubeconfig, log, list(namespaces)
        self.settings = SETTINGS | (settings or {})
        self.pid = 0
        self.health_port, self.metrics_port = 0, 0

    def start(self) -> Operator:
        self.health_port, self.metrics_port = free_ports(2)
        arguments = ["run", "--health-port", str(self.health_port), "--metrics-port", str(self.metrics_port)]
        for namespace in self.namespaces:
            arguments += ["--namespace", namespace]
        environment = self.settings | {"KUBECONFIG": str(self.kubeconfig)}
        self.pid = self.nursery.start(arguments, environment, self.log)
        return self

    @property
    def running(self) -> bool:
        return alive(self.pid)

    def wait_ready(self) -> Operator:
        def ready() -> bool:
            assert self.running, f"the operator ended: {self.tail()}"
            return self.probe("/readyz") == 200

        eventually(ready, "the operator is ready", 60)
        return self

    @contextlib.contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Plays a Deployment's part: starts it again when it ended, or says of itself that it is not alive."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                if not self.running or self.probe("/healthz") == 500:
                    self.kill()
                    self.start()
                    ended.wait(2)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def probe(self, path: str) -> int:
        """The status code of the health server's answer; 0 when nobody answers."""
        return self._ask(path)[0]

    def say(self, path: str) -> str:
        """The health server's words."""
        return self._ask(path)[1]

    def _ask(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}{path}", timeout=5) as response:
                return int(response.status), response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metrics(self) -> dict[str, float]:
        """Every sample by its full name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as response:
            text = response.read().decode()
        found = re.findall(r"^([^#\s].*) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def kill(self) -> None:
        pid = self.pid
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: not alive(pid), "the operator is gone", 10)

    def stop(self) -> float:
        """SIGTERM; the seconds until the process ended."""
        if not self.running:
            return 0.0
        begin = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        try:
            eventually(lambda: not self.running, f"the operator ended after SIGTERM: {self.tail()}", 20)
        finally:
            self.kill()
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
        self.nursery = Nursery()
        self.shared: Operator | None = None
        self.own: list[Operator] = []

    def share(self) -> Operator:
        if self.shared is None:
            self.shared = Operator(self.nursery, self.kubeconfig, self.folder / "shared.log")
        if not self.shared.running:
            self.shared.start().wait_ready()
        return self.shared

    def make(self, namespace: str, kubeconfig: Path | None = None, **settings: str) -> Operator:
        """An operator for the namespace alone, not started yet."""
        self.pause()
        log = self.folder / f"{namespace}-{len(self.own)}.log"
        operator = Operator(self.nursery, kubeconfig or self.kubeconfig, log, [namespace], settings)
        self.own.append(operator)
        return operator

    def pause(self) -> None:
        """Stops the shared operator; the next test that asks for it starts it again."""
        if self.shared:
            self.shared.stop()

    def close(self) -> None:
        self.end()
        self.pause()
        self.nursery.close()

    def end(self) -> None:
        for operator in self.own:
            operator.kill()
        self.own.clear()


def alive(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
