"""The command line `nemo-rl`: train a job from its YAML file, look after jobs on a cluster, check this machine.

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
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import nemo_rl

        typer.echo(nemo_rl.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


class Backend(enum.StrEnum):
    """Where to train."""

    auto = "auto"
    local = "local"
    kubernetes = "kubernetes"


class Output(enum.StrEnum):
    """How a command answers."""

    text = "text"
    json = "json"


_Name = Annotated[str, typer.Argument(help="Name of the job.")]
_Names = Annotated[list[str], typer.Argument(help="Names of jobs.")]
_Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="[default: the context's]")]
_Output = Annotated[Output, typer.Option("--output", "-o", help="Form of the answer.")]


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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check reward and rows, print the job and stop.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow a job on the cluster to its result.")] = True,
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="Of a job on the cluster.")] = None,
    log_level: Annotated[
        LogLevel | None, typer.Option(help="Instead of spec.training.logLevel; debug also shows Python tracebacks.")
    ] = None,
) -> None:
    """Train the job of a YAML file.

    Exit codes: 0 done, 2 a wrong file or option, 40 an error in the job's own code or settings, 41 data that cannot be
    used, 42 non-finite training, 75 saved after SIGTERM, 130 saved (on a cluster: detached) after Ctrl-C, 100 the job on
    the cluster failed, 103 it was cancelled, 1 anything else.
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
            wait=wait,
            namespace=namespace,
        )
    )


@app.command()
def init(
    target: Annotated[Path, typer.Argument(help="The file to write.", metavar="JOB.yaml")] = Path("job.yaml"),
    algorithm: Annotated[str | None, typer.Option(help="grpo, sft or dpo. [default: asked, else grpo]")] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder, or a name on the hub. [default: asked, else a small one]")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A file, or owner/name on the hub (@split). [default: asked, else two example rows]"),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="file.py:function (written into the job), module:function, or a built-in. [default: asked, else an example]"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the job. [default: asked, else of model and algorithm]")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="0 trains on the CPU. [default: asked, else 1]", min=0, max=64)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    output: _Output = Output.text,
) -> None:
    """Write a commented job for an algorithm. On a terminal it asks for what no option says.

    Exit codes: 0 done, 2 an answer that cannot be used or a file that is there, 1 anything else.
    """
    from nemo_rl.cli.init import init_job
    from nemo_rl.cli.train import guarded

    raise typer.Exit(
        guarded(
            lambda: init_job(
                target,
                algorithm=algorithm,
                model=model,
                dataset=dataset,
                reward=reward,
                name=name,
                gpus=gpus,
                force=force,
                as_json=output is Output.json,
            )
        )
    )


@app.command()
def plan(
    job: Annotated[
        Path | None, typer.Argument(help="YAML or JSON file with one RLTrainingJob.", metavar="JOB.yaml")
    ] = None,
    model: Annotated[str | None, typer.Option(help="In place of a job: a folder, or a name on the hub.")] = None,
    algorithm: Annotated[str, typer.Option(help="With --model: grpo, sft or dpo.")] = "grpo",
    gpus: Annotated[int | None, typer.Option(help="GPUs of all nodes together. [default: the job's]", min=1)] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of each GPU. [default: that of this machine's GPU, else 80]", min=1)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Override a field, like training.loraRank=16. Repeatable."),
    ] = None,
    output: _Output = Output.text,
) -> None:
    """Say whether a job fits its GPUs, phase by phase, what is chosen for it, and what would make it fit.

    Only the model's configuration is read: no weights, no GPU. Exit codes: 0 it fits, 1 it does not, 2 a wrong file or option.
    """
    from nemo_rl.cli.plan import plan_job

    raise typer.Exit(
        plan_job(
            job,
            model=model,
            algorithm=algorithm,
            gpus=gpus,
            gpu_memory=gpu_memory,
            overrides=overrides or [],
            as_json=output is Output.json,
        )
    )


_Model = Annotated[
    str,
    typer.Argument(
        help="A model's folder, a run's folder (its best checkpoint), an address in a store, a job, or owner/name on the hub.",
        metavar="MODEL",
    ),
]
_TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
_MaxNewTokens = Annotated[
    int | None, typer.Option(help="Longest answer, in tokens. [default: that of training with GRPO, else 512]", min=1)
]


@app.command()
def chat(
    model: _Model,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    max_new_tokens: _MaxNewTokens = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0)] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest tokens of this probability.", min=0, max=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    trust_remote_code: _TrustRemoteCode = False,
    namespace: _Namespace = None,
) -> None:
    """Talk to a model, with prompts written as training wrote them. Each line is a question, also of a pipe.

    Answers go to standard output, everything else to standard error. Exit codes: 0 done, 1 anything else, 130 after Ctrl-C.
    """
    from nemo_rl.cli import jobs
    from nemo_rl.cli.chat import chat as talk

    raise typer.Exit(
        jobs.guarded(
            lambda: talk(
                model,
                namespace=namespace,
                system=system,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                trust_remote_code=trust_remote_code,
            )
        )
    )


@app.command(name="eval")
def evaluate(
    model: _Model,
    data: Annotated[
        str,
        typer.Argument(help="A file with rows, or owner/name on the hub (@split for another split).", metavar="DATA"),
    ],
    reward: Annotated[
        str,
        typer.Option(help="package.module:function, file.py:function, or exact_match, math_answer, format, length."),
    ],
    samples: Annotated[int, typer.Option(help="Answers to each prompt.", min=1)] = 1,
    k: Annotated[
        list[int] | None, typer.Option("--pass-at", help="k of pass@k. Repeatable. [default: 1 and --samples]", min=1)
    ] = None,
    threshold: Annotated[float, typer.Option(help="Reward from which an answer counts as right.")] = 1.0,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="[default: 0, the likeliest token, for one sample; for several that of training, else 1]", min=0
        ),
    ] = None,
    max_new_tokens: _MaxNewTokens = None,
    max_rows: Annotated[int | None, typer.Option(help="Use at most this many rows. [default: all]", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    show: Annotated[int, typer.Option(help="Prompts that are shown with an answer.", min=0)] = 3,
    trust_remote_code: _TrustRemoteCode = False,
    namespace: _Namespace = None,
    output: _Output = Output.text,
) -> None:
    """Score a model's answers to the prompts of a data set: mean reward, pass@k, and a few samples.

    Prompts are written as training wrote them. Exit codes: 0 done, 40 an error in the reward or the settings, 41 data that
    cannot be used, 102 no such job, 1 anything else.
    """
    from nemo_rl.cli.evaluate import eval_model
    from nemo_rl.cli.train import guarded

    raise typer.Exit(
        guarded(
            lambda: eval_model(
                model,
                data,
                reward,
                namespace=namespace,
                as_json=output is Output.json,
                samples=samples,
                k=k or (),
                threshold=threshold,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                max_rows=max_rows,
                seed=seed,
                shown=show,
                trust_remote_code=trust_remote_code,
            )
        )
    )


@app.command()
def data(
    source: Annotated[
        str,
        typer.Argument(
            help="A job's YAML file, or a file with rows, or owner/name on the hub (@split for another split).",
            metavar="PATH",
        ),
    ],
    algorithm: Annotated[str | None, typer.Option(help="grpo, sft or dpo. [default: the job's]")] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer and chat template are used. [default: the job's]")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Set a field, like training.maxSequenceLength=512. Repeatable."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Examples that are shown.", min=0)] = 3,
    max_rows: Annotated[int, typer.Option(help="Rows that are read of a stream.", min=1)] = 1000,
    output: _Output = Output.text,
) -> None:
    """Show what would be trained: the text as the model sees it, the trained part marked, token counts, dropped rows.

    Exit codes: 0 done, 2 a wrong file or option, 41 data that cannot be used, 1 anything else.
    """
    from nemo_rl.cli.data import show_data
    from nemo_rl.cli.train import guarded

    raise typer.Exit(
        guarded(
            lambda: show_data(
                source,
                algorithm=algorithm,
                model=model,
                overrides=overrides or [],
                rows=rows,
                max_rows=max_rows,
                as_json=output is Output.json,
            )
        )
    )


@app.command()
def crd() -> None:
    """Print the CustomResourceDefinition of RLTrainingJob, for kubectl apply -f -."""
    from nemo_rl.job.crd import crd_yaml

    typer.echo(crd_yaml(), nl=False)


@app.command()
def ps(
    namespace: _Namespace = None,
    kept: Annotated[bool, typer.Option("--kept", help="List the outputs that deleted jobs left on claims.")] = False,
    output: _Output = Output.text,
) -> None:
    """List the jobs on the cluster, newest first."""
    from nemo_rl.cli import jobs

    show = jobs.kept if kept else jobs.ps
    raise typer.Exit(jobs.guarded(lambda: show(namespace, output is Output.json)))


@app.command()
def status(name: _Name, namespace: _Namespace = None, output: _Output = Output.text) -> None:
    """Show the state of a job.

    Exit codes, also of wait: 0 done, 100 failed, 101 unfinished, 102 absent, 103 cancelled, 1 anything else.
    """
    from nemo_rl.cli import jobs

    raise typer.Exit(jobs.guarded(lambda: jobs.status(name, namespace, output is Output.json)))


@app.command()
def wait(
    name: _Name,
    namespace: _Namespace = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds; then exit code 101. [default: no limit]")] = None,
    output: _Output = Output.text,
) -> None:
    """Wait until a job has ended or is cancelled; exit codes as of status."""
    from nemo_rl.cli import jobs

    raise typer.Exit(jobs.guarded(lambda: jobs.wait(name, namespace, timeout, output is Output.json)))


@app.command()
def logs(
    name: _Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    role: Annotated[str, typer.Option(help="trainer, rollout (the first replica) or rollout-1.")] = "trainer",
    namespace: _Namespace = None,
    output: _Output = Output.text,
) -> None:
    """Print the log of a job's first pod; with -o json its steps, one object a line. --role rollout-1: of that replica."""
    from nemo_rl.cli import jobs

    raise typer.Exit(jobs.guarded(lambda: jobs.logs(name, namespace, follow, output is Output.json, role)))


@app.command()
def scale(
    name: _Name,
    replicas: Annotated[int, typer.Argument(min=1, help="How many rollout replicas the job shall have.")],
    namespace: _Namespace = None,
    output: _Output = Output.text,
) -> None:
    """Change the number of a job's rollout replicas, also while it trains."""
    from nemo_rl.cli import jobs

    raise typer.Exit(jobs.guarded(lambda: jobs.scale(name, replicas, namespace, output is Output.json)))


@app.command()
def cancel(names: _Names, namespace: _Namespace = None, output: _Output = Output.text) -> None:
    """Save and stop jobs (spec.suspend); resume lets them go on from their checkpoints."""
    from nemo_rl.cli import jobs

    raise typer.Exit(jobs.guarded(lambda: jobs.cancel(names, namespace, output is Output.json)))


@app.command()
def resume(names: _Names, namespace: _Namespace = None, output: _Output = Output.text) -> None:
    """Let cancelled jobs go on."""
    from nemo_rl.cli import jobs

    raise typer.Exit(jobs.guarded(lambda: jobs.resume(names, namespace, output is Output.json)))


@app.command()
def rm(names: _Names, namespace: _Namespace = None, output: _Output = Output.text) -> None:
    """Delete jobs with their pods and bundles; their output stays on its claim unless output.retain is false."""
    from nemo_rl.cli import jobs

    raise typer.Exit(jobs.guarded(lambda: jobs.remove(names, namespace, output is Output.json)))


@app.command()
def cp(
    name: _Name,
    target: Annotated[Path | None, typer.Argument(help="Folder. [default: ./outputs/NAME]")] = None,
    namespace: _Namespace = None,
    output: _Output = Output.text,
) -> None:
    """Fetch checkpoint and metrics of a job that succeeded."""
    from nemo_rl.cli import jobs

    raise typer.Exit(jobs.guarded(lambda: jobs.copy(name, target, namespace, output is Output.json)))


@app.command()
def ui(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders with runs of this machine. [default: the cluster, where there is a context, and ./outputs]",
            metavar="FOLDER",
        ),
    ] = None,
    namespace: _Namespace = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="List the jobs of all.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="0 takes a free one. [default: 8642, or a free one]", min=0, max=65535)
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name by which the page is called. Repeatable.", metavar="NAME")
    ] = None,
    viewer_tokens: Annotated[
        bool, typer.Option("--viewer-tokens", help="Ask the cluster with the token that each viewer brings.")
    ] = False,
    api_server: Annotated[
        str | None, typer.Option(help="With --viewer-tokens: its address. [default: as a pod is told]", metavar="URL")
    ] = None,
    certificate_authority: Annotated[
        Path | None, typer.Option(help="With --viewer-tokens: a file with the certificates to trust.", metavar="FILE")
    ] = None,
) -> None:
    """Show jobs and runs on a web page: phases, curves, samples, attempts, logs. Nothing on it changes a job.

    The address that is printed holds a token, without which nobody else on this machine sees anything. The cluster is asked
    with your own rights.
    """
    from nemo_rl.cli import jobs
    from nemo_rl.ui.serve import Options, serve

    options = Options(
        folders=tuple(folders or ()),
        namespace=namespace,
        all_namespaces=all_namespaces,
        host=host,
        port=port,
        allowed_hosts=tuple(allow_host or ()),
        viewer_tokens=viewer_tokens,
        api_server=api_server,
        certificate_authority=certificate_authority,
    )
    raise typer.Exit(jobs.guarded(lambda: serve(options)))


@app.command()
def doctor(
    uri: Annotated[
        str | None, typer.Argument(help="Address of an object store to try instead: s3://bucket/folder")
    ] = None,
    namespace: _Namespace = None,
    output: _Output = Output.text,
) -> None:
    """Check this machine (Python, torch, GPUs, extras) and, where there is a context, the cluster; or a store's address.

    Exit code 1 if something needed is missing.
    """
    from nemo_rl.cli.doctor import as_json, checks, render, store_checks

    found = checks(namespace) if uri is None else store_checks(uri)
    typer.echo(as_json(found) if output is Output.json else render(found))
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
