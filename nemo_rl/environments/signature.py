"""Reads from a reward's signature how it must be called, and refuses what cannot work before anything starts."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_rl.environments.arguments import (
    COLUMN,
    EPOCH,
    FORMS,
    MESSAGES,
    PROMPT,
    QUERY,
    RAW,
    RESPONSE,
    STEP,
    TRUTH,
    Argument,
    Arguments,
    nearest,
    read_arguments,
)
from nemo_rl.environments.environment import Environment, RewardMark, mark_of


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
    @property
    def response_raw(self) -> str | None: ...
    @property
    def step(self) -> int | None: ...
    @property
    def epoch(self) -> int | None: ...


@dataclass(frozen=True)
class RewardSignature:
    """How one reward is called. `one_of` are optional columns of which the data must have at least one."""

    is_async: bool
    takes: Arguments
    one_of: tuple[str, ...] = ()

    @property
    def batched(self) -> bool:
        return self.takes.batched

    @property
    def messages(self) -> bool:
        """Whether the conversation is needed: asked for, or the form in which TRL gives prompts and completions."""
        return self.takes.has(MESSAGES) or any(
            argument.name == "completions" and argument.role == RESPONSE for argument in self.takes.given
        )

    def score_of(self, value: Any) -> Any:
        """What a reward returned; of a reward of verl, whose dict has further values for its log, the score alone."""
        of_verl = any(argument.name in ("solution_str", "solution_strs") for argument in self.takes.given)
        return value["score"] if of_verl and isinstance(value, Mapping) and "score" in value else value

    @classmethod
    def of(cls, fn: Any, columns: Collection[str] | None = None) -> RewardSignature:
        """Inspects a callable. TypeError, with what was found and the cure, if no call of it could work.

        `columns` are those of the data set besides the prompt; None where they are not known yet.
        """
        what = describe(fn)
        _refuse_odd_callables(fn, what)
        mark = mark_of(fn)
        try:
            parameters = list(inspect.signature(fn).parameters.values())
        except (ValueError, TypeError):  # some built-in functions tell nothing
            pair = (Argument("prompt", PROMPT, positional=True), Argument("response", RESPONSE, positional=True))
            return cls(_is_async(fn), Arguments(pair, False, mark.batched))
        found = f"found {what}{_shown(parameters)}"
        return cls(_is_async(fn), read_arguments(fn, parameters, mark.batched, columns, found), mark.one_of)

    def check_columns(self, what: str, columns: Collection[str]) -> None:
        """TypeError for a column that the reward names and the data lacks: says which there are, and the nearest."""
        known = sorted(columns)
        for argument in self.takes.given:
            if argument.role == TRUTH and argument.required and not {"reward_model", argument.name} & set(columns):
                raise self._missing(what, argument.name, known)
            if argument.role == COLUMN and argument.required and argument.column not in columns:
                raise self._missing(what, argument.name, known)
        if self.one_of and not set(self.one_of).intersection(columns):
            raise TypeError(
                f"{what} needs one of the columns {', '.join(self.one_of)}; columns found: "
                f"{', '.join(known) or 'none besides the prompt'}{nearest(self.one_of[0], known)}. "
                f"Rename the column of the data set"
            )

    @staticmethod
    def _missing(what: str, name: str, known: list[str]) -> TypeError:
        return TypeError(
            f"{what} has a parameter {name!r}, but the data set has no such column; columns found: "
            f"{', '.join(known) or 'none besides the prompt'}{nearest(name, known)}. Name a "
            f"column that is there, or give the parameter a default"
        )

    def wanted(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Those columns of a row that the reward will read."""
        if self.takes.rest:
            return dict(columns)
        names = {argument.column for argument in self.takes.columns}
        if self.takes.has(TRUTH):
            names |= {"reward_model", "ground_truth"}
        return {name: value for name, value in columns.items() if name in names}

    def arguments(self, call: Scored) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for one completion. TypeError if its row lacks a required column.

        Values that can be changed are copies: a reward that changes its row changes it for itself alone.
        """
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for argument in self.takes.given:
            value = self._value(argument, call)
            if value is _ABSENT:
                continue
            if argument.positional:
                positional.append(value)
            else:
                keywords[argument.name] = value
        return tuple(positional), {**self._rest(call.columns), **keywords}

    def batch_arguments(self, calls: Sequence[Scored]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `arguments`, for all calls at once: lists in their order; None where a row lacks an optional column."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for argument in self.takes.given:
            if argument.role in (STEP, EPOCH):  # the same for all
                keywords[argument.name] = self._value(argument, calls[0])
                continue
            values = [self._value(argument, call, batched=True) for call in calls]
            if all(value is _ABSENT for value in values):
                continue
            values = [None if value is _ABSENT else value for value in values]
            if argument.positional:
                positional.append(values)
            else:
                keywords[argument.name] = values
        rests = [self._rest(call.columns) for call in calls]
        rest = {name: [row.get(name) for row in rests] for name in dict.fromkeys(k for r in rests for k in r)}
        return tuple(positional), {**rest, **keywords}

    def _rest(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """What **columns takes: no column that a parameter has, nor one with the name of a parameter."""
        if not self.takes.rest:
            return {}
        taken = {a.name for a in self.takes.given if not a.positional} | {a.column for a in self.takes.given}
        return {name: _copied(value) for name, value in columns.items() if name not in taken}

    def _value(self, argument: Argument, call: Scored, batched: bool = False) -> Any:
        role = argument.role
        if role == COLUMN:
            if argument.column in call.columns:
                return _copied(call.columns[argument.column])
            if not argument.required:
                return _ABSENT
            raise self._lacks(argument.name, call)
        if role == TRUTH:
            return self._truth(argument, call)
        conversational = batched and call.messages is not None and self.messages and not self.takes.has(MESSAGES)
        if role == PROMPT:
            return _copied(call.messages) if conversational else call.prompt
        if role == RESPONSE:
            spoken = conversational and argument.name == "completions"
            return [{"role": "assistant", "content": call.response}] if spoken else call.response
        if role == QUERY:
            return call.prompt + call.response
        if role == RAW:
            return call.response if call.response_raw is None else call.response_raw
        if role == MESSAGES:
            return _copied(messages_of(call))
        return call.step if role == STEP else call.epoch

    def _truth(self, argument: Argument, call: Scored) -> Any:
        """verl's ground_truth: the column of that name, or the entry of the column reward_model."""
        if argument.name in call.columns:
            return _copied(call.columns[argument.name])
        model = call.columns.get("reward_model")
        if isinstance(model, Mapping) and "ground_truth" in model:
            return _copied(model["ground_truth"])
        if not argument.required:
            return _ABSENT
        raise self._lacks(argument.name, call)

    @staticmethod
    def _lacks(name: str, call: Scored) -> TypeError:
        return TypeError(
            f"this row of the data set has no column {name!r}; columns found: {', '.join(sorted(call.columns))}"
        )


_ABSENT = object()


def _copied(value: Any) -> Any:
    if value is None or isinstance(value, str | bytes | int | float | bool):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied is what the data set's author put there as one object
        return value


def messages_of(call: Scored) -> list[dict[str, Any]]:
    """The conversation of a call; a prompt that is a string is one user turn."""
    if call.messages is not None:
        return call.messages
    return call.columns.get(MESSAGES) or [{"role": "user", "content": call.prompt}]


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
    def identity(self) -> dict[str, dict[str, Any]]:
        """What tells these rewards from others, JSON-able and the same in every process: names, weights, and all that
        decides their values."""
        from nemo_rl.environments.fingerprint import fingerprint

        return {r.name: {"weight": r.weight, **fingerprint(r.target)} for r in self.rewards}


def bind_rewards(reward_fn: Any, weights: Any = None, columns: Collection[str] | None = None) -> RewardSet:
    """Checks everything that can be checked before work starts, and returns the rewards ready to run.

    Args:
        reward_fn: a callable, an `Environment` (instance or class), or a list or dict of these and of names of built-ins.
        weights: list of one number per reward, or dict of name to number (1 where a name is missing); default 1 each.
        columns: names of the data set's columns besides the prompt; None where they are not known yet.

    Raises TypeError for what cannot be called, ValueError for weights that do not fit.
    """
    entries = _entries(reward_fn)
    names = _names(entries)
    given = _weights(weights, names)
    rewards = tuple(
        _bind(name, fn, weight, columns) for name, (_, fn), weight in zip(names, entries, given, strict=True)
    )
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
        entries = [(name, _built_in(fn)) for name, fn in reward_fn.items()]
    elif isinstance(reward_fn, list | tuple):
        entries = [(fn if isinstance(fn, str) else None, _built_in(fn)) for fn in reward_fn]
    else:
        return [(None, reward_fn)]
    if not entries:
        raise ValueError("found an empty collection of rewards; give at least one")
    return entries


def _built_in(fn: Any) -> Any:
    """The built-in of that name; what is none stays as it is."""
    if not isinstance(fn, str):
        return fn
    from nemo_rl.environments.builtin import BUILTINS

    return BUILTINS.get(fn, fn)


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
                    f"found a weight for {name!r}, but the rewards are {', '.join(names)}{nearest(str(name), names)}"
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


def _bind(name: str, fn: Any, weight: float, columns: Collection[str] | None) -> BoundReward:
    if isinstance(fn, type) and issubclass(fn, Environment):
        try:
            fn = fn()
        except TypeError as error:
            raise TypeError(
                f"{fn.__name__}() failed: {error}; give an instance of the environment, {fn.__name__}(...)"
            ) from error
    if isinstance(fn, Environment):
        target = _environment_target(fn)
        return BoundReward(name, target, RewardSignature.of(target, columns), weight, fn, fn.in_process)
    return BoundReward(name, fn, RewardSignature.of(fn, columns), weight, None, mark_of(fn).in_process)


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
        from nemo_rl.environments.builtin import BUILTINS

        raise TypeError(
            f"found the text {fn!r}; expected a function, an Environment, or one of the built-ins {', '.join(BUILTINS)}"
            f"{nearest(fn, list(BUILTINS))}; a name such as 'package.module:name' is a whole reward_fn"
        )
    if not callable(fn):
        raise TypeError(f"found {fn!r} of type {type(fn).__name__}, which cannot be called; {FORMS}")
    inner = fn if inspect.isroutine(fn) or isinstance(fn, functools.partial) else type(fn).__call__
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise TypeError(f"found {what}, a generator (it has yield); expected a function that returns the reward")


def _is_async(fn: Any) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(_call_of(fn))


def _call_of(instance: Any) -> Any:
    """What runs when an instance is called."""
    return type(instance).__call__ if callable(instance) else None


def _shown(parameters: Sequence[inspect.Parameter]) -> str:
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))
