"""`nemo-rl plan`: whether a job fits its GPUs, what is chosen for it, and what would make it fit.

What needs torch is imported inside functions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rl.errors import MissingPackage
from nemo_rl.extras import explained
from nemo_rl.job.manifest import Manifest, ManifestError, load_manifest, parse_manifest
from nemo_rl.job.spec import RLTrainingJobSpec

USAGE = 2
DOES_NOT_FIT = 1
USUAL_GIB = 80.0
_REQUIRED = {"grpo": "\n  reward: {builtin: length}", "sft": "", "dpo": ""}
"""What a job of an algorithm must have, and what its memory does not depend on."""


def plan_job(
    path: Path | None,
    *,
    model: str | None,
    algorithm: str,
    gpus: int | None,
    gpu_memory: float | None,
    overrides: Sequence[str],
    as_json: bool = False,
) -> int:
    """Prints the plan of a job's file or of a model; returns the exit code and never raises. Errors go to stderr."""
    try:
        spec = _manifest(path, model, algorithm, overrides).spec
        with explained("nemo-rl plan"):
            text = _plan(spec, gpus, gpu_memory, as_json)
        print(text)
    except _DoesNotFit as error:
        print(f"nemo-rl: {error}" if not as_json else error.as_json)
        return DOES_NOT_FIT
    except (ManifestError, ValueError, MissingPackage) as error:
        print(f"nemo-rl: {error}", file=sys.stderr)
        return USAGE
    return 0


class _DoesNotFit(Exception):
    def __init__(self, message: str, as_json: str) -> None:
        super().__init__(message)
        self.as_json = as_json


def _manifest(path: Path | None, model: str | None, algorithm: str, overrides: Sequence[str]) -> Manifest:
    if (path is None) == (model is None):
        raise ValueError("give the file of a job, or --model with a folder or a name on the hub, and not both")
    if path is not None:
        return load_manifest(path, overrides)
    if algorithm not in _REQUIRED:
        raise ValueError(f"found --algorithm {algorithm}; expected one of {', '.join(_REQUIRED)}")
    assert model is not None
    text = (
        "apiVersion: nemo-rl.io/v1alpha1\nkind: RLTrainingJob\nmetadata: {name: plan}\nspec:\n"
        f"  algorithm: {algorithm}\n  dataset: {{name: any}}\n  model: {_quoted(model)}{_REQUIRED[algorithm]}\n"
    )
    return parse_manifest(text, source="--model", overrides=overrides)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _plan(spec: RLTrainingJobSpec, gpus: int | None, gpu_memory: float | None, as_json: bool) -> str:
    from nemo_rl.model.memory import GIB, DoesNotFit, Planner, Where, load_config

    ranks = gpus if gpus is not None else spec.resources.nodes * max(1, spec.resources.gpus_per_node)
    on_cpu = gpus is None and spec.resources.gpus_per_node == 0
    given = None if gpu_memory is None else int(gpu_memory * GIB)
    where = Where(ranks, device="cpu") if on_cpu else Where(ranks, given or _gpu_of_this_machine())
    planner = Planner(load_config(spec.model, spec.training.trust_remote_code), spec)
    try:
        found = planner.choose(where)
    except DoesNotFit as error:
        raise _DoesNotFit(str(error), error.least.as_json()) from None
    if as_json:
        return found.as_json()
    lines = [found.sentence(), "", "GiB on each rank", found.table()]
    if found.rows_at_once is not None:
        lines += ["", f"rollouts: {found.rows_at_once:,} completions at once on each rank"]
    if planner.by_formula:
        lines += ["", "activations of this family are estimated by a formula: its layers do not run without numbers"]
    if not found.fits:
        lines += [
            "",
            f"it is tight: with less than {1 - _share():.0%} to spare; {' or '.join(planner.cures(where)[:1])}",
        ]
    return "\n".join(lines)


def _share() -> float:
    from nemo_rl.model.memory import SHARE

    return SHARE


def _gpu_of_this_machine() -> int:
    import torch

    from nemo_rl.model.memory import GIB

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(USUAL_GIB * GIB)


def say_memory(spec: RLTrainingJobSpec) -> None:
    """Says on stderr what a job takes, for --dry-run, where the model's configuration is on this machine."""
    if not _config_is_here(spec.model):
        return
    from nemo_rl.model.memory import DoesNotFit, Planner, Where, load_config

    resources = spec.resources
    try:
        config = load_config(spec.model, spec.training.trust_remote_code, local_only=True)
        planner: Any = Planner(config, spec)
        ranks = resources.nodes * max(1, resources.gpus_per_node)
        device = "cuda" if resources.gpus_per_node else "cpu"
        print(f"nemo-rl: {planner.choose(Where(ranks, device=device)).sentence()}", file=sys.stderr)
    except (DoesNotFit, ValueError) as error:
        print(f"nemo-rl: {error}", file=sys.stderr)


def _config_is_here(model: str) -> bool:
    return (Path(model).expanduser() / "config.json").is_file()
