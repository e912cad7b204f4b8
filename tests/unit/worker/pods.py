"""Pods without a kubelet: a folder as root, the frozen job in it, and the worker in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_rl.backends.kubernetes.ship.archive import Archive
from nemo_rl.job import names
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl.job.status import TerminationMessage
from ports import free_port

HERE = Path(__file__).resolve().parent
SECONDS = 240.0
"""Until a wait counts as failed."""

# Imports the engine once and forks a child for each pod: what is tested begins after that in any case.
SERVER = """
import json, os, sys
import torch, transformers, datasets, transformers.models.qwen2.modeling_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer
import nemo_rl.trainers.grpo, nemo_rl.trainers.sft, nemo_rl.worker.run, nemo_rl.data.loading
import huggingface_hub.constants as hub
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, nemo_rl.run.checkpoint_tensors
from nemo_rl.worker.__main__ import main
torch.set_num_threads(1)
for line in sys.stdin:
    log, environment = json.loads(line)
    if log is None:
        print(os.waitstatus_to_exitcode(os.waitpid(environment, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0); os.dup2(out, 1); os.dup2(out, 2)
        os.environ.update(environment)
        if "HF_ENDPOINT" in environment:  # read at the import, which was before the fork
            hub.ENDPOINT, hub.HF_HUB_OFFLINE, hub.HF_HUB_DISABLE_XET = environment["HF_ENDPOINT"], False, True
        code = 99
        try:
            code = main()
        finally:
            sys.stdout.flush(); os._exit(code)
    print(pid, flush=True)
"""


def until(check: Callable[[], Any], what: str) -> Any:
    """What `check` returns, once that is true."""
    deadline = time.monotonic() + SECONDS
    while not (found := check()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


class Engine:
    """A process with the engine loaded, which forks the pods."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=surroundings(),
        )

    def start(self, log: Path, environment: Mapping[str, str]) -> int:
        """Starts a process of a pod; returns its number."""
        return self._ask(str(log), dict(environment))

    def wait(self, pid: int) -> int:
        """The exit code of a process."""
        return self._ask(None, pid)

    def _ask(self, *request: Any) -> int:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=SECONDS)


def surroundings() -> dict[str, str]:
    added = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **added, "PYTHONPATH": str(HERE)}


class Pod:
    """One pod of a job. `root` is kept between the attempts of a job: its output claim is there."""

    def __init__(self, root: Path, engine: Engine, spec: Mapping[str, Any], *, uid: str = "uid-1") -> None:
        self.root, self.engine = root, engine
        self.log = root / "log"
        self.gate = root / "gate"
        self.number = 0
        for folder in (self.path(names.OUTPUT_DIR), root / "tmp", self.path("/dev"), self.gate):
            folder.mkdir(parents=True, exist_ok=True)
        frozen = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": "yes", "namespace": "team", "uid": uid},
            "spec": RLTrainingJobSpec.model_validate(spec).model_dump(mode="json", by_alias=True),
        }
        self.path(names.JOB_DIR).mkdir(parents=True, exist_ok=True)
        self.path(names.JOB_FILE).write_text(json.dumps(frozen))

    @property
    def output(self) -> Path:
        return self.path(names.OUTPUT_DIR) / "yes"

    def path(self, absolute: str) -> Path:
        return self.root / absolute.lstrip("/")

    def environment(self, **more: str) -> dict[str, str]:
        places = {"NEMO_RL_POD_ROOT": str(self.root), "NEMO_RL_POD_PORT": "0", "TMPDIR": str(self.root / "tmp")}
        return {**places, "GATE": str(self.gate), **more}

    def start(self, **environment: str) -> Pod:
        """Starts the next attempt, in a pod with a log and a termination log of its own."""
        self.log.unlink(missing_ok=True)
        self.path(names.TERMINATION_LOG).write_bytes(b"")
        self.pid = self.engine.start(self.log, self.environment(**environment))
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        """The exit code."""
        return self.engine.wait(self.pid)

    def run(self, **environment: str) -> int:
        return self.start(**environment).end()

    def wait_at_gate(self) -> None:
        until((self.gate / "reached").exists, f"the run to reach the gate; it says {self.said()}")

    def open_gate(self) -> None:
        (self.gate / "open").touch()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def word(self) -> TerminationMessage:
        text = self.path(names.TERMINATION_LOG).read_text()
        assert len(text.encode()) <= names.TERMINATION_LIMIT
        found = TerminationMessage.parse(text)
        assert found is not None, text
        return found

    def port(self) -> int:
        return int(until(lambda: re.search(r"on port (\d+)", self.said()), "the port")[1])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port()}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def history(self) -> list[dict[str, Any]]:
        """The steps of metrics.jsonl without what clocks say."""
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in rows]


class Job:
    """The pods of a job, one rank in each, with one output claim for all and the environment that torchrun makes."""

    def __init__(self, root: Path, engine: Engine, spec: Mapping[str, Any], size: int = 2) -> None:
        self.pods = [Pod(root / f"pod-{rank}", engine, spec) for rank in range(size)]
        for pod in self.pods[1:]:
            pod.path(names.OUTPUT_DIR).rmdir()
            pod.path(names.OUTPUT_DIR).symlink_to(self.pods[0].path(names.OUTPUT_DIR))

    def start(self, **environment: str) -> Job:
        port = str(free_port())
        for rank, pod in enumerate(self.pods):
            where = {"RANK": str(rank), "WORLD_SIZE": str(len(self.pods)), "LOCAL_RANK": "0"}
            pod.start(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **where, **environment)
        return self

    def end(self) -> list[int]:
        """The exit codes, by rank."""
        return [pod.end() for pod in self.pods]

    def run(self, **environment: str) -> list[int]:
        return self.start(**environment).end()


def mount(pod_root: Path, name: str, archive: Archive, python: str | None = None) -> dict[str, Any]:
    """Mounts what the client ships, as the operator does; returns its entry in spec.bundles."""
    folder = pod_root / names.BUNDLE_DIR.lstrip("/") / name
    folder.mkdir(parents=True)
    for index, part in enumerate(archive.parts):
        (folder / names.bundle_part(index)).write_bytes(part)
    return archive.spec(name, python).model_dump(mode="json", by_alias=True)
