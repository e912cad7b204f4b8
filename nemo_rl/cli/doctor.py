"""`nemo-rl doctor`: what this machine has, what is missing, and the command that cures it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys

from nemo_rl.cli.checks import Check
from nemo_rl.extras import install_command

_ENGINE = ("torch", "transformers", "datasets", "numpy", "safetensors", "jinja2", "cloudpickle")
_EXTRAS = {
    "lora": ("peft", "lora_rank=…"),
    "tensorboard": ("tensorboard", "tensorboard=True"),
    "wandb": ("wandb", 'report_to="wandb"'),
    "mlflow": ("mlflow", 'report_to="mlflow"'),
    "trackio": ("trackio", 'report_to="trackio"'),
    "demo": ("matplotlib", "result.plot()"),
    "object-storage": ("obstore", "s3://, gs:// and az:// addresses"),
    "kubernetes": ("kubernetes", "training on a cluster"),
    "notebook": ("ipykernel", "notebooks in this environment"),
}
_MARKS = {"good": "ok ", "bad": "BAD", "absent": "-  "}


def checks(namespace: str | None = None) -> list[Check]:
    """All checks of this machine, then those of the cluster. Imports torch and the cluster client where they are there."""
    here = [_nemo_rl(), _python(), *(_package(name) for name in _ENGINE), *_devices(), *_extras(), _processors()]
    return here + _cluster(namespace)


def store_checks(uri: str) -> list[Check]:
    """Whether an object store can be listed, read, written on condition and deleted from, with this machine's credentials."""
    from nemo_rl.errors import StorageError
    from nemo_rl.job import uris
    from nemo_rl.run.stored.head import read_head
    from nemo_rl.storage.store import Store

    if (wrong := uris.problem(uri)) is not None:
        return [Check("bad", "address", wrong)]
    try:
        store = Store(uri, patience=5.0)
        objects = store.list()
        found = [Check("good", "reading", f"{len(objects)} objects below {uri}, {_gib(sum(o.size for o in objects))}")]
    except (StorageError, ImportError) as error:
        return [Check("bad", "reading", str(error))]
    try:
        store.probe()
        found.append(Check("good", "writing", "an object was written, read and deleted; conditional writes work"))
    except StorageError as error:
        found.append(Check("bad", "writing", str(error), "models and data can be read, a run cannot be kept there"))
    try:
        head = read_head(store)
    except StorageError as error:
        return [*found, Check("bad", "run", str(error))]
    if head is None:
        return [*found, Check("absent", "run", "none at this address")]
    holder = head.get("holder")
    held = f"; {holder.get('name')} writes to it" if holder else ""
    steps = ", ".join(str(entry["step"]) for entry in head["checkpoints"])
    return [*found, Check("good", "run", f"complete checkpoints of steps {steps or 'none yet'}{held}")]


def as_json(found: list[Check]) -> str:
    """The report for programs."""
    return json.dumps([dataclasses.asdict(check) for check in found], indent=2, ensure_ascii=False)


def _cluster(namespace: str | None) -> list[Check]:
    from nemo_rl.backends import cluster_context

    context = cluster_context()
    if context is None:
        return [Check("absent", "cluster", "no Kubernetes context here: training runs on this machine")]
    if importlib.util.find_spec("kubernetes") is None:
        return [Check("absent", "cluster", f"{context} is there, its client is not", install_command("kubernetes"))]
    from nemo_rl.cli.cluster_checks import cluster_checks

    return cluster_checks(namespace)


def render(found: list[Check]) -> str:
    """The report as text, one line per check; a bad or absent one is followed by its cure."""
    width = max(len(check.subject) for check in found)
    lines = []
    for check in found:
        lines.append(f"{_MARKS[check.state]} {check.subject:<{width}}  {check.found}")
        if check.cure:
            lines.append(f"    {'':<{width}}  → {check.cure}")
    bad = sum(check.state == "bad" for check in found)
    if any(check.subject == "reading" for check in found) and not bad:
        return "\n".join([*lines, "\nThis store can be used."])
    works = any(check.subject == "rights" and check.state == "good" for check in found)
    good = "This machine and the cluster can train." if works else "This machine can train."
    lines.append(f"\n{bad} of {len(found)} checks failed." if bad else f"\n{good}")
    return "\n".join(lines)


def _nemo_rl() -> Check:
    return Check("good", "nemo-rl", importlib.metadata.version("nemo-rl"))


def _python() -> Check:
    return Check("good", "python", f"{platform.python_version()} ({sys.executable})")


def _package(name: str) -> Check:
    """Whether a package that the engine needs is there, in a version that the distribution's metadata allows."""
    cure = install_command("engine")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check("bad", name, "not installed", cure)
    wanted = _wanted(name)
    if wanted and not _allows(wanted, found):
        return Check("bad", name, f"{found}, but {wanted} is needed", cure)
    return Check("good", name, found)


def _wanted(name: str) -> str:
    """The version range of a requirement, like ">=5,<6"; empty where none is declared."""
    for requirement in importlib.metadata.requires("nemo-rl") or []:
        match = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*([^;]*)", requirement)
        if match and match[1].lower() == name:
            return match[2].strip()
    return ""


def _allows(wanted: str, found: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # comes with transformers; without it there is no engine to check
        return True
    return SpecifierSet(wanted).contains(found, prereleases=True)


def _devices() -> list[Check]:
    if importlib.util.find_spec("torch") is None:
        return []
    try:
        import torch
    except Exception as error:
        return [Check("bad", "torch import", str(error), "reinstall torch for this machine: https://pytorch.org")]
    if not torch.cuda.is_available():
        return [Check("absent", "gpu", "none: training runs on the CPU", _gpu_cure())]
    return [
        Check(
            "good",
            f"gpu {i}",
            f"{torch.cuda.get_device_name(i)}, {_gib(torch.cuda.get_device_properties(i).total_memory)}",
        )
        for i in range(torch.cuda.device_count())
    ]


def _gpu_cure() -> str:
    if os.path.exists("/dev/nvidia0"):
        return "a GPU is there, but torch cannot use it: install a torch build with CUDA that fits the driver"
    return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def _extras() -> list[Check]:
    found = []
    for extra, (package, purpose) in _EXTRAS.items():
        try:
            found.append(Check("good", extra, f"{package} {importlib.metadata.version(package)}"))
        except importlib.metadata.PackageNotFoundError:
            cure = install_command(extra)
            found.append(Check("absent", extra, f"{package} is not installed; needed for {purpose}", cure))
    return found


def _processors() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {_gib(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} memory"
    return Check("good", "processors", f"{usable}{memory}")
