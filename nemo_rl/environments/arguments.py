"""What each parameter of a reward means: by its name where that says it, by its place only where there is no doubt.

Names mean, in this order: `prompt` and `response` (of batched rewards `prompts` and `responses`); a column of the data set;
`messages`, `step`, `epoch`, `response_raw`; the names of other libraries, TRL (prompts, completions), verl (data_source,
solution_str, ground_truth, extra_info) and OpenRLHF (queries, prompts, labels). Two leading parameters with other names are
the prompt and the response, unless one of them has a name that speaks of something else.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

PROMPT, RESPONSE, RAW, MESSAGES, STEP, EPOCH = "prompt", "response", "response_raw", "messages", "step", "epoch"
QUERY, TRUTH, COLUMN = "query", "ground_truth", "column"

_OWN = {"prompt": PROMPT, "response": RESPONSE}
_OWN_BATCHED = {"prompts": PROMPT, "responses": RESPONSE}
_ASKED = {"messages": MESSAGES, "step": STEP, "epoch": EPOCH, "response_raw": RAW}
_RIVAL = {"completion": RESPONSE, "solution_str": RESPONSE, "ground_truth": TRUTH}
_RIVAL_BATCHED = {"completions": RESPONSE, "queries": QUERY, "solution_strs": RESPONSE, "ground_truths": TRUTH}
_LISTS = {"prompts", "responses", "completions", "queries"}
_LABELS = ("label", "labels")

_OF_THE_MODEL = frozenset(
    [
        "completion",
        "output",
        "outputs",
        "generation",
        "generated",
        "prediction",
        "predicted",
        "pred",
        "candidate",
        "reply",
        "model_output",
        "answer",
        "solution",
        "result",
        "text",
    ]
)
_OF_THE_DATA = frozenset(
    [
        "reference",
        "references",
        "label",
        "labels",
        "ground_truth",
        "gold",
        "golden",
        "target",
        "targets",
        "expected",
        "expected_answer",
        "correct",
        "truth",
        "answers",
        "data_source",
        "extra_info",
        "row",
        "item",
        "sample",
        "example",
        "meta",
        "metadata",
        "info",
        "columns",
        "kwargs",
        "tokenizer",
        "model",
        "config",
    ]
)
_OF_THE_PROMPT = frozenset(["question", "query", "instruction", "problem", "input", "user"])
_DOUBTFUL = (_OF_THE_MODEL | _OF_THE_DATA, _OF_THE_DATA | _OF_THE_PROMPT | {"answer", "solution", "prompt"})
"""Names that cannot be the prompt by their place, and names that cannot be the response by their place."""

FORMS = "expected def reward(prompt: str, response: str) -> float, and after these two any columns of the data set"


@dataclass(frozen=True)
class Argument:
    """One parameter of a reward: what it gets, and how it is given. `column` is the column it reads, if it is one."""

    name: str
    role: str
    column: str = ""
    required: bool = True
    positional: bool = False


@dataclass(frozen=True)
class Arguments:
    """All parameters of a reward, in order; `rest` says that **columns takes the columns that no parameter names."""

    given: tuple[Argument, ...]
    rest: bool
    batched: bool

    def has(self, role: str) -> bool:
        return any(argument.role == role for argument in self.given)

    @property
    def columns(self) -> list[Argument]:
        return [argument for argument in self.given if argument.role == COLUMN]


def read_arguments(
    fn: Any, parameters: Sequence[inspect.Parameter], batched: bool, columns: Collection[str] | None, found: str
) -> Arguments:
    """The meaning of each parameter. `columns` of the data set, None where they are not known yet. TypeError for doubt."""
    bound = fn.keywords if isinstance(fn, functools.partial) else {}
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in bound]
    batched = batched or any(p.name in _LISTS and p.name not in (columns or ()) for p in named)
    spread = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    sure = any(p.name in (_OWN_BATCHED if batched else _OWN) and "response" in p.name for p in named)
    roles = [_role(p, batched, columns, found, sure) for p in named]
    _by_place(named, roles, batched, columns, spread, found)
    given = []
    for parameter, role in zip(named, roles, strict=True):
        required = parameter.default is parameter.empty
        if role is None:  # a column that is not known (yet), or that only some data sets have
            role = COLUMN
        if role == COLUMN and parameter.kind is parameter.POSITIONAL_ONLY and not required:
            continue
        if role == COLUMN and parameter.kind is parameter.POSITIONAL_ONLY and parameter.name not in (columns or ()):
            raise TypeError(f"{found}: parameter {parameter.name!r} is positional-only; columns are passed by name")
        column = _column_of(parameter.name, columns) if role == COLUMN else ""
        given.append(Argument(parameter.name, role, column, required, parameter.kind is parameter.POSITIONAL_ONLY))
    if spread and not any(a.role == RESPONSE for a in given):
        given = [Argument("prompt", PROMPT, positional=True), Argument("response", RESPONSE, positional=True), *given]
    if not any(a.role in (RESPONSE, RAW, QUERY) for a in given):
        raise TypeError(
            f"{found}, which takes no response: {_shown(a.name for a in given)} are columns of the data set; {FORMS}"
        )
    return Arguments(tuple(given), any(p.kind is p.VAR_KEYWORD for p in parameters), batched)


def _role(
    parameter: inspect.Parameter, batched: bool, columns: Collection[str] | None, found: str, sure: bool
) -> str | None:
    """`sure` says that another parameter is called response, so that a column of another name is a column."""
    name = parameter.name
    own = _OWN_BATCHED if batched else _OWN
    if name in own:
        return own[name]
    rival = _RIVAL_BATCHED if batched else _RIVAL
    if columns is not None and name in columns:
        if rival.get(name) == RESPONSE and not sure:
            raise TypeError(
                f"{found}: {name!r} is a column of the data set, and in other libraries what the model wrote; call the "
                f"parameter {'responses' if batched else 'response'} for the latter, or rename the column"
            )
        return COLUMN
    if batched and name in _RIVAL and f"{name}s" not in (columns or ()):
        rival = {**_RIVAL, **rival}
    return _ASKED.get(name) or rival.get(name)


def _by_place(
    named: Sequence[inspect.Parameter],
    roles: list[str | None],
    batched: bool,
    columns: Collection[str] | None,
    spread: bool,
    found: str,
) -> None:
    """Gives the first two positional parameters their roles where names do not, and nothing else can be meant."""
    places = [i for i, p in enumerate(named) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    has_response = any(role in (RESPONSE, RAW, QUERY) for role in roles)
    if has_response:
        # (question, completion): the first is the prompt if it can be nothing else
        first = places[0] if places else -1
        unknown = first >= 0 and roles[first] is None and PROMPT not in roles
        leads = len(places) == 2 and roles[places[1]] == RESPONSE
        if unknown and leads and named[first].default is named[first].empty and not _is_doubtful(named[first], 0):
            roles[first] = PROMPT
        return
    if len(places) < 2:
        if spread:
            return
        raise TypeError(f"{found}, which takes {len(places)} positional parameters; {FORMS}")
    pair = ("prompts", "responses") if batched else ("prompt", "response")
    for place, index in enumerate(places):
        parameter, role = named[index], roles[index]
        if role == (PROMPT, RESPONSE)[place]:
            continue
        known = role is not None
        if (
            known
            and parameter.kind is parameter.POSITIONAL_ONLY
            and role == COLUMN
            and not _is_doubtful(parameter, place)
        ):
            known = False
        if known or _is_doubtful(parameter, place):
            what = "a column of the data set" if role == COLUMN else f"the name of {_meaning(parameter.name)}"
            raise TypeError(
                f"{found}: {parameter.name!r} stands in the place of the {pair[place]}, but is {what}; call the parameters "
                f"{pair[0]} and {pair[1]}; {FORMS}"
            )
    for place, index in enumerate(places):
        roles[index] = (PROMPT, RESPONSE)[place]


def _is_doubtful(parameter: inspect.Parameter, place: int) -> bool:
    return parameter.kind is not parameter.POSITIONAL_ONLY and parameter.name.lower() in _DOUBTFUL[place]


def _meaning(name: str) -> str:
    if name in _OWN or name in _OWN_BATCHED or name in _OF_THE_PROMPT:
        return "something else of the call"
    return "something of the data set" if name.lower() in _OF_THE_DATA else "what may be the data set's or the model's"


def _column_of(name: str, columns: Collection[str] | None) -> str:
    """The column that a parameter reads: of its name, or for OpenRLHF's labels the column label."""
    if columns is not None and name not in columns and name in _LABELS:
        return next((label for label in _LABELS if label in columns), name)
    return name


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shown(names: Any) -> str:
    found = list(names)
    return ", ".join(found) if found else "its parameters"
