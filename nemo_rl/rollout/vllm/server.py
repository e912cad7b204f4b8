"""A vLLM server as a child process of the trainer: started in an interpreter of its own, followed, and ended with the run."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nemo_rl
from nemo_rl.errors import RolloutLost
from nemo_rl.rollout.vllm import scratch
from nemo_rl.rollout.vllm.client import Client, ServerGone
from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
from nemo_rl.rollout.vllm.serve import NOT_INSTALLED, PARENT_PIPE

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
_TAIL, _WORDS = 40, 20_000
READY_VARIABLE, READY_SECONDS = "VLLM_ENGINE_READY_TIMEOUT_S", 600
"""vLLM's own limit for the start of its engine, and its default."""
_TOO_BUSY = re.compile(r"assert addresses\.coordinator_input is not None")
"""vLLM's engine fails where a thread of it takes more than 10 s to begin: the machine was busy, and nothing else is wrong."""
_OF_THE_TRAINER = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|TORCH_NCCL_.*"
    r"|PYTHON(PATH|HOME|STARTUP|SAFEPATH|NOUSERSITE)|VIRTUAL_ENV|CONDA_.*|__PYVENV_LAUNCHER__|LD_PRELOAD)"
)
"""Variables of this process's interpreter and of its place among ranks: not the server's."""

CURES = (
    (r"Model architectures? .*not supported|not supported for now|has no vLLM implementation",
     "vLLM has no such model; train it with rollout engine in_process"),
    (r"out of memory|OutOfMemory|No available memory for the cache blocks|Cannot allocate memory|MemoryError",
     "the server has too little memory; lower gpu_memory_fraction or max_model_length of rollout, or max_new_tokens"),
    (r"KV cache is needed|is larger than the maximum number of tokens that can be stored in KV cache",
     "the cache is too small for one sequence; lower max_model_length of rollout, or raise gpu_memory_fraction"),
    (r"max_model_len.*greater than the derived max_model_len",
     "the model is not made for such long sequences; lower max_sequence_length, or max_model_length of rollout"),
    (r"unrecognized arguments|No module named|cannot import name|has no attribute",
     "this looks like another version of vLLM than 0.30 to 0.33, which nemo-rl works with"),
    (r"Address already in use", "another program took the port in this moment; run the same call again"),
)  # fmt: skip


class ServerProcess:
    """One server on loopback. Whenever it was started its weights are those that vLLM starts with: none of ours."""

    def __init__(self, python: str, model: Path, options: Sequence[str], log: Path) -> None:
        self.python, self.model, self.options, self.log = python, model, list(options), log
        self.token = secrets.token_hex(32)
        self.kit = _kit()
        self.process: subprocess.Popen[bytes] | None = None
        self.port: int | None = None
        """Chosen at the first start and kept: the other ranks go on looking for the server there."""
        self._held: socket.socket | None = None
        self._log_begin = 0
        """Where in the log the words of this start begin."""
        self.client: Client

    def start(self, poll: Callable[[], None], timeout: float) -> Client:
        """Starts the server and returns its client once it is healthy. Raises ValueError and RolloutLost, in words."""
        self.stop()
        if self.port is None:
            self._hold_port()
        self.client = Client(f"http://127.0.0.1:{self.port}", self.token)
        self._begin(timeout)
        self._wait(poll, timeout)
        return self.client

    def _begin(self, timeout: float) -> None:
        environment = {name: value for name, value in os.environ.items() if not _OF_THE_TRAINER.fullmatch(name)}
        environment |= {TOKEN_VARIABLE: self.token, PARENT_PIPE: "1", "PYTHONPATH": str(self.kit)}
        environment.setdefault(READY_VARIABLE, str(max(READY_SECONDS, math.ceil(timeout))))
        command = [
            self.python,
            "-m",
            "nemo_rl.rollout.vllm.serve",
            "--model",
            str(self.model),
            "--port",
            str(self.port),
        ]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log_file:
            self._log_begin = log_file.tell()
            try:
                self.process = subprocess.Popen(
                    [*command, *self.options],
                    stdin=subprocess.PIPE,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise ValueError(
                    f"rollout_python={self.python!r} cannot be run ({error.strerror}); give the path of a Python interpreter "
                    "that has vLLM, such as /opt/vllm/bin/python"
                ) from None

    def _hold_port(self) -> None:
        """Chooses a port that stays ours, also while the server loads what it needs or is started anew.

        A socket that is bound and does not listen keeps others from it; Linux lets the server beside it, as both say
        SO_REUSEADDR.
        """
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port = self._held.getsockname()[1]

    def _wait(self, poll: Callable[[], None], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            poll()
            if not self.alive:
                if not _TOO_BUSY.search(self._words()):
                    raise self._failed()
                log.warning("the machine was too busy for the start of the vLLM server; it is started once more")
                self.stop()
                self._begin(timeout)
            with contextlib.suppress(ServerGone):
                self.client.get("/health", timeout=5)
                return
            if time.monotonic() > deadline:
                self.stop()
                raise RolloutLost(
                    f"the vLLM server was not ready within {timeout:.0f} s; its last words: {self.tail()} (all of them: "
                    f"{self.log}); raise rollout's timeout_seconds where loading takes longer"
                )
            time.sleep(0.25)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def tail(self) -> str:
        """The last lines of the server's log, since it was started, that say something."""
        lines = self._words().splitlines()[-_TAIL:]
        telling = [
            line for line in lines if re.search(r"\w*(Error|Exception|Killed|not installed|has no vLLM)\b", line)
        ]
        return " | ".join(line.strip()[-300:] for line in (telling or lines)[-3:])

    def _words(self) -> str:
        """The end of the server's log, of this start alone."""
        with contextlib.suppress(OSError), open(self.log, "rb") as log_file:
            end = log_file.seek(0, os.SEEK_END)
            log_file.seek(max(self._log_begin, end - _WORDS))
            return log_file.read().decode(errors="replace")
        return ""

    def _failed(self) -> Exception:
        assert self.process is not None
        code = self.process.returncode
        text = self._words()
        if code == NOT_INSTALLED:
            return ValueError(
                f"rollout_python={self.python!r} has no vLLM; install it there, for example: "
                f"{self.python} -m pip install 'vllm>=0.30,<0.34', or choose rollout engine in_process, which needs none"
            )
        cure = next((cure for pattern, cure in CURES if re.search(pattern, text)), f"all of its log: {self.log}")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return RolloutLost(f"the vLLM server {how} before it was ready: {self.tail()}; {cure}")

    def stop(self) -> None:
        """Ends the server and all of its processes."""
        process = self.process
        if process is None:
            return
        self.process = None
        process.terminate()  # it ends its workers itself; were they asked, too, it would report them as failed
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # and workers that outlive the process that is asked to end them
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def close(self) -> None:
        self.stop()
        if self._held is not None:
            self._held.close()
        scratch.remove(self.kit)


def _kit() -> Path:
    """A folder for the server's PYTHONPATH: this package and its entry point for vLLM, and none of its dependencies, which
    are of another interpreter."""
    folder = scratch.make("nemo-rl-vllm-")
    (folder / "nemo_rl").symlink_to(Path(nemo_rl.__file__).parent, target_is_directory=True)
    about = folder / f"nemo_rl_vllm-{nemo_rl.__version__}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nemo-rl-vllm\nVersion: {nemo_rl.__version__}\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nnemo_rl = nemo_rl.rollout.vllm.plugin:register\n")
    return folder
