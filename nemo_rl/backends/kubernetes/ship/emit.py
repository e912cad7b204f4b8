"""Writes live objects as Python text: functions by their own source, everything else by value.

The text is only a proposal: the caller loads it in a fresh process and compares (see check.py), so what is not
foreseen here ends as a refusal or a pickle, never as a wrong reward.
"""

from __future__ import annotations

import ast
import builtins
import dis
import enum
import functools
import pathlib
import re
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemo_rl.backends.kubernetes.ship.chunks import Chunk
from nemo_rl.backends.kubernetes.ship.definitions import class_chunk, decorated_chunk, function_chunk, scope_chunk
from nemo_rl.backends.kubernetes.ship.errors import NotSource, ShipError
from nemo_rl.backends.kubernetes.ship.modules import (
    LocalModules,
    home_of,
    imported_names,
    is_installed,
    is_local,
    local_home,
)
from nemo_rl.backends.kubernetes.ship.objects import (
    closure_group,
    content,
    inner_functions,
    is_bound,
    is_namedtuple,
    is_ours,
    kind_of,
    owner_of,
    public_home,
    space_of_class,
    type_name,
)
from nemo_rl.backends.kubernetes.ship.sources import (
    SourceText,
    attribute_names,
    find_class,
    find_function,
    global_names,
    immediate_names,
    label_of,
    written_cells,
)
from nemo_rl.backends.kubernetes.ship.values import CONTAINERS, atom, container, is_atom

_OF_THE_MODULE = {"__name__", "__doc__", "__builtins__", "__package__", "__spec__", "__loader__"}
_LOCKS = {type(threading.Lock()): "Lock", type(threading.RLock()): "RLock"}
_NUMPY_TYPES = {*(f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)), "b1", "c8", "c16"}
_MUTABLE = (list, dict, set)


class NameIt(Exception):
    """A container is reached twice: start again, giving it a name."""

    def __init__(self, identity: int) -> None:
        super().__init__(identity)
        self.identity = identity


class Emitter:
    """Collects the text for one or several objects.

    With `rerun_decorators` a decorated function is its whole `@…def` text; else the decorator's inner function and
    what it closes over are written by value. `named` holds ids of containers that need a name of their own.
    """

    def __init__(self, rerun_decorators: bool, named: set[int], alive: list[Any]) -> None:
        self.rerun_decorators = rerun_decorators
        self.named = named
        self.alive = alive
        self.imports: list[str] = []
        self.chunks: list[Chunk] = []
        self.modules = LocalModules()
        self.sources: dict[str, SourceText] = {}
        self.globals: dict[str, Any] = {}
        self.reran = False
        self._known: dict[int, str] = {}
        self._imported: dict[tuple[str, str], str] = {}
        self._building: set[int] = set()
        self._inlined: set[int] = set()
        self._cells: dict[int, bool] = {}
        self._spaces: list[dict[str, Any]] = []
        self._temporary: set[str] = set()
        self._count = 0

    # --- names and lines ---

    def entry(self, obj: Any, name: str) -> str:
        """Writes `obj` and returns the name it has in the module: its own, else `name`."""
        functions = [f for f in (obj, *inner_functions(obj)) if isinstance(f, types.FunctionType)]
        for function in functions:
            self._enter(function.__globals__)
        free = all(name not in space or space[name] is obj for space in self._spaces)
        expression = self.ref(obj, want=name if free else None)
        if expression in self.globals or expression in self._temporary:
            return expression
        target = name if free and name not in self.globals else self._unique(name)
        self.globals[target] = obj
        self._line(f"{target} = {expression}")
        return target

    def _enter(self, space: dict[str, Any]) -> None:
        if not any(space is known for known in self._spaces):
            self._spaces.append(space)

    def _unique(self, base: str) -> str:
        base = base.strip("<>").strip("_") or "value"
        while True:
            self._count += 1
            name = f"_{base}_{self._count}"
            if not any(name in space for space in self._spaces) and name not in self._temporary:
                self._temporary.add(name)
                return name

    def _line(self, text: str) -> None:
        if not self.chunks or self.chunks[-1].label:
            self.chunks.append(Chunk([]))
        self.chunks[-1].lines += text.split("\n")

    @contextmanager
    def _within(self, place: str) -> Iterator[None]:
        try:
            yield
        except NotSource as error:
            raise NotSource(f"{place}: {error.what}") from error

    # --- any object ---

    def ref(self, obj: Any, want: str | None = None) -> str:
        """An expression for the object; writes what it needs before. NotSource where that is impossible."""
        if is_atom(obj):
            return atom(obj)
        if id(obj) in self._known:
            return self._known[id(obj)]
        if id(obj) in self._building:
            if type(obj) in _MUTABLE:
                raise NameIt(id(obj))
            raise NotSource(f"{kind_of(obj)} that contains itself")
        self.alive.append(obj)
        self._building.add(id(obj))
        try:
            return self._make(obj, want)
        finally:
            self._building.discard(id(obj))

    def _make(self, obj: Any, want: str | None) -> str:
        if isinstance(obj, types.ModuleType):
            return self._module(obj, None)
        if type(obj) in CONTAINERS:
            return self._container(obj)
        if isinstance(obj, enum.Enum):
            cls = self.ref(type(obj))
            return f"{cls}[{obj.name!r}]" if obj.name in type(obj).__members__ else f"{cls}({self.ref(obj.value)})"
        if isinstance(obj, re.Pattern):
            return f"{self._from('re', 'compile')}({self.ref(obj.pattern)}, {obj.flags})"
        if type(obj) in _LOCKS:
            return self._named_value(_LOCKS[type(obj)], f"{self._from('threading', _LOCKS[type(obj)])}()", obj)
        if isinstance(obj, types.FunctionType | type | types.BuiltinFunctionType):
            home = home_of(obj)
            if home and not (isinstance(obj, types.BuiltinFunctionType) and is_bound(obj)):
                return self._remember(obj, self._from(*home))
        if self.rerun_decorators and (found := self._decorated(obj)):
            return found
        if isinstance(obj, types.FunctionType):
            return self._function(obj, want)
        if isinstance(obj, type):
            return self._class(obj)
        if isinstance(obj, types.MethodType):
            return self._method(obj)
        if isinstance(obj, functools.partial):
            return self._partial(obj)
        if isinstance(obj, functools._lru_cache_wrapper):
            settings = ", ".join(f"{k}={v!r}" for k, v in obj.cache_parameters().items())
            text = f"{self._from('functools', 'lru_cache')}({settings})({self.ref(obj.__wrapped__)})"
            return self._named_value(obj.__wrapped__.__name__, text, obj)
        if isinstance(obj, types.BuiltinMethodType) and is_bound(obj):
            return f"{self.ref(obj.__self__)}.{obj.__name__}"
        if isinstance(obj, pathlib.PurePath):
            return f"{self._from('pathlib', type(obj).__name__)}({str(obj)!r})"
        if type(obj).__module__.split(".")[0] == "numpy":
            return self._numpy(obj)
        return self._instance(obj)

    def _remember(self, obj: Any, expression: str) -> str:
        self._known[id(obj)] = expression
        return expression

    def _named_value(self, base: str, text: str, obj: Any) -> str:
        """Gives a mutable object a name, so that all that refer to it share it."""
        name = self._unique(base)
        self._line(f"{name} = {text}")
        return self._remember(obj, name)

    # --- names in modules ---

    def _module(self, module: types.ModuleType, name: str | None) -> str:
        full = module.__name__
        self._need_module(module)
        name = name or self._unique(full.replace(".", "_"))
        self.imports.append(f"import {full} as {name}" if name != full else f"import {full}")
        return self._remember(module, name)

    def _need_module(self, module: types.ModuleType) -> None:
        if is_installed(module):
            self.modules.imports.add(module.__name__.split(".")[0])
        elif is_local(module):
            self.modules.add(module.__name__)
        else:
            raise NotSource(f"module {module.__name__}, which has no file that could be imported by its name")

    def _from(self, home: str, qualname: str, name: str | None = None) -> str:
        """Expression for a name in a module, imported as `name` if given."""
        home = public_home(home, qualname)
        first, _, rest = qualname.partition(".")
        if home == "builtins" and name is None and not any(first in space for space in self._spaces):
            return qualname
        module = sys.modules[home]
        self._need_module(module)
        if name is None:
            name = self._imported.get((home, first)) or self._unique(first)
        self._imported[home, first] = name
        self.imports.append(f"from {home} import {first}" + ("" if name == first else f" as {name}"))
        return f"{name}.{rest}" if rest else name

    def ensure_global(self, name: str, space: dict[str, Any]) -> None:
        """Makes the module have `name` with the value it has in `space`, the user's module."""
        if name in _OF_THE_MODULE or name not in space:
            return
        value = space[name]
        if name == "__file__":
            raise ShipError(
                f"the code reads __file__ ({value}), a file that does not exist in the pod; put the file's content "
                f"into a constant, or read it from the dataset's columns"
            )
        if name in self.globals:
            if self.globals[name] is not value:
                raise NotSource(f"two modules give the name {name} to different things")
            return
        if name in self._temporary:
            raise NotSource(f"the name {name} is used twice")
        self._enter(space)
        self.globals[name] = value
        with self._within(f"global {name}"):
            self._bind(name, value)

    def _bind(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            self._module(value, name)
            return
        if isinstance(value, types.FunctionType | type | types.BuiltinFunctionType):
            home = home_of(value)
        else:
            home = None if is_atom(value) else local_home(value)
        if home and "." not in home[1] and not is_bound(value):
            self._remember(value, self._from(*home, name=name))
            return
        expression = self.ref(value, want=name)
        if expression == name:
            return
        self._line(f"{name} = {expression}")
        if not is_atom(value) and id(value) not in self._known:
            self._remember(value, name)

    def _need(self, names: list[str], space: dict[str, Any], code: types.CodeType, besides: str = "") -> None:
        """Brings the globals that code uses, and the submodules it reaches through them."""
        attributes = attribute_names(code)
        for name in names:
            if name == besides or (name not in space and hasattr(builtins, name)):
                continue
            self.ensure_global(name, space)
            value = space.get(name)
            if isinstance(value, types.ModuleType):
                self._submodules(value, attributes, {id(value)})

    def _submodules(self, module: types.ModuleType, attributes: set[str], visited: set[int]) -> None:
        for name in sorted(attributes):
            inner = vars(module).get(name)
            if not isinstance(inner, types.ModuleType) or id(inner) in visited:
                continue
            if sys.modules.get(f"{module.__name__}.{name}") is not inner:
                continue
            if id(inner) not in self._known:
                self._module(inner, None)
            self._submodules(inner, attributes, visited | {id(inner)})

    # --- functions and classes ---

    def _place(self, chunk: Chunk, source: SourceText) -> None:
        chunk.label = self._label(source)
        self.chunks.append(chunk)
        for wanted in imported_names(ast.parse("\n".join(chunk.lines)), ""):
            self.modules.follow(wanted)

    def _label(self, source: SourceText) -> str:
        base = label = label_of(source)
        number = 1
        while label in self.sources and self.sources[label] is not source:
            number += 1
            label = f"{base} ({number})"
        self.sources[label] = source
        return label

    def _decorated(self, obj: Any) -> str | None:
        """Writes the whole decorated definition whose result `obj` is, if there is one at the top of the module."""
        for function in inner_functions(obj):
            name = function.__code__.co_name
            if function is obj or function.__closure__ or function.__globals__.get(name) is not obj:
                continue
            source, node = find_function(function)
            if not getattr(node, "decorator_list", None):
                continue
            chunk = decorated_chunk(source, node, function)
            self._enter(function.__globals__)
            now, later = immediate_names(chunk.compiled())
            self.globals[name] = obj
            self._need(now, function.__globals__, function.__code__, besides=name)
            self._place(chunk, source)
            self.reran = True
            self._remember(obj, name)
            self._need(later, function.__globals__, chunk.compiled(), besides=name)
            return name
        return None

    def _function(self, function: types.FunctionType, want: str | None) -> str:
        space = function.__globals__
        if owner := owner_of(function):
            return f"{self.ref(owner[0])}.{owner[1]}"
        home = sys.modules.get(space.get("__name__", ""))
        if home is not None and vars(home) is space and is_installed(home):
            raise NotSource(f"{function.__qualname__}, made inside the installed module {home.__name__}")
        self._no_stray_writes(function, home)
        self._enter(space)
        if function.__closure__:
            return self._scope(function, want)
        source, node = find_function(function)
        natural: str | None = getattr(node, "name", None)
        if natural and space.get(natural) is function and self.globals.get(natural, function) is function:
            target = natural
        elif want and want not in self._temporary and self.globals.get(want, function) is function:
            target = want
        else:
            target = self._unique(natural or "lambda")
        self.globals.setdefault(target, function)
        chunk, by_value = function_chunk(source, node, function, target)
        now, _ = immediate_names(chunk.compiled())
        self._need(now, space, function.__code__, besides=target)
        self._place(chunk, source)
        self._remember(function, target)
        self._extras(function, target, by_value)
        self._need(global_names(function.__code__), space, function.__code__)
        return target

    def _no_stray_writes(self, function: types.FunctionType, home: types.ModuleType | None) -> None:
        shared = home is not None and is_local(home) and vars(home) is function.__globals__
        if shared and any(step.opname == "STORE_GLOBAL" for step in dis.get_instructions(function.__code__)):
            raise NotSource(f"{function.__qualname__}, a closure that assigns globals of its module")

    def _extras(self, function: types.FunctionType, target: str, by_value: bool) -> None:
        if by_value:
            for attribute in ("__defaults__", "__kwdefaults__"):
                if (value := getattr(function, attribute)) is not None:
                    with self._within(f"defaults of {function.__name__}"):
                        self._line(f"{target}.{attribute} = {self.ref(value)}")
        if function.__dict__:
            with self._within(f"attributes of {function.__name__}"):
                self._line(f"{target}.__dict__.update({container(function.__dict__, self.ref)})")

    def _scope(self, function: types.FunctionType, want: str | None) -> str:
        """Writes a closure, with the functions that share its variables, inside a function that has these variables."""
        members, cells = closure_group(function)
        written = {name for member in members for name in written_cells(member.__code__)}
        for name, cell in cells.items():
            if id(cell) in self._cells and (self._cells[id(cell)] or name in written):
                raise NotSource(f"the variable {name}, which several functions share and change")
            self._cells[id(cell)] = name in written
        found = [(member, *find_function(member)) for member in members]
        found.sort(key=lambda item: item[2].lineno)
        own = {name: m for name, cell in cells.items() for m, _, _ in found if content(cell, name) is m}
        self._building.update(id(member) for member in members)
        arguments = []
        for name, cell in cells.items():
            if name not in own:
                with self._within(f"variable {name} around {function.__name__}"):
                    arguments.append(f"{name}={self.ref(content(cell, name))}")
        parameters = [name for name in cells if name not in own]
        scope = self._unique(f"scope_of_{function.__code__.co_name.strip('<>')}")
        chunk, inner, by_value = scope_chunk(scope, parameters, own, found)
        self._place(chunk, found[0][1])
        targets = {}
        for member, _source, _node in found:
            is_wanted = member is function and want and want not in self._temporary
            target = want if is_wanted and want else self._unique(inner[id(member)])
            self.globals.setdefault(target, member)
            targets[id(member)] = self._remember(member, target)
        self._line(f"({', '.join(targets[id(m)] for m, _, _ in found)},) = {scope}({', '.join(arguments)})")
        for member in members:
            self._building.discard(id(member))
        for member, _source, _node in found:
            self._extras(member, targets[id(member)], by_value[id(member)])
            self._need(global_names(member.__code__), member.__globals__, member.__code__)
        return targets[id(function)]

    def _class(self, cls: type) -> str:
        if is_namedtuple(cls):
            fields, defaults = list(cls._fields), list(cls._field_defaults.values())  # type: ignore[attr-defined]
            make = self._from("collections", "namedtuple")
            made = f"{make}({cls.__name__!r}, {fields!r}, defaults={self.ref(defaults)})"
            return self._named_value(cls.__name__, made, cls)
        source, node = find_class(cls)
        space = space_of_class(cls)
        self._enter(space)
        natural = space.get(node.name) is cls and self.globals.get(node.name, cls) is cls
        target = node.name if natural else self._unique(node.name)
        self.globals.setdefault(target, cls)
        chunk = class_chunk(source, node, cls, target)
        code = chunk.compiled()
        now, later = immediate_names(code)
        with self._within(f"class {cls.__name__}"):
            self._need(now, space, code, besides=node.name if natural else "")
        self._place(chunk, source)
        self._remember(cls, target)
        with self._within(f"class {cls.__name__}"):
            self._need(later, space, code, besides=node.name if natural else "")
        return target

    def _method(self, method: types.MethodType) -> str:
        name, owner = method.__name__, method.__self__
        if getattr(type(owner), name, None) is method.__func__ or isinstance(owner, type):
            return f"{self.ref(owner)}.{name}"
        return f"{self._from('types', 'MethodType')}({self.ref(method.__func__)}, {self.ref(owner)})"

    def _partial(self, obj: functools.partial[Any]) -> str:
        parts = [self.ref(obj.func), *(self.ref(arg) for arg in obj.args)]
        parts += [f"**{container(obj.keywords, self.ref)}"] if obj.keywords else []
        text = f"{self._from('functools', 'partial')}({', '.join(parts)})"
        if type(obj) is not functools.partial or obj.__dict__:
            raise NotSource("a functools.partial with attributes of its own")
        return self._named_value("partial", text, obj)

    # --- values ---

    def _container(self, obj: Any) -> str:
        if type(obj) not in _MUTABLE:
            return container(obj, self.ref)
        if id(obj) in self.named:
            name = self._named_value(type(obj).__name__, f"{type(obj).__name__}()", obj)
            self._line(f"{name}.{'extend' if type(obj) is list else 'update'}({container(obj, self.ref)})")
            return name
        if id(obj) in self._inlined:
            raise NameIt(id(obj))
        self._inlined.add(id(obj))
        return container(obj, self.ref)

    def _numpy(self, obj: Any) -> str:
        dtype = getattr(obj, "dtype", None)
        if dtype is None or dtype.str[1:] not in _NUMPY_TYPES:
            raise NotSource(f"an object of {type_name(obj)}")
        exact = f"{self._from('numpy', 'dtype')}({dtype.str!r})"
        if not hasattr(obj, "tolist") or type(obj).__name__ == "ndarray":
            if type(obj).__qualname__ != "ndarray":
                raise NotSource(f"an object of {type_name(obj)}")
            data = self.ref(obj.tobytes())
            text = f"{self._from('numpy', 'frombuffer')}({data}, {exact}).reshape({obj.shape!r}).copy()"
            return self._named_value("array", text, obj)
        return f"{self._from('numpy', 'frombuffer')}({self.ref(obj.tobytes())}, {exact})[0]"

    def _instance(self, obj: Any) -> str:
        cls = type(obj)
        home = sys.modules.get(cls.__module__)
        if isinstance(home, types.ModuleType) and is_installed(home) and not is_ours(cls.__module__):
            if found := home_of(obj):
                return self._remember(obj, self._from(*found))
            raise NotSource(f"an object of {type_name(obj)}")
        try:
            reduced = obj.__reduce_ex__(2)
        except Exception as error:
            raise NotSource(f"an object of {type_name(obj)} ({error})") from error
        if isinstance(reduced, str):
            return self._remember(obj, self._from(cls.__module__, reduced))
        self.alive.append(reduced)
        make, args, state, items, pairs = (*reduced, None, None, None, None)[:5]
        return self._rebuilt(obj, make, args, state, list(items or ()), list(pairs or ()))

    def _rebuilt(self, obj: Any, make: Any, args: Any, state: Any, items: list[Any], pairs: list[Any]) -> str:
        """Makes an instance by the rules of pickle: first without state, so that its state may refer to it."""
        self.alive += [items, pairs]
        name = type_name(obj)
        with self._within(f"an object of {name}"):
            if getattr(make, "__name__", "") == "__newobj__":
                text = f"_nemo_rl.blank({', '.join(self.ref(arg) for arg in args)})"
            elif getattr(make, "__name__", "") == "__newobj_ex__":
                raise NotSource("it is made with keyword arguments")
            else:
                text = f"{self.ref(make)}({', '.join(self.ref(arg) for arg in args)})"
        target = self._named_value(type(obj).__name__.lower(), text, obj)
        if state is None and not items and not pairs:
            return target
        contents = []
        if isinstance(state, dict):
            written = []
            for key, value in state.items():
                with self._within(f"attribute {key} of an object of {name}"):
                    written.append((self.ref(key), self.ref(value)))
            contents.append("{" + ", ".join(f"{k}: {v}" for k, v in written) + "}")
        else:
            contents.append(self.ref(state))
        if items or pairs:
            with self._within(f"elements of an object of {name}"):
                contents.append(f"items={container(items, self.ref)}")
                contents.append(f"pairs={container(pairs, self.ref)}")
        self._line(f"_nemo_rl.fill({target}, {', '.join(contents)})")
        return target
