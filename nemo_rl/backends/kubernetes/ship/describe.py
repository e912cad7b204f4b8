"""Describes a live object (code, constants, closures, state, all that it reaches) so that two processes can compare.

Two equal descriptions mean: the same byte code, exactly equal values, the same sharing of mutable objects. What lives
in installed modules is described by its name alone.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import re
import sys
import types
from typing import Any

from nemo_rl.backends.kubernetes.ship.modules import home_of, is_installed, is_local
from nemo_rl.backends.kubernetes.ship.sources import attribute_names, fingerprint, global_names, written_cells

Description = list[Any] | str
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_MODULE_NAMES = {"__name__", "__file__", "__doc__", "__builtins__", "__package__", "__spec__", "__loader__"}
_GENERATED = re.compile(r"__pydantic_|_abc_impl$|_member_|_value2member|_hashable_values_|_unhashable|_generate_next")


def describe(obj: Any) -> Description:
    """The description of an object as JSON-able lists and strings."""
    return _Describer().describe(obj)


def difference(here: Description, there: Description, path: str = "") -> str | None:
    """Where two descriptions first differ, in words; None if they are equal."""
    if isinstance(here, str) or isinstance(there, str):
        return None if here == there else f"{path or 'it'}: {_short(here)} here, {_short(there)} when loaded anew"
    if here[:1] == there[:1] == ["function"] and here[1] != there[1]:
        return f"{path or 'it'}: its code is not what its source text gives"
    if here[:1] != there[:1] or len(here) != len(there):
        return f"{path or 'it'}: {_short(here)} here, {_short(there)} when loaded anew"
    for mine, other in zip(here, there, strict=True):
        name = mine[0] if isinstance(mine, list) and mine and isinstance(mine[0], str) else ""
        inner = f"{path}.{name[1:]}".lstrip(".") if name.startswith(".") else path
        found = difference(mine, other, inner)
        if found:
            return found
    return None


def shares_variables(description: Description) -> bool:
    """Whether two of the described functions share a variable that one of them changes."""
    if isinstance(description, str):
        return description.startswith("shared cell ")
    return any(shares_variables(part) for part in description)


def _short(description: Description) -> str:
    text = description if isinstance(description, str) else str(description)
    return text if len(text) <= 120 else text[:117] + "..."


class _Describer:
    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.cells: dict[int, tuple[int, bool]] = {}
        self.alive: list[Any] = []
        """Objects made on the way must stay, or their ids would be used again."""

    def describe(self, obj: Any) -> Description:
        if type(obj) in _PLAIN:
            return f"{type(obj).__name__} {_exact(obj)}"
        if type(obj) in (tuple, frozenset):
            return self._container(obj)
        if id(obj) in self.seen:
            return f"again {self.seen[id(obj)]}"
        self.seen[id(obj)] = len(self.seen)
        self.alive.append(obj)
        if isinstance(obj, types.ModuleType):
            return f"module {obj.__name__}"
        if isinstance(obj, type | types.FunctionType | types.BuiltinFunctionType) or callable(obj):
            home = home_of(obj) if not isinstance(obj, types.MethodType | functools.partial) else None
            if home and is_installed(sys.modules[home[0]]):
                return f"import {home[0]}:{home[1]}"
        return self._by_kind(obj)

    def _by_kind(self, obj: Any) -> Description:
        if isinstance(obj, types.FunctionType):
            return self._function(obj)
        if isinstance(obj, type):
            return self._class(obj)
        if isinstance(obj, types.MethodType):
            return ["method", self.describe(obj.__func__), self.describe(obj.__self__)]
        if isinstance(obj, types.BuiltinMethodType) and obj.__self__ is not None:
            return ["builtin method", obj.__name__, self.describe(obj.__self__)]
        if isinstance(obj, staticmethod | classmethod):
            return [type(obj).__name__, self.describe(obj.__func__)]
        if isinstance(obj, property):
            return ["property", *(self.describe(f) for f in (obj.fget, obj.fset, obj.fdel))]
        if isinstance(obj, functools._lru_cache_wrapper):
            return ["lru_cache", repr(obj.cache_parameters()), self.describe(obj.__wrapped__)]
        if isinstance(obj, re.Pattern):
            return ["pattern", self.describe(obj.pattern), str(obj.flags)]
        if isinstance(obj, enum.Enum):
            return ["enum member", type(obj).__qualname__, obj.name or "", self.describe(obj.value)]
        if type(obj) in (list, dict, set, bytearray):
            return self._container(obj)
        if type(obj).__module__.split(".")[0] == "numpy" and hasattr(obj, "tobytes"):
            return ["numpy", str(obj.dtype), str(obj.shape), hashlib.sha256(obj.tobytes()).hexdigest()]
        return self._instance(obj)

    def _container(self, obj: Any) -> Description:
        if isinstance(obj, dict):
            return ["dict", *([self.describe(k), self.describe(v)] for k, v in obj.items())]
        if isinstance(obj, set | frozenset):
            return [type(obj).__name__, *sorted((self.describe(item) for item in obj), key=repr)]
        if isinstance(obj, bytearray):
            return f"bytearray {bytes(obj)!r}"
        return [type(obj).__name__, *(self.describe(item) for item in obj)]

    def _function(self, obj: types.FunctionType) -> Description:
        code = obj.__code__
        cells = zip(code.co_freevars, obj.__closure__ or (), strict=True)
        parts: list[Any] = [
            "function",
            fingerprint(code),
            [".defaults", self.describe(obj.__defaults__)],
            [".kwdefaults", self.describe(obj.__kwdefaults__)],
        ]
        written = written_cells(code)
        parts += [[f".{name}", self._cell(cell, name in written)] for name, cell in cells if name != "__class__"]
        parts += [[f".{name}", self.describe(v)] for name, v in sorted(obj.__dict__.items()) if name != "__module__"]
        home = sys.modules.get(obj.__globals__.get("__name__", ""))
        if home is None or vars(home) is not obj.__globals__ or not is_installed(home):
            parts += self._globals(code, obj.__globals__)
        return parts

    def _cell(self, cell: Any, written: bool) -> Description:
        """A cell that one function writes and another one has too must stay one cell; of others the value says all."""
        known = self.cells.get(id(cell))
        self.cells[id(cell)] = (len(self.cells) if known is None else known[0], written or bool(known and known[1]))
        self.alive.append(cell)
        if known is not None and (written or known[1]):
            return f"shared cell {known[0]}"
        try:
            return self.describe(cell.cell_contents)
        except ValueError:
            return "empty cell"

    def _globals(self, code: types.CodeType, module: dict[str, Any]) -> list[Any]:
        found: list[Any] = []
        attributes = attribute_names(code)
        for name in sorted(global_names(code)):
            if name in _MODULE_NAMES or name not in module:
                continue
            value = module[name]
            found.append([f".{name}", self.describe(value)])
            if isinstance(value, types.ModuleType) and is_local(value):
                found += self._attributes(value, attributes, {id(value)})
        return found

    def _attributes(self, module: types.ModuleType, names: set[str], visited: set[int]) -> list[Any]:
        """What the code can reach in a local module by the attribute names that occur in it."""
        found: list[Any] = []
        for name in sorted(names & vars(module).keys() - _MODULE_NAMES):
            value = vars(module)[name]
            if isinstance(value, types.ModuleType):
                if is_local(value) and id(value) not in visited:
                    found += self._attributes(value, names, visited | {id(value)})
            else:
                found.append([f".{module.__name__}.{name}", self.describe(value)])
        return found

    def _class(self, cls: type) -> Description:
        parts: list[Any] = ["class", cls.__name__, [".bases", *(self.describe(base) for base in cls.__bases__)]]
        if issubclass(cls, enum.Enum):
            return [*parts, *([f".{m.name}", self.describe(m.value)] for m in cls)]
        for name, value in sorted(vars(cls).items()):
            code = isinstance(value, types.FunctionType | staticmethod | classmethod | property)
            if _GENERATED.match(name) or (name.startswith("__") and name.endswith("__") and not code):
                continue
            if name.startswith("__annotate"):
                continue
            if isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType):
                parts.append([f".{name}", "slot"])
            else:
                parts.append([f".{name}", self.describe(value)])
        return parts

    def _instance(self, obj: Any) -> Description:
        cls = type(obj)
        try:
            reduced = obj.__reduce_ex__(2)
        except Exception:
            return ["instance", self.describe(cls), "opaque"]
        if isinstance(reduced, str):
            return f"import {getattr(obj, '__module__', '')}:{reduced}"
        self.alive.append(reduced)
        make, args, state, items, pairs = (*reduced, None, None, None, None)[:5]
        parts: list[Any] = ["instance", self.describe(cls), [".made by", self.describe(make)]]
        parts.append([".arguments", *(self.describe(arg) for arg in args if arg is not cls)])
        if isinstance(state, dict):
            parts += [[f".{name}", self.describe(value)] for name, value in state.items() if name != "__module__"]
        else:
            parts.append([".state", self.describe(state)])
        parts.append([".items", *(self.describe(item) for item in items or ())])
        parts.append([".pairs", *([self.describe(k), self.describe(v)] for k, v in pairs or ())])
        return parts


def _exact(value: Any) -> str:
    if type(value) is int and abs(value) >= 1 << 64:
        return hex(value)
    return ascii(value)
