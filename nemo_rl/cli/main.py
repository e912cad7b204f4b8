"""The command line `nemo-rl`: train a job from its YAML file, print the resource definition, check this machine.

What a command needs is imported inside it, so that `nemo-rl --help` answers at once.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="nemo-rl",
    help="Post-training of language models with GRPO, SFT and DPO, on this machine or on Kubernetes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Backend(enum.StrEnum):
    """Where to train."""

    auto = "auto"
    local = "local"
    kubernetes = "kubernetes"


class LogLevel(enum.StrEnum):
    """What is printed."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


@app.command()
def train(
    job: Annotated[Path, typer.Argument(help="YAML or JSON file with one RLTrainingJob.", metavar="JOB.yaml")],
    backend: Annotated[Backend, typer.Option(help="Where to train; auto looks for a cluster.")] = Backend.auto,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Override a field, like training.maxSteps=10. Repeatable."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and metrics. [default: ./outputs/{metadata.name}]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job with its overrides and stop.")] = False,
    log_level: Annotated[
        LogLevel | None, typer.Option(help="Instead of spec.training.logLevel; debug also shows Python tracebacks.")
    ] = None,
) -> None:
    """Train the job of a YAML file.

    Exit codes: 0 done, 2 a wrong file or option, 40 an error in the job's own code or settings, 41 data that cannot be
    used, 42 non-finite training, 75 saved after SIGTERM, 130 saved after Ctrl-C, 1 anything else.
    """
    from nemo_rl.cli.train import train_job

    level = log_level.value if log_level else None
    raise typer.Exit(
        train_job(
            job,
            backend=backend.value,
            overrides=overrides or [],
            output_dir=output_dir,
            dry_run=dry_run,
            log_level=level,
        )
    )


@app.command()
def crd() -> None:
    """Print the CustomResourceDefinition of RLTrainingJob, for kubectl apply -f -."""
    from nemo_rl.job.crd import crd_yaml

    typer.echo(crd_yaml(), nl=False)


@app.command()
def doctor() -> None:
    """Check this machine: Python, torch, GPUs, extras. Exit code 1 if something needed is missing."""
    from nemo_rl.cli.doctor import checks, render

    found = checks()
    typer.echo(render(found))
    raise typer.Exit(1 if any(check.state == "bad" for check in found) else 0)


@app.command()
def version() -> None:
    """Print the version of nemo-rl."""
    import nemo_rl

    typer.echo(nemo_rl.__version__)


def main() -> None:
    """The console script `nemo-rl`."""
    app()


if __name__ == "__main__":
    main()
