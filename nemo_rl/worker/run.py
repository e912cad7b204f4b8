"""One attempt of a job in this process, from the frozen job file to the exit code."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.backends.local import say
from nemo_rl.errors import StorageError
from nemo_rl.job import names, uris
from nemo_rl.job.names import ExitCode
from nemo_rl.job.status import TerminationMessage
from nemo_rl.run.checkpoint import find_checkpoints
from nemo_rl.run.directory import unfinished_runs
from nemo_rl.run.lease import Claim, Lease, guarded
from nemo_rl.run.stored.head import notes_of, read_head
from nemo_rl.run.stored.writer import Writer
from nemo_rl.storage.store import Store
from nemo_rl.worker import ending, inputs, probe
from nemo_rl.worker.digest import digest_argument
from nemo_rl.worker.grace import Grace
from nemo_rl.worker.job import Job, Pod, read_job
from nemo_rl.worker.prometheus import TrainMetrics
from nemo_rl.worker.report import FINISHED, IMPORTING, STARTING, UPLOADING, Report, shown_metrics
from nemo_rl.worker.server import ReportServer
from nemo_rl.worker.stall import StallWatch

if TYPE_CHECKING:
    from nemo_rl.api.result import TrainResult

RESULT_FILE = "result.json"
"""In the output folder: the last word of the attempt that finished the job, and the job's uid."""
RESULT_NOTE = "result"
"""The same in the record of a run that is kept in a store."""
EXIT_SECONDS = 30.0
"""After the last word, threads of users' libraries get this long to end."""


def run() -> int:
    """Runs the job of this pod; returns the exit code and never raises. The last word is written before it returns."""
    pod = Pod.from_environment()
    report = Report(started=process_started())
    _stop_while_starting(pod, report)
    try:
        job = read_job(pod.path(names.JOB_FILE), digest_argument(sys.argv[1:]))
        word = _finished_before(job, pod) or _attempt(job, pod, report)
        if pod.rank == 0:
            _upload(job, pod, word, report)
        code = int(ExitCode.DONE)
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is near, and it shall be told
        word = ending.failure(error, step=report.step, checkpoint=report.checkpoint)
        code = word.exit_code or 1
        print(ending.for_the_log(error, word), file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if pod.rank == 0 or code != ExitCode.DONE:
        ending.write(word, pod.path(names.TERMINATION_LOG))
    _leave_within(EXIT_SECONDS, code)
    return code


def process_started() -> float:
    """When this process began, on the clock of time.monotonic: the interpreter's own start counts too."""
    now = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if 0 <= age < 60 else now


def _stop_while_starting(pod: Pod, report: Report) -> None:
    """Before training, when there is nothing to save, SIGTERM ends the process at once."""

    def stop(number: int, frame: Any) -> None:
        if report.phase in (FINISHED, UPLOADING):
            return  # all is saved; the word of success comes in a moment, or the next attempt uploads
        message = f"stopped by SIGTERM while {report.phase}, before training went on; nothing was lost"
        print(f"nemo-rl: {message}", flush=True)
        word = ending.stopped(message, step=report.step, checkpoint=report.checkpoint)
        ending.write(word, pod.path(names.TERMINATION_LOG))
        os._exit(ExitCode.PREEMPTED)

    signal.signal(signal.SIGTERM, stop)


def _attempt(job: Job, pod: Pod, report: Report) -> TerminationMessage:
    """Trains; returns the word of success. Raises whatever ends the run otherwise."""
    spec = job.spec
    level = spec.training.log_level
    _configure_logging("warning" if pod.rank != 0 and level == "info" else level)  # all ranks would say the same
    claim = pod.path(names.OUTPUT_DIR).resolve()
    uri = _output_uri(job)
    output = claim / job.name
    metrics = TrainMetrics()
    if spec.reward is not None:
        report.reward_seconds = spec.reward.timeout_seconds
    report.stall_seconds = float(spec.stall_timeout_seconds)
    report.silent_seconds = float(max(spec.stall_timeout_seconds, spec.startup_timeout_seconds))
    StallWatch(report, pod).start()
    if pod.rank == 0:
        report.expect(_step_to_go_on_from(output, spec.training.resume, uri))
    if pod.local_rank == 0:
        _serve(pod, report, metrics, spec)
    if pod.rank == 0 and spec.output.hub is not None:
        from nemo_rl.api.hub import make_ready

        make_ready(spec.output)
    bundles = inputs.open_bundles(spec.bundles, pod, job.spec.output.uri)
    spec = inputs.resolve(spec, bundles, pod)
    if pod.rank != 0:
        spec.training.log_level = "error"  # rank 0 speaks for all

    from nemo_rl.api.algorithms import get_algorithm
    from nemo_rl.worker.observe import Observer, observed

    trainer_class = get_algorithm(spec.algorithm)
    importlib.import_module("transformers.modeling_utils")  # seconds, which the first model would be charged with else
    with ending.user_code("loading the reward"):
        reward = inputs.load_reward(spec, bundles)
    with ending.user_code("loading the callbacks"):
        callbacks = inputs.load_callbacks(spec.callbacks, bundles)
    report.seconds[IMPORTING] = time.monotonic() - report.started
    report.enter(STARTING)
    grace = Grace(float(spec.termination_grace_period_seconds)) if pod.rank == 0 else None
    observer = Observer(report, metrics, claim=claim, grace=grace)
    trainer = observed(trainer_class, report, observer)(spec, output_dir=uri or output)
    trainer.complete_lines = True
    if trainer.stored is not None:
        trainer.stored.writer, trainer.stored_root = _writer(job), claim
        trainer.stored.say = lambda sentence: say(spec, sentence)
    else:
        trainer.lease_claim = _lease_claim(job, output)
    result = trainer.fit(
        spec.dataset,
        reward_fn=reward,
        validation_dataset=spec.validation_dataset,
        callbacks=[observer, *callbacks],
        reward_weights=spec.reward.weights if spec.reward else None,
    )
    word = _success(result, report)
    if pod.rank == 0 and trainer.stored is not None:
        trainer.stored.leave_note(RESULT_NOTE, {"uid": job.uid, "word": json.loads(word.encode())})
    elif pod.rank == 0:
        _keep(word, job, output, trainer.lease)
    return word


def _success(result: TrainResult, report: Report) -> TerminationMessage:
    return TerminationMessage(
        kind="result",
        total_steps=result.total_steps,
        metrics=shown_metrics(result.metrics),
        checkpoint=report.checkpoint,
    )


def _upload(job: Job, pod: Pod, word: TerminationMessage, report: Report) -> None:
    """Uploads the best checkpoint where the job says so. The job's word is kept by then: should this be cut off, or the hub be
    away, the next attempt has nothing to do but this. Files that the hub has already are not sent again.
    """
    output, kept = job.spec.output, word.checkpoint
    if output.hub is None or kept is None or kept.best is None:
        return
    from nemo_rl.api.hub import upload
    from nemo_rl.backends.local import folder_of

    report.enter(UPLOADING)
    stored = kept.best if "://" in kept.best else None
    where = upload(output, folder_of(None if stored else pod.path(names.OUTPUT_DIR) / kept.best, stored))
    say(job.spec, f"uploaded to {where}")
    report.enter(FINISHED)


# --- a job that is done already


def _lease_claim(job: Job, output: Path) -> Claim | None:
    """What asks for the right to write to the output; None where no operator counts attempts."""
    number = os.environ.get(names.ATTEMPT_VARIABLE, "")
    return Claim.on(output, job.uid, int(number), socket.gethostname()) if number.isdigit() else None


def _writer(job: Job) -> Writer:
    """Who writes to a store: this attempt of the job."""
    number = os.environ.get(names.ATTEMPT_VARIABLE, "")
    return Writer(job.uid if number.isdigit() else "", int(number) if number.isdigit() else 0, socket.gethostname())


def _output_uri(job: Job) -> str | None:
    """The address that the job writes to, the folder with its name; None where it has a claim."""
    return uris.joined(job.spec.output.uri, job.name) if job.spec.output.uri else None


def _keep(word: TerminationMessage, job: Job, output: Path, lease: Lease | None) -> None:
    """Leaves the word of success in the output: should the node die now, the next attempt has nothing to do."""
    record = {"uid": job.uid, "word": json.loads(word.encode())}
    aside = lease.staging / RESULT_FILE if lease else output / f".{RESULT_FILE}.tmp"
    with guarded(lease):
        with open(aside, "w", encoding="utf-8") as stream:
            json.dump(record, stream)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(output / RESULT_FILE)


def _finished_before(job: Job, pod: Pod) -> TerminationMessage | None:
    """The word of an earlier attempt of this very job that finished it, but was not heard."""
    uri = _output_uri(job)
    try:
        if uri is not None:
            records = list(notes_of(uri, RESULT_NOTE, patience=30.0))
        else:
            records = [json.loads((pod.path(names.OUTPUT_DIR) / job.name / RESULT_FILE).read_text(encoding="utf-8"))]
        word = None
        for record in records:
            if job.uid and record["uid"] == job.uid:
                word = TerminationMessage.parse(json.dumps(record["word"]))
    except (OSError, ValueError, KeyError, TypeError, StorageError):
        return None
    if word is not None and pod.rank == 0:
        say(job.spec, f"an earlier attempt finished this job after {word.total_steps} steps; nothing is left to do")
    return word


def _step_to_go_on_from(output: Path, resume: str, uri: str | None = None) -> int:
    """The step that the run will most likely go on from, told before torch is there: progress must not fall to 0."""
    if uri is not None:
        head = None
        if resume != "never":
            with contextlib.suppress(StorageError):  # what keeps it from being read ends the run when it is needed
                head = read_head(Store(uri, patience=5.0))
        return max((entry["step"] for entry in head["checkpoints"]), default=0) if head else 0
    unfinished = unfinished_runs(output, inside=True) if resume != "never" else []
    found = find_checkpoints(unfinished[-1]) if unfinished else []
    return found[-1].step if found else 0


# --- surroundings


def _configure_logging(level: str) -> None:
    """Warnings of all libraries, and ours from the job's level on, to stderr; no bars, which are no lines of a log."""
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("nemo_rl").setLevel(level.upper())


def _serve(pod: Pod, report: Report, metrics: TrainMetrics, spec: Any) -> None:
    """The first process of the job speaks to the cluster; in the other pods, and where its port is taken, to the probes alone."""
    server: ReportServer | None = None
    if pod.rank == 0:
        try:
            server = ReportServer(pod.port, report, metrics)
            say(spec, f"serving /progress, /metrics and /healthz on port {server.server_port}")
        except OSError as error:  # training matters more than being watched, and the last word needs no network
            print(f"nemo-rl: no progress will be served: port {pod.port}: {error}", file=sys.stderr, flush=True)
    server = server or ReportServer(0, report, metrics, host="127.0.0.1")
    server.start()
    probe.announce(server.server_port)


def _leave_within(seconds: float, code: int) -> None:
    """Ends the process after that time, should a thread of some library keep it from ending by itself."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
