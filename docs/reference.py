"""Writes the pages of docs/reference from the code: `python docs/reference.py`. A test checks that they are up to date."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
import yaml

from nemo_rl.cli.jobs import JobExit
from nemo_rl.cli.main import app as cli
from nemo_rl.job import names
from nemo_rl.job.changes import MUTABLE, MUTABLE_WHILE_SUSPENDED
from nemo_rl.job.crd import crd
from nemo_rl.job.names import ExitCode
from nemo_rl.job.status import Cause

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from tables import keywords_table, shapes_table  # noqa: E402 - it lies beside this file

FOLDER = ROOT / "docs" / "reference"
VALUES = ROOT / "charts" / "nemo-rl-operator" / "values.yaml"
HEAD = "<!-- Written by docs/reference.py; do not edit. -->\n"
EXIT_MEANINGS = {
    ExitCode.DONE: "Done.",
    ExitCode.USER_ERROR: "An error in the job's own code or settings. Not tried again.",
    ExitCode.BAD_DATA: "Data that cannot be used. Not tried again.",
    ExitCode.NON_FINITE: "The gradient stayed NaN or infinite, or the model gave such numbers before step 1. Not tried again.",
    ExitCode.PREEMPTED: "Asked to stop (SIGTERM), and saved. Tried again; without counting, where the cluster or a person did ask.",
}
JOB_MEANINGS = {
    JobExit.DONE: "Succeeded.",
    JobExit.FAILED: "Failed.",
    JobExit.UNFINISHED: "Not finished (yet).",
    JobExit.ABSENT: "There is no job of that name.",
    JobExit.CANCELLED: "Cancelled (suspended).",
}
VERDICTS = {
    "fatal": "ends the job",
    "counted": "tried again, counts towards backoffLimit",
    "free": "tried again, does not count (but see below)",
}


def pages() -> dict[str, str]:
    """File name → content of every page."""
    written = {
        "python.md": python_page(),
        "keywords.md": keywords_page(),
        "data-shapes.md": data_shapes_page(),
        "fields.md": fields_page(),
        "cli.md": cli_page(),
        "metrics.md": metrics_page(),
        "exit-codes.md": exit_codes_page(),
        "values.md": values_page(),
    }
    return {name: f"{HEAD}{text.rstrip()}\n" for name, text in written.items()}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)])


# --- Python ---


def python_page() -> str:
    parts = [
        "# Python",
        "The public names of `nemo_rl` and `nemo_rl.api`. What `train()` and the trainers take as a keyword besides is "
        "under [keywords](keywords.md).",
    ]
    for module in ("nemo_rl", "nemo_rl.api"):
        loaded = importlib.import_module(module)
        parts.append(f"## {module}")
        for name in sorted(loaded.__all__, key=str.lower):
            if module == "nemo_rl.api" and name in importlib.import_module("nemo_rl").__all__:
                continue
            if not name.startswith("__"):
                parts.append(_documented(name, getattr(loaded, name)))
    parts += [
        "## Jobs",
        "What `attach()`, `jobs()` and `train(wait=False)` on a cluster return. `status()` has the fields of the resource's status "
        "with Python's names (`phase`, `message`, `progress`, `attempt`): [fields](fields.md).",
        _documented("Job", importlib.import_module("nemo_rl.backends.kubernetes.job").Job, made_by_callers=False),
    ]
    return "\n\n".join(parts)


def _documented(name: str, found: Any, made_by_callers: bool = True) -> str:
    parts = [f"### {name}", _fence(f"{name}{_signature(found)}") if made_by_callers else "", _docstring(found)]
    if inspect.isclass(found):
        for method, member in vars(found).items():
            if (
                issubclass(found, Exception)
                or method.startswith("_")
                or not (inspect.isfunction(member) or isinstance(member, classmethod))
            ):
                continue
            function = getattr(found, method)
            if function.__doc__:
                parts.append(f"**`{name}.{method}{_signature(function)}`**\n\n{_docstring(function)}")
    return "\n\n".join(part for part in parts if part)


def _signature(found: Any) -> str:
    if inspect.isclass(found) and issubclass(found, Exception):
        return ""
    signature = inspect.signature(found)
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature.replace(parameters=parameters)))


def _docstring(found: Any) -> str:
    """A docstring as Markdown: indented sections become lists."""
    text = inspect.getdoc(found) or ""
    lines: list[str] = []
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises):", line):
            lines += ["", f"*{line[:-1]}*", ""]
        elif item := re.fullmatch(r"    (\S.*?): (.*)", line):
            lines.append(f"- `{item[1].strip('`')}`: {item[2]}")
        else:
            lines.append(line.replace("    ", "  ", 1) if line.startswith("        ") else line.strip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _fence(text: str) -> str:
    return f"```text\n{text}\n```"


# --- Keywords and data, as in README.md ---


def keywords_page() -> str:
    return (
        "# Keywords\n\nOf `train()`, the trainers and `create_trainer()`, with the field of `spec` that each one is. "
        "`train()` takes `backend`, `validation_dataset`, `tokenizer`, `name`, `namespace`, `secrets` and `wait` "
        f"besides. Each has an address of its own: `keywords/#max_steps`.\n\n{with_anchors(keywords_table())}"
    )


def with_anchors(table: str) -> str:
    """The table with an anchor at each keyword, by its name; where two sections have the same one, the second gets `-2`."""
    seen: dict[str, int] = {}

    def row(found: re.Match[str]) -> str:
        name = found[1]
        seen[name] = seen.get(name, 0) + 1
        anchor = name if seen[name] == 1 else f"{name}-{seen[name]}"
        return f'| <a id="{anchor}"></a>`{name}` |'

    return re.sub(r"^\| `(\w+)` \|", row, table, flags=re.MULTILINE)


def data_shapes_page() -> str:
    return f"# Shapes of data\n\nRecognised by the names of the columns.\n\n{shapes_table()}"


# --- RLTrainingJob ---


def fields_page() -> str:
    root = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    parts = [
        "# Fields of RLTrainingJob",
        f"`apiVersion: {names.API_VERSION}`, `kind: {names.KIND}`, short name `{names.SHORT_NAME}`. "
        f"`kubectl explain {names.SHORT_NAME}.spec` says the same. After creation only "
        + ", ".join(f"`{field}`" for field in sorted(MUTABLE))
        + " may change, and while the job is suspended "
        + ", ".join(f"`{field}`" for field in MUTABLE_WHILE_SUSPENDED)
        + ".",
    ]
    for part in ("spec", "status"):
        parts.append(f"## {part}")
        if part == "status":
            parts.append("Written by the operator alone.")
        simple, sections = [], []
        for name, child in root[part]["properties"].items():
            (sections if _is_section(child) else simple).append((name, child))
        parts.append(_table(("Field", "Type", "Meaning"), [_field(name, child) for name, child in simple]))
        for name, child in sections:
            parts += [f"### {part}.{name}", child.get("description", "")]
            rows = [_field(path, leaf) for path, leaf in _leaves(child)]
            parts.append(_table(("Field", "Type", "Meaning"), rows))
    return "\n\n".join(part for part in parts if part)


def _is_section(schema: dict[str, Any]) -> bool:
    return bool(schema.get("properties") or schema.get("items", {}).get("properties"))


def _leaves(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    inner = schema.get("items", schema) if not schema.get("properties") else schema
    for name, child in inner.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        if _is_section(child):
            yield from _leaves(child, f"{here}[]" if child.get("type") == "array" else here)
        else:
            yield here, child


def _field(name: str, schema: dict[str, Any]) -> tuple[str, str, str]:
    kind = schema.get("type", "any")
    if kind == "array":
        kind = f"list of {schema['items'].get('type', 'any')}"
    if schema.get("enum"):
        kind = ", ".join(f"`{value}`" for value in schema["enum"] if value is not None)
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = f" ({'' if low is None else f'{low:g}'}…{'' if high is None else f'{high:g}'})" if low or high else ""
    return f"`{name}`", kind + bounds, schema.get("description", "")


# --- Command lines ---


def cli_page() -> str:
    from nemo_rl_operator.main import app as operator

    parts = ["# Command line", "`nemo-rl` is for users, `nemo-rl-operator` is what runs in the operator's pod."]
    for program, app in (("nemo-rl", cli), ("nemo-rl-operator", operator)):
        group: Any = typer.main.get_command(app)
        parts += [f"## {program}", (group.help or "").strip()]
        context = group.make_context(program, [], resilient_parsing=True)
        for name, command in group.commands.items():
            usage = " ".join([program, name, *command.collect_usage_pieces(context)])
            parts += [f"### {program} {name}", inspect.cleandoc(command.help or ""), _fence(usage)]
            rows = [row for row in (_option(parameter) for parameter in command.params) if row]
            if rows:
                parts.append(_table(("Option", "Meaning"), rows))
    return "\n\n".join(part for part in parts if part)


def _option(parameter: Any) -> tuple[str, str] | None:
    if parameter.name == "help":
        return None
    argument = parameter.param_type_name == "argument"
    words = [parameter.metavar or parameter.name.upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
    text = getattr(parameter, "help", None) or ""
    if parameter.envvar:
        text += f" Also the variable {parameter.envvar}."
    default = parameter.default
    if not parameter.required and default not in (None, "", False, True, ()) and not callable(default):
        text += f" Default {getattr(default, 'value', default)}."
    return ", ".join(f"`{word}`" for word in words), text


# --- Metrics ---


def metrics_page() -> str:
    from nemo_rl.worker.prometheus import GAUGES, TrainMetrics
    from nemo_rl_operator import metrics as operator

    trainer = TrainMetrics()
    trainer.step_ended(1, {**dict.fromkeys(GAUGES, 0.0), "step_seconds": 0.0})
    registry = trainer._registry
    return "\n\n".join(
        [
            "# Metrics",
            f"For Prometheus. The first pod of each running job serves them on port {names.TRAINER_PORT}, the operator "
            "on port 9090, both under `/metrics`. [Monitoring](../howto/monitoring.md) says how they are scraped.",
            "## Trainer",
            "No series carries the job's name; the PodMonitor of the chart adds it as `nemo_rl_io_job`. Only those "
            "that the algorithm has are there.",
            _metric_table(registry),
            "## Operator",
            _metric_table(operator.REGISTRY),
        ]
    )


def _metric_table(registry: Any) -> str:
    rows = []
    for collector in dict.fromkeys(registry._names_to_collectors.values()):
        for family in collector.describe() if hasattr(collector, "describe") else ():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = ", ".join(f"`{label}`" for label in getattr(collector, "_labelnames", ()))
            rows.append((f"`{name}`", family.type, labels, family.documentation))
    return _table(("Metric", "Type", "Labels", "Meaning"), sorted(rows))


# --- Exit codes and causes ---


def exit_codes_page() -> str:
    from nemo_rl_operator.classify import verdict
    from nemo_rl_operator.policies.retry import MOST_FRUITLESS

    trainer = [(str(int(code)), code.name, meaning) for code, meaning in EXIT_MEANINGS.items()]
    jobs = [(str(int(code)), meaning) for code, meaning in JOB_MEANINGS.items()]
    causes = [(f"`{cause}`", VERDICTS[verdict(cause)]) for cause in Cause]
    return "\n\n".join(
        [
            "# Exit codes and causes",
            "## A trainer pod, and `nemo-rl train` on this machine",
            _table(("Code", "Name", "Meaning"), trainer),
            "`nemo-rl train` ends besides with 2 for a wrong file or option, 130 after Ctrl-C (saved; on a cluster: "
            "detached, the job goes on), 1 for anything else. A pod's other codes are tried again and count.",
            "## `nemo-rl status` and `wait`, and `train` on a cluster",
            _table(("Code", "Meaning"), jobs),
            "## Causes",
            "`status.attempts[].cause` and `status.failure.cause` say why an attempt or the job ended.",
            _table(("Cause", "What follows"), causes),
            "What decides is how the trainer's own container ended. Containers that others add to the pod, such as those of a "
            "service mesh, neither hold an attempt nor fail it; an init container that fails is named in the message "
            "(`StartFailed`).",
            "An eviction counts (as `OutOfMemory` or `StorageExceeded`) where the kubelet says that the trainer used more of "
            "the node's memory or disk than it asks for: that would happen again anywhere. And of `Preempted`, `Disrupted` "
            f"and `JobDeleted`, the first {MOST_FRUITLESS} in a row that bring no new checkpoint do not count; further ones "
            "do. `NodeRejected` never counts, but each time the next attempt starts later.",
        ]
    )


# --- Values of the chart ---


def values_page() -> str:
    rows = [(f"`{path}`", f"`{json.dumps(default)}`", text) for path, default, text in values()]
    return "\n\n".join(
        [
            "# Values of the Helm chart",
            "A name that is not in this table is refused by `values.schema.json`.",
            _table(("Value", "Default", "Meaning"), rows),
        ]
    )


def values() -> list[tuple[str, Any, str]]:
    """(path, default, description) of every value; a comment `# --` belongs to the key below it."""
    found = yaml.safe_load(VALUES.read_text(encoding="utf-8"))
    comments: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    comment = ""
    for line in VALUES.read_text(encoding="utf-8").splitlines():
        if mark := re.match(r"\s*# -- (.*)", line):
            comment = mark[1]
        elif comment and (more := re.match(r"\s*# (.*)", line)):
            comment += f" {more[1]}"
        elif key := re.match(r"( *)([A-Za-z]\w*):", line):
            path = [(indent, word) for indent, word in path if indent < len(key[1])] + [(len(key[1]), key[2])]
            comments[".".join(word for _, word in path)] = comment
            comment = ""
    rows: list[tuple[str, Any, str]] = []

    def walk(value: Any, here: str) -> None:
        whole = here.endswith(("resources", "labels", "annotations", "affinity")) or not value
        if isinstance(value, dict) and not whole:
            if comments.get(here):
                rows.append((here, {}, comments[here]))
            for name, child in value.items():
                walk(child, f"{here}.{name}" if here else name)
        else:
            rows.append((here, value, comments.get(here, "")))

    walk(found, "")
    return rows


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, content in pages().items():
        (FOLDER / file).write_text(content, encoding="utf-8")
