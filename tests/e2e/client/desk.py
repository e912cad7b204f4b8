"""A user's desk: a folder, a namespace as the context's own, and the programs that a user starts there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from e2e.kubectl import Kubectl, Object
from e2e.scene import SECONDS, Scene
from nemo_rl.job import names

ROOT = Path(__file__).resolve().parents[3]


class Desk:
    """Everything that is started here finds the cluster by KUBECONFIG, and the namespace by the context."""

    def __init__(self, folder: Path, scene: Scene) -> None:
        self.folder, self.scene, self.kubectl = folder, scene, scene.kubectl
        self.namespace = scene.namespace
        self.kubeconfig = folder / "kubeconfig"
        config = yaml.safe_load(Kubectl()("config", "view", "--raw", "--minify", "--flatten"))
        config["contexts"][0]["context"]["namespace"] = self.namespace
        self.kubeconfig.write_text(yaml.safe_dump(config))
        self.kubeconfig.chmod(0o600)

    @property
    def environment(self) -> dict[str, str]:
        return {"KUBECONFIG": str(self.kubeconfig), "NEMO_RL_BACKEND": "kubernetes"}

    def jobs(self) -> list[Object]:
        return self.kubectl.items(names.PLURAL)

    def start(self, script: str, *words: str, python: str | Path = sys.executable, **environment: str) -> Program:
        """Runs a script of the folder or of elsewhere, with these arguments."""
        command = [str(python), "-u", script, *words]
        return Program(command, self.folder, {**os.environ, **self.environment, **environment})

    def run(self, script: str, *, seconds: float = 2 * SECONDS, **more: Any) -> str:
        """The output of a script that ends well."""
        program = self.start(script, **more)
        code = program.end(seconds)
        assert code == 0, f"{script} ended with {code}:\n{program.text[-8000:]}"
        return program.text


class Program:
    """A process whose output is read as it comes."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def until(self, holds: Callable[[str], Any], what: str, seconds: float = SECONDS) -> str:
        """The first line for which it holds; AssertionError when the process ends without one."""
        limit, seen = time.monotonic() + seconds, 0
        with self._changed:
            while True:
                for line in self.lines[seen:]:
                    if holds(line):
                        return line
                seen = len(self.lines)
                left = limit - time.monotonic()
                assert left > 0 and not self._ended, f"no {what}; the output:\n{self.text[-8000:]}"
                self._changed.wait(min(left, 1.0))

    def end(self, seconds: float = SECONDS) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds:.0f} s; the output:\n{self.text[-8000:]}") from None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """With all processes that it started, without warning."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
