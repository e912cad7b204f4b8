"""kubectl as the tests use it: the cluster of the current KUBECONFIG, whatever it is, and nothing that a user lacks."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

Object = dict[str, Any]
PROGRAM = os.environ.get("KUBECTL", "kubectl")
COMMAND_SECONDS = 120.0


class Kubectl:
    """Runs kubectl in one namespace, or in none."""

    def __init__(self, namespace: str | None = None) -> None:
        self.prefix = [PROGRAM, *(["--namespace", namespace] if namespace else [])]

    def __call__(self, *words: str, stdin: str = "", check: bool = True, seconds: float = COMMAND_SECONDS) -> str:
        """Its output. check=False: output and errors, whatever the exit code. AssertionError with its errors otherwise."""
        result = subprocess.run([*self.prefix, *words], input=stdin, capture_output=True, text=True, timeout=seconds)
        if check and result.returncode:
            raise AssertionError(f"kubectl {' '.join(words)} ended with {result.returncode}: {result.stderr.strip()}")
        return result.stdout if check else result.stdout + result.stderr

    def json(self, *words: str) -> Any:
        return json.loads(self("get", *words, "-o", "json"))

    def items(self, *words: str) -> list[Object]:
        return list(self.json(*words)["items"])

    def apply(self, *objects: Object) -> None:
        """Server-side: the client's own way keeps a copy in an annotation, for which a part of a bundle is too large."""
        self(
            "apply",
            "--server-side",
            "-f",
            "-",
            stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}),
        )

    def stream(self, *words: str) -> subprocess.Popen[str]:
        """A command that goes on until it is ended, such as `get -w` or `logs -f`; both outputs in one."""
        return subprocess.Popen(
            [*self.prefix, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


class Stream:
    """A command that goes on until close(), read by a thread. With `again` it is started anew when it ends.

    Servers end a watch now and then, and all watches of a resource whose definition changes.
    """

    def __init__(self, kubectl: Kubectl, *words: str, again: bool = False) -> None:
        self.kubectl, self.words, self.again = kubectl, words, again
        self.changed = threading.Condition()
        self.closed = False
        self.process = kubectl.stream(*words)
        threading.Thread(target=self._follow, name=f"kubectl {words[0]}", daemon=True).start()

    def take(self, line: str) -> None:
        """What becomes of a line; called with `changed` held."""
        raise NotImplementedError

    def _follow(self) -> None:
        while True:
            assert self.process.stdout
            for line in self.process.stdout:
                with self.changed:
                    self.take(line.rstrip("\n"))
                    self.changed.notify_all()
            self.process.wait()
            time.sleep(0.2)
            with self.changed:
                if self.closed or not self.again:
                    return
                self.process = self.kubectl.stream(*self.words)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.process.kill()
        self.process.wait()


class Lines(Stream):
    """What a command prints, each line with the time when it came."""

    def __init__(self, kubectl: Kubectl, *words: str, again: bool = False) -> None:
        self.found: list[tuple[float, str]] = []
        super().__init__(kubectl, *words, again=again)

    def take(self, line: str) -> None:
        self.found.append((time.monotonic(), line))

    @property
    def text(self) -> list[str]:
        return [line for _, line in self.found]


class Watch(Stream):
    """Every state of the objects that `kubectl get WORDS --watch` shows, from now on."""

    def __init__(self, kubectl: Kubectl, *words: str) -> None:
        self.states: list[tuple[float, Object]] = []
        super().__init__(kubectl, "get", *words, "-o", "json", "--watch", "--output-watch-events", again=True)

    def take(self, line: str) -> None:
        if line.startswith("{"):  # one event a line; all else is what kubectl says when it ends
            self.states.append((time.monotonic(), json.loads(line)["object"]))

    def until(self, check: Callable[[], Any], seconds: float) -> Any:
        """The first true answer of a check that is asked after each change; None at the deadline."""
        limit = time.monotonic() + seconds
        with self.changed:
            while not (found := check()):
                left = limit - time.monotonic()
                if left <= 0:
                    return None
                self.changed.wait(min(left, 1.0))
        return found


def eventually(check: Callable[[], Any], what: str, seconds: float) -> Any:
    """Asks again and again until the answer is true, and returns it; AssertionError with `what` at the deadline."""
    limit = time.monotonic() + seconds
    while not (found := check()):
        if time.monotonic() > limit:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)
    return found
