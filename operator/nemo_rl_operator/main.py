"""The command `nemo-rl-operator`."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
import time
from enum import StrEnum
from typing import Annotated

import typer

from nemo_rl.job import names
from nemo_rl.job.text import clean, one_line

app = typer.Typer(help="The operator of nemo-rl: runs RLTrainingJobs on Kubernetes.", no_args_is_help=True)


class LogFormat(StrEnum):
    """How log lines are written."""

    json = "json"
    text = "text"


class _TextLines(logging.Formatter):
    """One line per message; those of a traceback are indented. No text of a pod can look like a line of ours."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}"
        text = f"{when} {record.levelname:<7} {record.name}: {one_line(record.getMessage())}"
        if record.exc_info:
            trace = clean(self.formatException(record.exc_info))
            text += "".join(f"\n    {line}" for line in trace.splitlines())
        return text


class _JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": clean(record.getMessage()),
        }
        if record.exc_info:
            line["traceback"] = clean(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def _set_up_logging(form: LogFormat, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if form is LogFormat.json else _TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("kopf.objects", "kopf.activities", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.callback()
def _commands() -> None:
    """Keeps `run` a command of its own."""


def _rules(text: str) -> str:
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise typer.BadParameter(f"found no JSON ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(name, []), list) for name in ("ingress", "egress")):
        raise typer.BadParameter(f"found {text[:100]}; expected an object with the lists ingress and egress")
    return text


@app.command()
def run(
    namespace: Annotated[
        list[str] | None,
        typer.Option(envvar="NEMO_RL_OPERATOR_NAMESPACES", help="Watch only this namespace; repeatable."),
    ] = None,
    image: Annotated[str, typer.Option(envvar=names.IMAGE_VARIABLE, help="Trainer image of jobs that name none.")] = "",
    network: Annotated[
        str,
        typer.Option(
            envvar=names.NETWORK_VARIABLE,
            callback=_rules,
            help="JSON with the rules ingress and egress of a NetworkPolicy for each job, beside its own pods; empty: none.",
        ),
    ] = "",
    rollout_image: Annotated[
        str,
        typer.Option(envvar=names.ROLLOUT_IMAGE_VARIABLE, help="Image of rollout replicas of jobs that name none."),
    ] = "",
    workers: Annotated[
        int, typer.Option(envvar="NEMO_RL_OPERATOR_WORKERS", min=1, max=256, help="Jobs reconciled at once.")
    ] = 16,
    health_port: Annotated[
        int, typer.Option(envvar="NEMO_RL_OPERATOR_HEALTH_PORT", min=0, help="Port of /healthz and /readyz; 0: none.")
    ] = 8080,
    metrics_port: Annotated[
        int, typer.Option(envvar="NEMO_RL_OPERATOR_METRICS_PORT", min=0, help="Port of /metrics; 0: none.")
    ] = 9090,
    resync_seconds: Annotated[
        float, typer.Option(envvar="NEMO_RL_OPERATOR_RESYNC_SECONDS", min=1, help="Seconds between full comparisons.")
    ] = 600.0,
    log_format: Annotated[
        LogFormat, typer.Option(envvar="NEMO_RL_OPERATOR_LOG_FORMAT", help="How log lines are written.")
    ] = LogFormat.text,
    log_level: Annotated[
        str, typer.Option(envvar="NEMO_RL_OPERATOR_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Run the operator against the current kube context (or the pod's service account) until SIGTERM."""
    _set_up_logging(log_format, log_level)
    for unused in ("kubernetes", "kubernetes_asyncio"):  # kopf imports them where installed: 20 MiB that nobody uses
        sys.modules.setdefault(unused, None)  # type: ignore[arg-type]
    from nemo_rl_operator.assembly import Operator, Options

    gc.collect()
    gc.freeze()  # what is loaded now stays for good; the collector need not look at it again
    gc.set_threshold(20_000, 20, 20)  # objects of the API are trees, freed without it
    options = Options(
        namespaces=namespace or (),
        image=image,
        network=network,
        rollout_image=rollout_image,
        workers=workers,
        health_port=health_port,
        metrics_port=metrics_port,
        resync_seconds=resync_seconds,
    )

    async def serve() -> None:
        await Operator(options).run()  # made within the loop that it will live in

    try:
        asyncio.run(serve())
    finally:
        gc.freeze()  # to collect what ten thousand jobs leave behind would keep the end of the process waiting


def main() -> None:
    app()


if __name__ == "__main__":
    main()
