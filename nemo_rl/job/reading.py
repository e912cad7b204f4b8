"""Reading specifications that somebody else wrote or completed: the API server, or an operator of another version.

Writers are strict: `RLTrainingJobSpec` refuses a field that it does not know, for it is most likely misspelt. Readers
are tolerant: a definition that is newer than the reader adds fields, with defaults, to every job that it serves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from nemo_rl.job.spec import ALGORITHMS, READING, RLTrainingJobSpec

_ROUNDS = 20
"""Each round removes unknown fields; those of one that was refused as a whole show only in the next."""


FIRST_LEARNING_RATE = 1e-6
"""What the first version of nemo-rl trained with where a job named no learning rate."""


@dataclass(frozen=True)
class Reading:
    """A specification as far as this version understands it."""

    spec: RLTrainingJobSpec
    unknown: tuple[str, ...] = ()
    """Paths of fields that this version does not know, below `spec`; they were left out."""


def read_spec(value: Mapping[str, Any]) -> Reading:
    """The specification, without the fields that this version does not know. ValidationError for any other problem."""
    unknown: dict[str, None] = {}
    kept: Any = value
    for _ in range(_ROUNDS):
        try:
            return Reading(RLTrainingJobSpec.model_validate(kept, context=READING), tuple(unknown))
        except ValidationError as error:
            surplus = [e["loc"] for e in error.errors(include_url=False) if e["type"] == "extra_forbidden"]
            if not surplus:
                raise
            if kept is value:
                kept = copy.deepcopy(dict(value))
            for loc in surplus:
                try:
                    _remove(kept, loc)
                except (LookupError, TypeError):
                    raise error from None
                unknown[".".join(["spec", *map(str, loc)])] = None
    return Reading(RLTrainingJobSpec.model_validate(kept, context=READING), tuple(unknown))


def read_frozen(value: Mapping[str, Any]) -> Reading:
    """As `read_spec`, of the specification in a frozen job.

    The operator writes the learning rate into each of them. One without is of the first version, whose rate was 1e-6
    for every algorithm: an attempt of a newer image goes on with it.
    """
    training = value.get("training") or {}
    if not isinstance(training, Mapping) or training.get("learningRate") is not None:
        return read_spec(value)
    return read_spec({**value, "training": {**training, "learningRate": FIRST_LEARNING_RATE}})


def salvage_spec(value: Mapping[str, Any]) -> RLTrainingJobSpec:
    """What can be understood of a specification that cannot be read as a whole, to look after a job that runs already.

    Of no use to start anything with: what is not understood has its default, and model and data are placeholders.
    """
    kept: dict[str, Any] = {"model": "unreadable", "algorithm": "sft", "dataset": {"path": "unreadable"}}
    for name, section in value.items():
        if name in ("algorithm", "reward", "callbacks", *ALGORITHMS):
            continue
        try:
            read_spec({**kept, name: section})
        except ValidationError:
            continue
        kept[name] = section
    return read_spec(kept).spec


def problems(error: ValidationError) -> str:
    """One `path: problem` per error, without the values themselves: they may be secret, and long."""
    found = (
        ".".join(["spec", *(str(part) for part in e["loc"])]) + ": " + e["msg"].removeprefix("Value error, ")
        for e in error.errors(include_url=False, include_context=False, include_input=False)
    )
    return "; ".join(found)[:900]


def _remove(value: Any, path: tuple[str | int, ...]) -> None:
    for part in path[:-1]:
        value = value[part]
    del value[path[-1]]
