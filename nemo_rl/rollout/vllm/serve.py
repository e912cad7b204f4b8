"""`python -m nemo_rl.rollout.vllm.serve --model …`: vLLM's own server with what a trainer of nemo-rl needs of it.

Runs in an interpreter that has vLLM and this package's files, none of its dependencies. Further arguments are vLLM's. The
token is read from NEMO_RL_ROLLOUT_TOKEN; the server listens on loopback unless --host says otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec

from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
from nemo_rl.rollout.vllm.plugin import BACKEND

PARENT_PIPE = "NEMO_RL_ROLLOUT_PARENT_PIPE"
"""Set where standard input is a pipe from the trainer: the server ends when the other end does, however that came."""
SHORTEST_TOKEN = 16
OURS = {
    "--host": "127.0.0.1",
    "--runner": "generate",
    "--weight-transfer-config": json.dumps({"backend": BACKEND}),
    "--middleware": "nemo_rl.rollout.vllm.middleware.RequireToken",
    "--logprobs-mode": "processed_logprobs",  # of the distribution that is drawn from, after the temperature
    "--generation-config": "vllm",  # no defaults for sampling from the model's folder
}
NOT_INSTALLED = 86
"""Exit code where the interpreter has no vLLM."""
_GRACE_SECONDS = 5.0


def arguments(given: list[str]) -> list[str]:
    """What vLLM is started with: ours, where the same option is not given."""
    names = {argument.partition("=")[0].replace("_", "-") for argument in given if argument.startswith("--")}
    added = [part for name, value in OURS.items() if name not in names for part in (name, value)]
    return [*given, *added]


def main() -> None:
    if find_spec("vllm") is None:
        print(f"{sys.executable} has no vLLM; install vllm>=0.30,<0.34 into that interpreter", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    if len(os.environ.get(TOKEN_VARIABLE, "")) < SHORTEST_TOKEN:
        print(
            f"{TOKEN_VARIABLE} is not set or shorter than {SHORTEST_TOKEN} characters; set it to the same random word "
            "here and for the trainer, for example: export "
            f'{TOKEN_VARIABLE}=$(python -c "import secrets; print(secrets.token_hex(32))")',
            file=sys.stderr,
        )
        sys.exit(2)
    if os.environ.pop(PARENT_PIPE, None):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes of weight updates; RequireToken guards them, too
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if (
        "--enforce-eager" in sys.argv
    ):  # its sampler would be compiled all the same, for which there must be a C++ compiler
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    sys.argv = ["vllm", *arguments(sys.argv[1:])]
    import runpy

    runpy.run_module(_entry(), run_name="__main__", alter_sys=True)


def _entry() -> str:
    """The module of vLLM's server; the second name is the older one."""
    with contextlib.suppress(ModuleNotFoundError):
        if find_spec("vllm.entrypoints.launchers.api_server.entry") is not None:
            return "vllm.entrypoints.launchers.api_server.entry"
    return "vllm.entrypoints.openai.api_server"


def _end_with_parent() -> None:
    """Waits for the end of standard input; then ends the process group, which is the server's alone."""
    while os.read(0, 1024):
        pass
    group = os.getpgrp()
    # a process of another group, for this one may end at once and leave vLLM's engine behind
    last = f"import os, time; time.sleep({_GRACE_SECONDS}); os.killpg({group}, {int(signal.SIGKILL)})"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.Popen([sys.executable, "-S", "-c", last], start_new_session=True, **streams)
    os.killpg(group, signal.SIGTERM)


if __name__ == "__main__":
    main()
