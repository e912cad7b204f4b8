"""One test's own namespace, with the jobs in it: submit, look, wait, and play the pods."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.api import WAIT_SECONDS, Api, ApiError, Object, eventually, path
from cluster.kubelet import Kubelet, PlayedPod
from cluster.manifests import job, result
from nemo_rl.job import names

FINAL = ("Succeeded", "Failed")
USER = "mallory"
"""Who holds the chart's role for users in a scene's namespace, and nothing else."""
COUNTER = itertools.count()


class Scene:
    """A namespace of a cluster. Every wait has a deadline and says what was there instead."""

    def __init__(self, api: Api, kubectl: Callable[..., str], kubelet: Kubelet, word: str) -> None:
        self.api, self._kubectl, self.kubelet = api, kubectl, kubelet
        word = "".join(c if c.isalnum() else "-" for c in word.lower())[:40].strip("-")
        self.namespace = f"t{os.getpid()}-{next(COUNTER)}-{word}"

    def open(self) -> Scene:
        self.api.create("namespaces", None, {"metadata": {"name": self.namespace}})
        eventually(lambda: self.api.find("serviceaccounts", self.namespace, "default"), "the default service account")
        return self

    def close(self) -> None:
        """Lets everything go, without waiting for it: namespaces have names of their own."""
        self.kubelet.automatic.pop(self.namespace, None)
        self.api.delete("namespaces", None, self.namespace)

    def submit(self, name: str = "x", algorithm: str = "grpo", **spec: Any) -> Object:
        return self.api.create(names.PLURAL, self.namespace, job(name, algorithm, **spec))

    def change(self, name: str = "x", **spec: Any) -> Object:
        return self.api.patch(names.PLURAL, self.namespace, name, {"spec": spec})

    def job(self, name: str = "x") -> Object:
        return self.api.get(names.PLURAL, self.namespace, name)

    def status(self, name: str = "x") -> Object:
        return dict(self.job(name).get("status") or {})

    def condition(self, kind: str, name: str = "x") -> Object:
        found = [c for c in self.status(name).get("conditions", []) if c["type"] == kind]
        return found[0] if found else {}

    def until(
        self, check: Callable[[Object], Any], what: str, name: str = "x", seconds: float = WAIT_SECONDS
    ) -> Object:
        """The status, once the check holds; AssertionError with the last status otherwise."""
        limit = time.monotonic() + seconds
        status: Object = {}
        while time.monotonic() < limit:
            try:
                status = self.status(name)
                if check(status):
                    return status
            except (KeyError, IndexError):
                pass
            except (OSError, ApiError) as error:
                status = {"no answer": repr(error)}
            time.sleep(0.05)
        raise AssertionError(f"{self.namespace}/{name}: not within {seconds:.0f} s: {what}; last status: {status}")

    def phase(self, *phases: str, name: str = "x", seconds: float = WAIT_SECONDS) -> Object:
        wanted = (*phases, *FINAL)
        status = self.until(lambda s: s.get("phase") in wanted, f"phase {' or '.join(phases)}", name, seconds)
        assert status["phase"] in phases, f"{self.namespace}/{name}: found {status}, wanted phase {phases}"
        return status

    def message(self, *fragments: str, name: str = "x", seconds: float = WAIT_SECONDS) -> Object:
        """The status, once its message has all these fragments (in any case of letters)."""

        def check(status: Object) -> bool:
            return all(f.lower() in status.get("message", "").lower() for f in fragments)

        return self.until(check, f"a message with {fragments}", name, seconds)

    def attempt(self, number: int, name: str = "x", index: int = 0) -> PlayedPod:
        """The pod of an attempt's Job."""
        return self.kubelet.pod(self.namespace, names.attempt_job(name, number), index)

    def jobs(self, name: str = "x") -> list[Object]:
        found = self.api.list("jobs", self.namespace, f"{names.LABEL_JOB}={name}")
        return sorted(found, key=lambda o: int(o["metadata"]["name"].rpartition("-")[2]))

    def gone(self, kind: str, name: str, seconds: float = WAIT_SECONDS) -> None:
        eventually(lambda: self.api.find(kind, self.namespace, name) is None, f"{kind} {name} is gone", seconds)

    def record(self, name: str = "x") -> list[Object]:
        """A list that every status of the job goes to from now on, each change once."""
        version = self.api.request("GET", path(names.PLURAL))["metadata"]["resourceVersion"]
        seen: list[Object] = []

        def follow() -> None:
            with contextlib.suppress(OSError, ApiError, http.client.HTTPException):
                for event in self.api.watch(names.PLURAL, version, 120):
                    found = event["object"]
                    if event["type"] != "BOOKMARK" and found["metadata"].get("namespace") == self.namespace:
                        status = found.get("status") or {}
                        if found["metadata"]["name"] == name and seen[-1:] != [status]:
                            seen.append(status)

        threading.Thread(target=follow, name="recorder", daemon=True).start()
        return seen

    def succeed(self, attempt: int = 1, name: str = "x", steps: int = 10) -> Object:
        """Plays an attempt through to its good end; the final status."""
        pod = self.attempt(attempt, name)
        pod.run().exit(0, result(steps))
        return self.phase("Succeeded", name=name)

    def events(self, name: str = "x") -> list[Object]:
        found = self.api.list("events", self.namespace)
        return [
            e for e in found if e["involvedObject"].get("name") == name and e["involvedObject"]["kind"] == names.KIND
        ]

    def kubectl(self, *words: str, stdin: str = "", check: bool = True) -> str:
        return self._kubectl("-n", self.namespace, *words, stdin=stdin, check=check)

    def secret(self, name: str, **content: str) -> None:
        self.api.create("secrets", self.namespace, {"metadata": {"name": name}, "stringData": content})


def run_kubectl(program: Path, kubeconfig: Path, cache: Path) -> Callable[..., str]:
    """kubectl as a function: its output; with check=False output and errors, whatever the exit code."""

    def kubectl(*words: str, stdin: str = "", check: bool = True) -> str:
        # a cache of its own: kubectl keeps what it discovered for hours, and here definitions come and go
        command = [str(program), f"--kubeconfig={kubeconfig}", f"--cache-dir={cache}", *words]
        result = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
        if check and result.returncode:
            raise AssertionError(f"kubectl {' '.join(words)} ended with {result.returncode}: {result.stderr}")
        return result.stdout if check else result.stdout + result.stderr

    return kubectl
