"""Reads from a reward's signature how it must be called, and refuses what cannot work before anything starts."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_rl.environments.environment import Environment, RewardMark, mark_of

_MESSAGES = "messages"
_BATCH_NAMES = ("prompts", "responses")
_LIST_NAMES = {*_BATCH_NAMES, "completions"}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_EXAMPLE = "def reward(prompt: str, response: str) -> float"
_FORMS = f"expected {_EXAMPLE}, and after these two any columns of the data set"


class Scored(Protocol):
    """What a signature reads of a call; `RewardCall` is one."""

    @property
    def prompt(self) -> str: ...
    @property
    def response(self) -> str: ...
    @property
    def messages(self) -> list[dict[str, Any]] | None: ...
    @property
    def columns(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class RewardSignature:
    """How one reward is called.

    `by_name` holds for a reward with parameters called prompt and response, in whatever order; else the first two
    positional ones get them. `required` and `optional` are columns of the data set; `rest` says that **columns takes
    all others.
    """

    batched: bool
    is_async: bool
    by_name: bool
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rest: bool = False
    messages: bool = False
    hidden: tuple[str, ...] = ()
    """Names of the first two parameters where they can be given by keyword: no column may take their place."""
    one_of: tuple[str, ...] = ()

    @classmethod
    def of(cls, fn: Any) -> RewardSignature:
        """Inspects a callable. TypeError, with what was found and the cure, if no call of it could work."""
        what = describe(fn)
        _refuse_odd_callables(fn, what)
        mark = mark_of(fn)
        try:
            parameters = list(inspect.signature(fn).parameters.values())
        except (ValueError, TypeError):  # some built-in functions tell nothing
            return cls(mark.batched, _is_async(fn), by_name=False)
        found = f"found {what}{_shown(parameters)}"
        first = [p for p in parameters if p.kind in _POSITIONAL and _is_free(fn, p)]
        names = [p.name for p in first[:2]]
        batched = mark.batched or tuple(names) == _BATCH_NAMES
        if not batched and _LIST_NAMES.intersection(names):
            raise TypeError(
                f"{found}; {_FORMS}. If it takes lists and returns a list, call the first two parameters prompts and "
                f"responses, or decorate it with @nemo_rl.batched_reward"
            )
        pair = _BATCH_NAMES if batched else ("prompt", "response")
        named = {p.name for p in parameters if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        by_name = named.issuperset(pair)
        if not by_name:
            _check_first_two(found, first, parameters, pair)
        taken = set(pair) if by_name else set(names)
        others = [p for p in parameters if p.name not in taken]
        if hopeless := [p.name for p in others if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]:
            raise TypeError(f"{found}: parameter {hopeless[0]!r} is positional-only; columns are passed by name")
        columns = [p for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != _MESSAGES]
        return cls(
            batched,
            _is_async(fn),
            by_name,
            required=tuple(p.name for p in columns if p.default is p.empty),
            optional=tuple(p.name for p in columns if p.default is not p.empty),
            rest=any(p.kind is p.VAR_KEYWORD for p in others),
            messages=any(p.name == _MESSAGES and p.kind is not p.VAR_KEYWORD for p in others),
            hidden=tuple(sorted(taken & named)),
            one_of=mark.one_of,
        )

    def check_columns(self, what: str, columns: Collection[str]) -> None:
        """TypeError for a column that the reward names and the data lacks: says which there are, and the nearest."""
        known = sorted(columns)
        for name in self.required:
            if name not in columns:
                raise TypeError(
                    f"{what} has a parameter {name!r}, but the data set has no such column; columns found: "
                    f"{', '.join(known) or 'none besides the prompt'}{_nearest(name, known)}. Name a "
                    f"column that is there, or give the parameter a default"
                )
        if self.one_of and not set(self.one_of).intersection(columns):
            raise TypeError(
                f"{what} needs one of the columns {', '.join(self.one_of)}; columns found: "
                f"{', '.join(known) or 'none besides the prompt'}{_nearest(self.one_of[0], known)}. "
                f"Rename the column of the data set"
            )

    def wanted(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Those columns of a row that the reward will read."""
        if self.rest:
            return {name: value for name, value in columns.items() if name not in self.hidden}
        return {name: columns[name] for name in (*self.required, *self.optional) if name in columns}

    def arguments(self, call: Scored) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for one completion. TypeError if its row lacks a required column."""
        keywords = self.wanted(call.columns)
        self._require(keywords)
        if self.messages:
            keywords[_MESSAGES] = messages_of(call)
        if self.by_name:
            return (), {"prompt": call.prompt, "response": call.response, **keywords}
        return (call.prompt, call.response), keywords

    def batch_arguments(self, calls: Sequence[Scored]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `arguments`, for all calls at once: lists in their order; None where a row lacks an optional column."""
        rows = [self.wanted(call.columns) for call in calls]
        for row in rows:
            self._require(row)
        keywords: dict[str, Any] = {
            name: [row.get(name) for row in rows] for name in dict.fromkeys(k for r in rows for k in r)
        }
        if self.messages:
            keywords[_MESSAGES] = [messages_of(call) for call in calls]
        prompts, responses = [call.prompt for call in calls], [call.response for call in calls]
        if self.by_name:
            return (), {"prompts": prompts, "responses": responses, **keywords}
        return (prompts, responses), keywords

    def _require(self, row: Mapping[str, Any]) -> None:
        for name in self.required:
            if name not in row:
                raise TypeError(
                    f"this row of the data set has no column {name!r}; columns found: {', '.join(sorted(row))}"
                )


def messages_of(call: Scored) -> list[dict[str, Any]]:
    """The conversation of a call; a prompt that is a string is one user turn."""
    if call.messages is not None:
        return call.messages
    return call.columns.get(_MESSAGES) or [{"role": "user", "content": call.prompt}]


@dataclass(frozen=True)
class BoundReward:
    """One reward of a set. `target` is what is called; `environment` the object it belongs to, if any."""

    name: str
    target: Callable[..., Any]
    signature: RewardSignature
    weight: float = 1.0
    environment: Environment | None = None
    in_process: bool = False


@dataclass(frozen=True)
class RewardSet:
    """All rewards of a run, checked. The score of a completion is the sum of weight times reward.

    `named` says that there are several, so that each is also logged by its name.
    """

    rewards: tuple[BoundReward, ...]
    named: bool

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What tells these rewards from others, JSON-able and the same in every process: names, weights, byte code."""
        return [{"name": r.name, "weight": r.weight, "code": _fingerprint(r.target)} for r in self.rewards]


def bind_rewards(reward_fn: Any, weights: Any = None, columns: Collection[str] | None = None) -> RewardSet:
    """Checks everything that can be checked before work starts, and returns the rewards ready to run.

    Args:
        reward_fn: a callable, an `Environment` (instance or class), a list of these, or a dict of name to one.
        weights: list of one number per reward, or dict of name to number (1 where a name is missing); default 1 each.
        columns: names of the data set's columns besides the prompt; None where they are not known yet.

    Raises TypeError for what cannot be called, ValueError for weights that do not fit.
    """
    entries = _entries(reward_fn)
    names = _names(entries)
    given = _weights(weights, names)
    rewards = tuple(_bind(name, fn, weight) for name, (_, fn), weight in zip(names, entries, given, strict=True))
    if columns is not None:
        for reward in rewards:
            reward.signature.check_columns(f"reward {reward.name!r}", columns)
    return RewardSet(rewards, named=len(rewards) > 1 or isinstance(reward_fn, Mapping))


def validate_reward_callable(fn: Any) -> tuple[bool, str | None]:
    """(True, None) for a reward that can be called, else (False, what is wrong and how to mend it)."""
    try:
        bind_rewards(fn)
    except (TypeError, ValueError) as error:
        return False, str(error)
    return True, None


def describe(fn: Any) -> str:
    """A callable as its author would call it."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", None)
    if isinstance(name, str):
        return name.rpartition("<locals>.")[2]
    return type(fn).__name__


def _entries(reward_fn: Any) -> list[tuple[str | None, Any]]:
    entries: list[tuple[str | None, Any]]
    if isinstance(reward_fn, Mapping):
        if wrong := [name for name in reward_fn if not isinstance(name, str)]:
            raise TypeError(f"found a dict of rewards with the key {wrong[0]!r}; expected names (strings)")
        entries = list(reward_fn.items())
    elif isinstance(reward_fn, list | tuple):
        entries = [(None, fn) for fn in reward_fn]
    else:
        return [(None, reward_fn)]
    if not entries:
        raise ValueError("found an empty collection of rewards; give at least one")
    return entries


def _names(entries: list[tuple[str | None, Any]]) -> list[str]:
    names: list[str] = []
    for i, (given, fn) in enumerate(entries):
        own = getattr(fn, "name", None) if isinstance(fn, Environment) else None
        name = given or mark_of(fn).name or own or describe(fn).rpartition(".")[2]
        if "<lambda>" in name:
            name = f"reward_{i + 1}" if len(entries) > 1 else "reward"
        base, number = name, 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names


def _weights(weights: Any, names: list[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                raise ValueError(
                    f"found a weight for {name!r}, but the rewards are {', '.join(names)}{_nearest(str(name), names)}"
                )
        values = [weights.get(name, 1.0) for name in names]
    elif isinstance(weights, list | tuple):
        values = list(weights)
    else:
        raise TypeError(f"found reward weights of type {type(weights).__name__}; expected a list or a dict of numbers")
    if len(values) != len(names):
        raise ValueError(
            f"found {len(values)} reward weights for {len(names)} rewards ({', '.join(names)}); give one for each"
        )
    for name, value in zip(names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"found weight {value!r} for reward {name!r}; expected a finite number")
    return [float(value) for value in values]


def _bind(name: str, fn: Any, weight: float) -> BoundReward:
    if isinstance(fn, type) and issubclass(fn, Environment):
        try:
            fn = fn()
        except TypeError as error:
            raise TypeError(
                f"{fn.__name__}() failed: {error}; give an instance of the environment, {fn.__name__}(...)"
            ) from error
    if isinstance(fn, Environment):
        target = _environment_target(fn)
        return BoundReward(name, target, RewardSignature.of(target), weight, fn, fn.in_process)
    return BoundReward(name, fn, RewardSignature.of(fn), weight, None, mark_of(fn).in_process)


def _environment_target(environment: Environment) -> Callable[..., Any]:
    for method in ("score_async", "score_batch", "score"):
        if getattr(type(environment), method) is not getattr(Environment, method):
            target: Callable[..., Any] = getattr(environment, method)
            if method == "score_batch" and not mark_of(target).batched:
                target = _Batched(target)
            return target
    raise TypeError(
        f"{type(environment).__name__} overrides none of score, score_batch and score_async; define "
        f"score(self, prompt, response) -> float"
    )


class _Batched(functools.partial[Any]):
    """A method that is batched because of its name."""

    __nemo_rl_reward__ = RewardMark(batched=True)


def _refuse_odd_callables(fn: Any, what: str) -> None:
    if isinstance(fn, type):
        raise TypeError(f"found the class {what}; expected a function or an instance: give {what}(...)")
    if isinstance(fn, str):
        raise TypeError(
            f"found the text {fn!r}; expected a callable. A reward by its name is a whole reward_fn: "
            f"'package.module:name', or a built-in's name"
        )
    if not callable(fn):
        raise TypeError(f"found {fn!r} of type {type(fn).__name__}, which cannot be called; {_FORMS}")
    inner = fn if inspect.isroutine(fn) or isinstance(fn, functools.partial) else type(fn).__call__
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise TypeError(f"found {what}, a generator (it has yield); expected a function that returns the reward")


def _is_async(fn: Any) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(_call_of(fn))


def _call_of(instance: Any) -> Any:
    """What runs when an instance is called."""
    return type(instance).__call__ if callable(instance) else None


def _is_free(fn: Any, parameter: inspect.Parameter) -> bool:
    """Whether a positional parameter can still be given by position (partial turns keyword ones into keyword-only)."""
    return not (isinstance(fn, functools.partial) and parameter.name in fn.keywords)


def _check_first_two(
    found: str, first: Sequence[inspect.Parameter], parameters: Sequence[inspect.Parameter], pair: tuple[str, str]
) -> None:
    if len(first) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise TypeError(f"{found}, which takes {len(first)} positional parameters; {_FORMS}")
    for place, name in enumerate(pair):
        wrong = next((p for p in parameters if p.name == name), None)
        if wrong is not None and (len(first) <= place or first[place].name != name):
            raise TypeError(f"{found}, which has {name} in the wrong place and lacks {pair[1 - place]}; {_FORMS}")


def _shown(parameters: Sequence[inspect.Parameter]) -> str:
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _fingerprint(fn: Any) -> str:
    """SHA-256 over what a callable does, without file and line numbers; constant over processes."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = inspect.unwrap(fn)
    code = getattr(fn, "__code__", None) or getattr(_call_of(fn), "__code__", None)
    if isinstance(code, types.CodeType):
        return hashlib.sha256(repr(_code_parts(code)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return describe(fn)


def _code_parts(code: types.CodeType) -> tuple[Any, ...]:
    return (code.co_name, code.co_code, code.co_names, code.co_varnames, tuple(map(_constant, code.co_consts)))


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code_parts(value)
    if isinstance(value, frozenset):  # its order depends on the process's hash seed
        return sorted(map(repr, value))
    return repr(value)
