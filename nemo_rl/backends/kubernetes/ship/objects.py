"""Answers questions about live objects: what wraps what, which closures belong together, where a thing has its name."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

from nemo_rl.backends.kubernetes.ship.errors import NotSource

_OWN = __name__.split(".")[0]


def is_ours(module: str) -> bool:
    """Classes whose way of being pickled we rely on across versions: the standard library's and this package's."""
    top = module.split(".")[0]
    return top in sys.stdlib_module_names or top == _OWN


def is_bound(obj: Any) -> bool:
    owner = getattr(obj, "__self__", None)
    return owner is not None and not isinstance(owner, types.ModuleType)


def public_home(home: str, qualname: str) -> str:
    """The shortest parent of a module that offers the same thing: private homes differ between versions."""
    parts = home.split(".")
    for i in range(1, len(parts)):
        outer, inner = sys.modules.get(".".join(parts[:i])), sys.modules[home]
        first = qualname.split(".")[0]
        if outer is not None and vars(outer).get(first) is vars(inner).get(first, object()):
            return ".".join(parts[:i])
    return home


def kind_of(obj: Any) -> str:
    return getattr(obj, "__qualname__", None) or f"an object of {type_name(obj)}"


def type_name(obj: Any) -> str:
    cls = type(obj)
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"


def is_namedtuple(cls: type) -> bool:
    """Whether a class was made by collections.namedtuple, and so has no text of its own."""
    return cls.__bases__ == (tuple,) and hasattr(cls, "_field_defaults") and not hasattr(cls, "__orig_bases__")


def content(cell: Any, name: str) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        raise NotSource(f"the variable {name}, which has no value yet") from None


def owner_of(function: types.FunctionType) -> tuple[type, str] | None:
    """(class, name) of a function that is an attribute of a class at the top of its module."""
    outer, _, name = function.__qualname__.rpartition(".")
    if not outer or "<locals>" in outer:
        return None
    found: Any = function.__globals__
    for i, part in enumerate(outer.split(".")):
        found = found.get(part) if i == 0 else vars(found).get(part) if isinstance(found, type) else None
    return (found, name) if isinstance(found, type) and getattr(found, name, None) is function else None


def closure_group(function: types.FunctionType) -> tuple[list[types.FunctionType], dict[str, Any]]:
    """The closure and the functions it reaches that share variables with it; and all their variables."""
    members = [function]
    cells: dict[str, Any] = {}
    outer = function.__qualname__.rpartition(".")[0]
    for member in members:
        for name, cell in zip(member.__code__.co_freevars, member.__closure__ or (), strict=True):
            if name == "__class__":
                raise NotSource(f"{function.__qualname__}, a method outside its class")
            if cells.setdefault(name, cell) is not cell:
                raise NotSource(f"{function.__qualname__}: its variable {name} stands for several things")
    i = 0
    while i < len(members):
        held = {id(cell) for cell in cells.values()}
        for cell in list(cells.values()):
            value = content(cell, "")
            if not isinstance(value, types.FunctionType) or value in members or not value.__closure__:
                continue
            mine = dict(zip(value.__code__.co_freevars, value.__closure__, strict=True))
            joins = any(id(c) in held for c in mine.values()) and value.__qualname__.rpartition(".")[0] == outer
            if joins and all(cells.get(n, c) is c for n, c in mine.items()):
                members.append(value)
                cells.update(mine)
        i += 1
    return members, cells


def space_of_class(cls: type) -> dict[str, Any]:
    for value in vars(cls).values():
        method = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if isinstance(method, types.FunctionType) and method.__qualname__.startswith(cls.__qualname__ + "."):
            return method.__globals__
    home = sys.modules.get(cls.__module__)
    if home is None:
        raise NotSource(f"class {cls.__name__}: its module {cls.__module__} is not loaded")
    return vars(home)


def inner_functions(obj: Any) -> list[types.FunctionType]:
    """Functions that a decorator may have wrapped into `obj`, outermost first."""
    found: list[types.FunctionType] = []
    todo, seen = [(obj, 0)], set()
    while todo:
        each, depth = todo.pop(0)
        if id(each) in seen or depth > 6:
            continue
        seen.add(id(each))
        inside: list[Any] = [getattr(each, "__wrapped__", None)] if not isinstance(each, type) else []
        if isinstance(each, types.FunctionType):
            found.append(each)
            inside += [cell.cell_contents for cell in each.__closure__ or () if _has_content(cell)]
        elif isinstance(each, functools.partial):
            inside.append(each.func)
        elif not isinstance(each, type | types.ModuleType | types.MethodType) and hasattr(each, "__dict__"):
            inside += list(vars(each).values())
        todo += [(value, depth + 1) for value in inside if callable(value)]
    return found


def _has_content(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
