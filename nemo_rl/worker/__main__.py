"""Entry point of a trainer pod: `python -m nemo_rl.worker`, alone or under torchrun."""

from __future__ import annotations

import os
import signal
import sys

from nemo_rl.job.names import ExitCode


def main() -> int:
    """Runs the pod's job; returns its exit code."""
    # The kernel does not deliver SIGTERM to process 1 unless it has a handler: from the first moment there is one.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(ExitCode.PREEMPTED))
    from nemo_rl.worker.run import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
