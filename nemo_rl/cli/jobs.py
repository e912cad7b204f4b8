"""`nemo-rl ps|logs|status|wait|cancel|resume|rm|cp`: jobs on the cluster, for people and for scripts."""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Callable, Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

from nemo_rl.backends import kubernetes_backend
from nemo_rl.job.names import LABEL_JOB
from nemo_rl.job.status import SCORES, JobStatus, duration

COLUMNS = ("name", "algorithm", "model", "phase", "step", "score", "eta", "age")
"""Of a job's summary, what `ps` shows."""
OTHER_ERROR = 1
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""


class JobExit(IntEnum):
    """What a command says about a job by its exit code. Away from the codes of trainers and of shells."""

    DONE = 0
    FAILED = 100
    UNFINISHED = 101
    ABSENT = 102
    CANCELLED = 103


def exit_code_of(resource: dict[str, Any]) -> JobExit:
    """The code of a job as it was last seen."""
    status = JobStatus.load(resource.get("status"))
    if status.phase == "Succeeded":
        return JobExit.DONE
    if status.phase == "Failed":
        return JobExit.FAILED
    suspended = resource["spec"].get("suspend") and status.phase in ("Suspended", None, "")
    return JobExit.CANCELLED if suspended else JobExit.UNFINISHED


def guarded(command: Callable[[], int]) -> int:
    """Runs a command; every error becomes one line on stderr and an exit code."""
    try:
        return command()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return OTHER_ERROR
    except LookupError as error:
        print(f"nemo-rl: {error.args[0] if error.args else error}", file=sys.stderr)
        return JobExit.ABSENT
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        print(f"nemo-rl: {error}", file=sys.stderr)
        return OTHER_ERROR


def ps(namespace: str | None, as_json: bool) -> int:
    """One line for each job, newest first."""
    found = kubernetes_backend("nemo-rl ps").jobs(namespace=namespace)
    if as_json:
        print_json([_summary(job) for job in found])
        return JobExit.DONE
    if not found:
        print("no jobs here; nemo_rl.train() or nemo-rl train JOB.yaml makes one", file=sys.stderr)
        return JobExit.DONE
    columns = ["NAME", "ALGO", "MODEL", "PHASE", "STEP", "SCORE", "ETA", "AGE"]
    names, summaries = list(COLUMNS), [_summary(job) for job in found]
    if any(one["checkpointUri"] for one in summaries):
        columns, names = [*columns, "CHECKPOINT"], [*names, "checkpointUri"]
    _print_table([tuple(columns), *(tuple(one[name] for name in names) for one in summaries)])
    return JobExit.DONE


def kept(namespace: str | None, as_json: bool) -> int:
    """One line for each claim with the output of a job that is not there any more."""
    found = [
        {
            "name": claim["metadata"]["name"],
            "namespace": claim["metadata"]["namespace"],
            "job": claim["metadata"]["labels"][LABEL_JOB],
            "size": claim.get("spec", {}).get("resources", {}).get("requests", {}).get("storage"),
            "age": _age(claim["metadata"].get("creationTimestamp")),
        }
        for claim in kubernetes_backend("nemo-rl ps --kept").kept_claims(namespace=namespace)
    ]
    if as_json:
        print_json(found)
    elif not found:
        print("no outputs of deleted jobs here", file=sys.stderr)
    else:
        rows = [tuple(one[name] for name in ("name", "job", "size", "age")) for one in found]
        _print_table([("CLAIM", "JOB", "SIZE", "AGE"), *rows])
        where = found[0]["namespace"]
        print(f"kubectl -n {where} delete pvc CLAIM removes one with what is on it", file=sys.stderr)
    return JobExit.DONE


def _print_table(rows: list[tuple[Any, ...]]) -> None:
    texts = [["-" if value is None else str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def status(name: str, namespace: str | None, as_json: bool) -> int:
    """The state of a job, in words; the exit code says it too."""
    job = _attach(name, namespace)
    seen = job.status()
    if as_json:
        print_json({**_summary(job), "status": seen.dump()})
    else:
        print("\n".join(_words(job, seen)))
    return exit_code_of(job.resource)


def wait(name: str, namespace: str | None, timeout: float | None, as_json: bool) -> int:
    """Waits until the job has ended or is cancelled."""
    job = _attach(name, namespace)
    seen = job.wait(timeout)
    if as_json:
        print_json({**_summary(job), "status": seen.dump()})
    else:
        print(f"{job.namespace}/{job.name}: {seen.phase or 'Pending'}" + (f": {seen.message}" if seen.message else ""))
    return exit_code_of(job.resource)


def logs(name: str, namespace: str | None, follow: bool, as_json: bool, role: str = "trainer") -> int:
    """The log of the newest attempt; with -o json the steps in it, one object a line. `role` rollout-1: of that replica."""
    from nemo_rl.run.metrics import parse_step_line

    replica = re.fullmatch(r"rollout(?:-(\d+))?", role)
    if replica is None and role != "trainer":
        raise ValueError(f"--role {role} is none; expected trainer, rollout (the first replica) or rollout-1")
    job = _attach(name, namespace)
    if replica is not None:
        for line in job.replica_logs(int(replica[1] or 0), follow=follow):
            print(line, flush=True)
        return JobExit.DONE
    for line in job.logs(follow=follow):
        if not as_json:
            print(line, flush=True)
        elif (metrics := parse_step_line(line)) is not None:
            print(json.dumps(metrics), flush=True)
    from nemo_rl.backends.kubernetes.outputs import output_uri

    if (uri := output_uri(job.resource)) is not None:
        print(f"nemo-rl: the log of all attempts is kept in {uri}/run.log", file=sys.stderr)
    return JobExit.DONE


def cancel(names: Iterable[str], namespace: str | None, as_json: bool) -> int:
    return _each(
        names, namespace, lambda job: job.cancel(), "cancelled; nemo-rl resume goes on from its checkpoint", as_json
    )


def resume(names: Iterable[str], namespace: str | None, as_json: bool) -> int:
    return _each(names, namespace, lambda job: job.resume(), "goes on", as_json)


def scale(name: str, replicas: int, namespace: str | None, as_json: bool) -> int:
    """Changes the number of a job's rollout replicas."""
    done = f"gets {replicas} rollout replica{'s' if replicas != 1 else ''}"
    return _each([name], namespace, lambda job: job.scale(replicas), done, as_json)


def remove(names: Iterable[str], namespace: str | None, as_json: bool) -> int:
    return _each(names, namespace, lambda job: job.delete(), "deleted", as_json)


def copy(name: str, target: Path | None, namespace: str | None, as_json: bool) -> int:
    """Fetches checkpoint and metrics of a job that succeeded."""
    from nemo_rl.backends.kubernetes.job import Job

    job = _attach(name, namespace)
    if job.status().phase != "Succeeded":
        code = exit_code_of(job.resource)
        print(
            f"nemo-rl: job {job.namespace}/{job.name} has no result ({job.last_status.phase or 'Pending'})",
            file=sys.stderr,
        )
        return code if code != JobExit.DONE else JobExit.UNFINISHED
    assert isinstance(job, Job)
    if target is not None:
        job.output_dir = target
    result = job.fetch(quiet=as_json)
    if as_json:
        print_json(
            {
                "name": job.name,
                "namespace": job.namespace,
                "outputDir": str(job.output_dir),
                "checkpoint": result.checkpoint_path,
                "checkpointUri": result.checkpoint_uri,
                "totalSteps": result.total_steps,
                "metrics": result.metrics,
            }
        )
    else:
        if result.checkpoint_uri is not None:
            print(f"nemo-rl: a copy of {result.checkpoint_uri}", file=sys.stderr)
        print(result.checkpoint_path or job.output_dir)
    return JobExit.DONE


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _attach(name: str, namespace: str | None) -> Any:
    return kubernetes_backend("this command").attach(name, namespace=namespace)


def _each(names: Iterable[str], namespace: str | None, change: Callable[[Any], None], done: str, as_json: bool) -> int:
    """Changes all that are there; the exit code says whether one was not."""
    code = int(JobExit.DONE)
    changed = []
    for name in names:
        try:
            job = _attach(name, namespace)
            change(job)
        except LookupError as error:
            print(f"nemo-rl: {error.args[0]}", file=sys.stderr)
            code = JobExit.ABSENT
            continue
        changed.append({"name": job.name, "namespace": job.namespace})
        if not as_json:
            print(f"{job.namespace}/{job.name} {done}")
    if as_json:
        print_json(changed)
    return code


def _summary(job: Any) -> dict[str, Any]:
    spec, status = job.resource["spec"], job.last_status
    progress = status.progress
    return {
        "name": job.name,
        "namespace": job.namespace,
        "algorithm": spec.get("algorithm"),
        "model": spec.get("model"),
        "phase": status.phase or "Pending",
        "message": status.message,
        "step": progress.text if progress else None,
        "score": status.score or (progress.metrics.get(SCORES.get(spec.get("algorithm"), "")) if progress else None),
        "eta": progress.eta if progress and not status.finished else None,
        "age": _age(job.resource["metadata"].get("creationTimestamp")),
        "attempt": status.attempt,
        "checkpointUri": _checkpoint_uri(job),
        "exitCode": int(exit_code_of(job.resource)),
    }


def _checkpoint_uri(job: Any) -> str | None:
    """Where the best checkpoint is in a store; None where there is none, and for what no trainer wrote."""
    from nemo_rl.backends.kubernetes.errors import DownloadError
    from nemo_rl.backends.kubernetes.outputs import checkpoint_uri

    try:
        return checkpoint_uri(job.resource)
    except DownloadError:
        return None


def _age(created: str | None) -> str | None:
    if not created:
        return None
    begin = datetime.datetime.fromisoformat(created)
    return duration((datetime.datetime.now(datetime.UTC) - begin).total_seconds())


def _words(job: Any, status: JobStatus) -> list[str]:
    lines = [f"{job.namespace}/{job.name}: {status.phase or 'Pending'}"]
    if status.message:
        lines.append(f"  {status.message}")
    if status.progress:
        metrics = " ".join(f"{name}={value}" for name, value in status.progress.metrics.items())
        lines.append(f"  step {status.progress.text} {metrics}".rstrip())
    if status.gpu_seconds is not None:
        lines.append(f"  GPU hours: {status.gpu_seconds / 3600:.4g}")
    if status.bottleneck:
        lines.append(f"  waits for {status.bottleneck.phase}: {status.bottleneck.advice or status.bottleneck.share}")
    if status.rollout:
        lines.append(f"  rollout replicas: {status.rollout.ready} of {status.rollout.replicas} ready")
        for member in status.rollout.members:
            said = [f"version {member.weight_version}"] if member.weight_version is not None else []
            said += [f"{member.tokens_per_second} tokens/s"] if member.tokens_per_second is not None else []
            said += [member.message] if member.message else []
            lines.append(f"    {member.name}: {', '.join([member.state, *said])}")
    for attempt in status.attempts:
        ended = f"{attempt.cause or 'live'}{f': {attempt.message}' if attempt.message else ''}"
        lines.append(f"  attempt {attempt.number}: {ended}")
    if status.checkpoint and status.checkpoint.latest:
        lines.append(f"  checkpoint {status.checkpoint.latest}")
    if status.failure and status.failure.traceback:
        lines += ["", *(f"  {line}" for line in status.failure.traceback.splitlines())]
    return lines
