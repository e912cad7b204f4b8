"""Entry point of trainer pods with several processes: `python -m nemo_rl.worker.launch`. All pods meet, then torchrun starts.

What ends an attempt before any rank could speak stands in the termination message: nothing else would tell it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from nemo_rl.job import names
from nemo_rl.job.names import ExitCode
from nemo_rl.job.status import Cause, TerminationMessage
from nemo_rl.worker import ending, meeting
from nemo_rl.worker.job import Pod

RENDEZVOUS_SECONDS = 1800
"""torchrun's own wait, once all pods run: what is left are the imports of a busy node."""
OTHER = 1


def main(arguments: list[str] | None = None) -> int:
    """Runs the pod; returns its exit code. What it does not know itself it hands on to the worker."""
    options, rest = _parser().parse_known_args(arguments)
    pod = Pod.from_environment()
    _stop_while_waiting(pod)
    try:
        if options.nodes > 1:
            _meet(options)
        return _run(options, rest, pod)
    except meeting.MeetingFailed as failed:
        return _end(pod, Cause.STARTUP_TIMEOUT, f"{failed}; see the job's status for what keeps them", OTHER)
    except OSError as error:
        return _end(pod, type(error).__name__, f"the pods cannot meet at port {names.RENDEZVOUS_PORT}: {error}", OTHER)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {names.LAUNCH_MODULE}", allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True, help="pods of the job")
    parser.add_argument("--processes", type=int, required=True, help="processes of each pod")
    parser.add_argument("--node", type=int, default=0, help="number of this pod, from 0")
    parser.add_argument("--attempt-job", default="", help="what pods are called before their number")
    parser.add_argument("--service", default="", help="headless Service of the pods")
    parser.add_argument("--first-address", help="address of pod 0; default ATTEMPT_JOB-0.SERVICE")
    parser.add_argument("--port", type=int, default=names.RENDEZVOUS_PORT)
    parser.add_argument("--startup-timeout", type=float, default=3600.0, help="seconds until all pods run")
    parser.add_argument("--rendezvous-timeout", type=int, default=RENDEZVOUS_SECONDS, help="torchrun's, after that")
    parser.add_argument("--shutdown-timeout", type=int, default=30, help="seconds that processes have to save and end")
    return parser


def _first(options: argparse.Namespace) -> str:
    return options.first_address or f"{options.attempt_job}-0.{options.service}"


def _meet(options: argparse.Namespace) -> None:
    prefix = f"{options.attempt_job}-" if options.attempt_job else "pod "
    party = meeting.Party(
        options.nodes,
        options.port,
        token=_token(),
        say=_say,
        name=lambda number: f"{prefix}{number}",
    )
    if options.node == 0:
        meeting.host(party, options.startup_timeout)
    else:
        meeting.join(party, options.node, _first(options), options.startup_timeout)
    _say(f"all {options.nodes} pods are here")


def _token() -> bytes:
    """The job's secret; empty where it has none."""
    try:
        return Path(os.environ.get(names.TOKEN_VARIABLE, names.TOKEN_FILE)).read_bytes().strip()
    except FileNotFoundError:
        return b""


def _run(options: argparse.Namespace, rest: list[str], pod: Pod) -> int:
    """Runs the processes of this pod by torchrun, in this process; returns its exit code."""
    command = [f"--nnodes={options.nodes}", f"--nproc-per-node={options.processes}"]
    command += ["--max-restarts=0", f"--shutdown-timeout={options.shutdown_timeout}"]
    if options.nodes == 1:
        command.append("--standalone")
    else:
        command += [  # static: the pod with index 0 must be rank 0, for it is the one that reports
            "--rdzv-backend=static",
            f"--rdzv-conf=timeout={options.rendezvous_timeout}",
            f"--node-rank={options.node}",
            f"--master-addr={_first(options)}",
            f"--master-port={options.port}",
        ]
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun([*command, "-m", names.WORKER_MODULE, *rest])
        return int(ExitCode.DONE)
    except SignalException as stopped:
        message = f"stopped by {stopped.sigval.name}; its processes left no word of what they saved"
        return _end(pod, Cause.PREEMPTED, message, ExitCode.PREEMPTED)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        what = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
        return _end(pod, Cause.ERROR, f"the process of rank {rank} {what} without a word", OTHER)
    except Exception as error:  # such as a rendezvous that failed
        text = " ".join(str(error).split())
        return _end(pod, type(error).__name__, f"torchrun ended before its processes did: {text}", OTHER)


def _stop_while_waiting(pod: Pod) -> None:
    """Until torchrun is there, SIGTERM ends this process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        _end(pod, Cause.PREEMPTED, "stopped by SIGTERM while it waited for the other pods", ExitCode.PREEMPTED)
        os._exit(ExitCode.PREEMPTED)

    signal.signal(signal.SIGTERM, stop)


def _end(pod: Pod, cause: str, message: str, code: int) -> int:
    """Leaves the last word; returns the exit code. A process of this pod that left one knows better: then it is that one's."""
    path = pod.path(names.TERMINATION_LOG)
    with contextlib.suppress(OSError):
        there = TerminationMessage.parse(path.read_text(errors="replace"))
        if there is not None:
            return code if there.exit_code is None else there.exit_code
    ending.write(TerminationMessage(kind="failure", exit_code=code, cause=cause, message=message), path)
    _say(message)
    return code


def _say(line: str) -> None:
    print(f"nemo-rl: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
