"""Packages that a feature needs and that may not be there: which extra brings them, and the command that installs them.

The name `nemo-rl` belongs to another project on the Python registry, so no command here names it: they name the packages.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_rl.errors import MissingPackage

_BROUGHT_BY = {
    "urllib3": "kubernetes",
    "tokenizers": "transformers",
    "huggingface_hub": "transformers",
    "pyarrow": "datasets",
    "pandas": "datasets",
    "sklearn": "math_verify",
    "mlflow": "mlflow_skinny",
    "anyio": "starlette",
}
"""Packages that come with another one."""


@functools.cache
def requirements(extra: str) -> tuple[str, ...]:
    """What an extra of this installation asks for, as pip takes it: ("peft>=0.18",); beyond the engine where it has that."""
    found = []
    for line in importlib.metadata.requires("nemo-rl") or []:
        requirement, _, marker = line.partition(";")
        own = re.match(r"nemo[-_]rl\[", requirement.strip())
        if not own and re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", marker):
            found.append(requirement.strip())
    if extra != "engine" and set(requirements("engine")) <= set(found):
        found = [requirement for requirement in found if requirement not in requirements("engine")]
    return tuple(found)


def install_command(extra: str) -> str:
    """The command that installs what an extra asks for, into an environment that has nemo-rl already."""
    return "pip install " + " ".join(f"'{requirement}'" for requirement in requirements(extra))


def extra_of(module: str) -> str | None:
    """The extra that brings an importable module ("torch": "engine"), or None where none does."""
    package = _plain(_BROUGHT_BY.get(module.split(".")[0], module.split(".")[0]))
    for extra in (
        "engine",
        "kubernetes",
        "lora",
        "math",
        "tensorboard",
        "wandb",
        "mlflow",
        "trackio",
        "demo",
        "notebook",
        "ui",
        "object-storage",
        "worker",
    ):
        if any(_plain(re.split(r"[\[<>=!~; ]", requirement)[0]) == package for requirement in requirements(extra)):
            return extra
    return None


def is_there(module: str) -> bool:
    """Whether a module could be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def missing(what: str, module: str) -> MissingPackage:
    """The error of a feature that needs `module`: one sentence, with the command that installs it."""
    extra = extra_of(module)
    command = install_command(extra) if extra else f"pip install {module.split('.')[0]}"
    return MissingPackage(f"{what} needs the package {module.split('.')[0]}, which is not installed; {command}")


def require(what: str, module: str) -> None:
    """MissingPackage where `module` is not there."""
    if not is_there(module):
        raise missing(what, module)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Says in one sentence which package is missing, where an import inside fails for want of one of our extras."""
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingPackage) or not error.name or extra_of(error.name) is None:
            raise
        raise missing(what, error.name) from None


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(".", "_")
