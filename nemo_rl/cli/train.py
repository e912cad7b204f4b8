"""`nemo-rl train`: a job's YAML file to a run, and every way that it can end to a message and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_rl.api.training import start
from nemo_rl.backends import Run, choose
from nemo_rl.backends.kubernetes.errors import JobCancelled
from nemo_rl.backends.local import check_places
from nemo_rl.cli import jobs
from nemo_rl.cli.jobs import INTERRUPTED, OTHER_ERROR, JobExit
from nemo_rl.cli.plan import say_memory
from nemo_rl.errors import DatasetError, NonFiniteTraining, RewardError, TrainingFailed, TrainingInterrupted
from nemo_rl.job.manifest import Manifest, ManifestError, load_manifest
from nemo_rl.job.names import ExitCode
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl.run.directory import nearby

USAGE = 2


def train_job(
    path: Path,
    *,
    backend: str,
    overrides: Sequence[str],
    output_dir: Path | None,
    dry_run: bool,
    log_level: str | None,
    wait: bool = True,
    namespace: str | None = None,
) -> int:
    """Runs the job of the file at `path`; returns the exit code and never raises. Errors go to stderr."""
    try:
        if log_level is not None:
            overrides = [*overrides, f"training.logLevel={log_level}"]
        manifest = load_manifest(path, overrides)
    except ManifestError as error:
        complain(str(error))
        return USAGE
    # `function: package.module:name` and source may import modules that lie beside the job, as with `python script.py`.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    return run_manifest(manifest, backend, output_dir, dry_run=dry_run, wait=wait, namespace=namespace)


def run_manifest(
    manifest: Manifest,
    backend: str,
    output_dir: Path | None,
    *,
    dry_run: bool = False,
    wait: bool = True,
    namespace: str | None = None,
) -> int:
    """Trains, or prints what would be applied, and returns the exit code of how it ended."""
    debug = manifest.spec.training.log_level == "debug"
    run = Run(
        manifest.spec,
        output_dir or Path("outputs") / manifest.name,
        name=manifest.name,
        namespace=namespace or manifest.namespace,
        wait=wait,
    )
    try:
        if dry_run:
            print(_dry_run(manifest, run, backend), end="", flush=True)
            say_memory(manifest.spec)
            return ExitCode.DONE
        result = start(run, backend)
        if not wait:
            return ExitCode.DONE
    except KeyboardInterrupt as error:
        complain(str(error) or f"interrupted; run the same command again to go on (output in {run.output_dir})")
        return INTERRUPTED
    except TrainingInterrupted as error:
        complain(str(error))
        return JobExit.CANCELLED if isinstance(error, JobCancelled) else ExitCode.PREEMPTED
    except TrainingFailed as error:
        complain(str(error))
        if error.traceback:
            print(error.traceback.rstrip(), file=sys.stderr)
        return JobExit.FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, RewardError) and error.traceback:
            print(error.traceback.rstrip(), file=sys.stderr)
        complain(str(error) or type(error).__name__)
        if not debug and not isinstance(error, _EXPECTED):
            complain(f"this is a {type(error).__name__}; --log-level debug shows where")
        return exit_code(error)
    if manifest.spec.training.log_level in ("debug", "info"):
        print(f"nemo-rl: done after {result.total_steps} steps; checkpoint in {nearby(result.checkpoint_path)}")
    return OTHER_ERROR if result.hub_url == "" else ExitCode.DONE


def _dry_run(manifest: Manifest, run: Run, backend: str) -> str:
    """What would be applied; for this machine, and where nothing has to travel, that is the job as it stands.

    ValueError for a reward whose source does not compile, DatasetError for rows here that cannot be used.
    """
    here = choose(backend)[0] == "local"
    if here:
        check_places(run)
    _look_at(manifest.spec)
    if here:
        return manifest.to_yaml()
    from nemo_rl.backends.kubernetes import dry_run

    return str(dry_run(run))


_ROWS_LOOKED_AT = 1000


def _look_at(spec: RLTrainingJobSpec) -> None:
    """Compiles an inline reward, and recognises the shape of rows that are in the job or in a file here."""
    if spec.reward is not None and spec.reward.source is not None:
        from nemo_rl.environments.load import check_source

        check_source(spec.reward.source, spec.reward.entrypoint or "reward")
    for data in (spec.dataset, spec.validation_dataset):
        if data is None or not (data.inline or (data.path and Path(data.path).expanduser().is_file())):
            continue
        from nemo_rl.data.formats import no_rows_left, to_preference_rows, to_prompt_rows, to_text_rows
        from nemo_rl.data.loading import open_rows

        convert = {"grpo": to_prompt_rows, "sft": to_text_rows, "dpo": to_preference_rows}[spec.algorithm]
        stream = open_rows(data)
        rows = stream.read(_ROWS_LOOKED_AT)
        if not rows:
            raise stream.empty()
        converted, report = convert(rows)
        if not converted:
            raise no_rows_left(report)


_EXPECTED = (ValueError, TypeError, RewardError, NonFiniteTraining, RuntimeError, OSError)


def guarded(command: Callable[[], int]) -> int:
    """Runs a command that calls a model, a reward or data; every error becomes a sentence and the code of its kind."""

    def judged() -> int:
        try:
            return command()
        except (BrokenPipeError, LookupError):
            raise
        except ManifestError as error:
            complain(str(error))
            return USAGE
        except (*_EXPECTED, ImportError) as error:
            if isinstance(error, RewardError) and error.traceback:
                print(error.traceback.rstrip(), file=sys.stderr)
            complain(str(error) or type(error).__name__)
            return exit_code(error)

    return jobs.guarded(judged)


def exit_code(error: BaseException) -> int:
    """The exit code that says what kind of error ended a run, the same as a trainer pod's."""
    if isinstance(error, DatasetError):
        return ExitCode.BAD_DATA
    if isinstance(error, NonFiniteTraining):
        return ExitCode.NON_FINITE
    if isinstance(error, RewardError | TypeError | ValueError):
        return ExitCode.USER_ERROR
    return OTHER_ERROR


def complain(message: str) -> None:
    """One message on stderr."""
    print(f"nemo-rl: {message}", file=sys.stderr, flush=True)
