"""`python -m cluster.quick_operator`: starts operators on request, each in a process of its own, at once and impatient.

It loads the operator's modules once and forks: half of a second start would else be imports. The times that it cuts
are no options, since nobody has a reason to change them on a cluster. Everything else is the operator as shipped.

Each line of the input is a JSON object {"arguments", "environment", "log"}; the answer is a process id. At the end of
the input it ends, and all operators with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

BUNDLE_WAIT_SECONDS = 10
PR_SET_PDEATHSIG = 1


def load() -> None:
    """Imports the operator as its own command does, and makes it impatient."""
    for unused in ("kubernetes", "kubernetes_asyncio"):
        sys.modules.setdefault(unused, None)  # type: ignore[arg-type]
    from nemo_rl.job import names
    from nemo_rl_operator import assembly, plan, progress
    from nemo_rl_operator.policies import accept, queue, retry, running, sidecars
    from nemo_rl_operator.runtime import resync, workloads

    assert assembly
    names.BUNDLE_WAIT_SECONDS = BUNDLE_WAIT_SECONDS
    progress.INTERVAL = 0.3
    progress.LONGEST_INTERVAL = 1.0
    progress.UNREADABLE_SECONDS = 3.0
    retry.COUNTED_BASE = 0.2
    retry.FREE_BASE = 0.1
    retry.LONGEST_DELAY = 0.5
    running.QUIET_SECONDS = 1.0
    running.LOOK_SECONDS = 1.0
    queue.HELD_SECONDS = queue.LONGEST_LOOK_SECONDS = 1.0
    workloads.LOOK_SECONDS = 1.0
    plan.LOST_PATIENCE_SECONDS = 2.0
    sidecars.PATIENCE_SECONDS = 2.0
    accept.RETRY_SECONDS, accept.LONGEST_RETRY_SECONDS = 1.0, 3.0
    resync.DEAF_SECONDS = 5.0


def start(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Forks an operator; its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(file, number)
    os.environ.update(environment)
    sys.argv = ["nemo-rl-operator", *arguments]
    from nemo_rl_operator import main

    code = 1
    try:
        main.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    # nobody waits for an operator that ended
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    load()
    for line in sys.stdin:
        print(start(**json.loads(line)), flush=True)


if __name__ == "__main__":
    serve()
