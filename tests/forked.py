"""Runs in children of one process that has imported what they need: a kill costs no import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

_LOOP = """
import faulthandler, json, os, sys, traceback

print("ready", flush=True)
while line := sys.stdin.readline():
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.dump_traceback_later(240)  # whatever hangs tells where
            run(*json.loads(line))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
    sys.stdin.readline()  # until then an ended child stays a zombie, so that its number is not given to another
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class ForkServer:
    """A process that runs `source` once, which imports and defines `run(*arguments)`; each call of it has a fork of its own."""

    def __init__(self, source: str, environment: dict[str, str] | None = None) -> None:
        variables = os.environ | (environment or {}) | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, "-c", source + _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )
        self.pid = 0
        """Of the run that was begun last."""
        assert self.server.stdout
        assert self.server.stdout.readline() == "ready\n"

    def run(self, *arguments: Any, kill_after: float | None = None, number: int = signal.SIGKILL) -> int:
        """The exit code of run(*arguments), which are sent as JSON. `kill_after` so many seconds it gets signal `number`."""
        assert self.server.stdin and self.server.stdout
        print(json.dumps(arguments), file=self.server.stdin, flush=True)
        self.pid = int(self.server.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)  # the moment of the kill is what the tests vary
            os.kill(self.pid, number)
        print("reap", file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=30)
