"""Notices that this process gets nowhere, and ends it with the stacks of its threads: in the log, and in its last word.

A thread of its own asks the report every few seconds. Where even that thread gets no turn, for some native code never
returns, the interpreter's watchdog writes the stacks and ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time

from nemo_rl.job import names
from nemo_rl.worker import ending
from nemo_rl.worker.job import Pod
from nemo_rl.worker.report import SPEAKING, Report

LOOK_SECONDS = 5.0
FROZEN_SECONDS = 60.0
"""How much later than this thread the interpreter's watchdog acts."""
LONGEST_SECONDS = 10.0**6
"""More than the interpreter's watchdog needs to wait: it is set anew at each look."""
OTHERS_SECONDS = 3.0
"""What the other processes of the pod get to add their stacks, and ranks elsewhere to hear of it."""
STDERR = 2
"""Its descriptor: whatever users put in the place of sys.stderr."""
OTHER = 1


class StallWatch(threading.Thread):
    """Ends the process once `report` says that it gets on no more."""

    def __init__(self, report: Report, pod: Pod, look_seconds: float = LOOK_SECONDS) -> None:
        super().__init__(name="stall-watch", daemon=True)
        self._report, self._pod, self._look_seconds = report, pod, look_seconds
        self._trained = threading.main_thread()

    def run(self) -> None:
        while True:
            quiet, limit = self._report.quiet()
            if quiet > limit:
                self._end(quiet, limit)
            left = limit - quiet + FROZEN_SECONDS
            faulthandler.dump_traceback_later(min(left, LONGEST_SECONDS), exit=True, file=STDERR)
            time.sleep(min(self._look_seconds, max(limit - quiet, 0.1)))

    def _end(self, quiet: float, limit: float) -> None:
        report, pod = self._report, self._pod
        fields = "stallTimeoutSeconds" if report.phase in SPEAKING else "startupTimeoutSeconds and stallTimeoutSeconds"
        message = (
            f"no sign of progress for {quiet:.0f} s while {report.phase} after step {report.step} (the limit is {limit:.0f} s, "
            f"by {fields}); the stack shows where it hangs. If that is work, raise the limit"
        )
        where = f"rank {pod.rank}" if pod.world_size > 1 else "the main thread"
        print(f"nemo-rl: {where}: {message}\n{stacks()}", file=sys.stderr, flush=True)
        stack = ending.stack_of(self._trained.ident)
        word = ending.stalled(message, where, stack, step=report.step, checkpoint=report.checkpoint)
        ending.write_stalled(word, pod.path(names.TERMINATION_LOG))
        telling = threading.Thread(target=self._tell, args=(f"rank {pod.rank}: Stalled: {message}",), daemon=True)
        telling.start()
        time.sleep(OTHERS_SECONDS if pod.world_size > 1 else 0)
        os._exit(OTHER)

    def _tell(self, text: str) -> None:
        """The ranks that wait for this one need not wait until they are silent for as long."""
        if self._report.tell_ranks is not None:
            self._report.tell_ranks(text)


def stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as found:
        faulthandler.dump_traceback(found)
        found.seek(0)
        return found.read()
