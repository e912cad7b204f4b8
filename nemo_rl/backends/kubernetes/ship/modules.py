"""Tells installed modules, which the trainer image has, from the user's own files, which have to travel."""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import os
import site
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_rl.backends.kubernetes.ship.errors import NotSource, ShipError
from nemo_rl.worker.bundles import SHIPPED

_OWN = __name__.split(".")[0]
"""This package is in every trainer image, also where it is installed in editable mode here."""
_PRIVATE_NAMES = {"__main__", "__mp_main__"}


@cache
def _installed_roots() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    roots = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {*site.getsitepackages(), site.getusersitepackages()}
    roots |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages", "lib-dynload")}
    return tuple(sorted({os.path.realpath(root) + os.sep for root in roots}))


def is_installed_file(file: str) -> bool:
    """Whether a file belongs to the standard library or to an installed distribution."""
    return file.startswith("<frozen ") or os.path.realpath(file).startswith(_installed_roots())


def is_installed(module: types.ModuleType) -> bool:
    """Whether the trainer image can be expected to have this module: standard library, site-packages, nemo_rl."""
    name = module.__name__
    if name.startswith(SHIPPED):
        return False
    if name.split(".")[0] == _OWN:
        return True
    if name in _PRIVATE_NAMES:
        return False
    file = getattr(module, "__file__", None)
    if file:
        return is_installed_file(file)
    places = list(getattr(module, "__path__", ()))
    if places:
        return all(is_installed_file(os.path.join(place, "")) for place in places)
    return name in sys.builtin_module_names or getattr(module, "__spec__", None) is not None


def is_local(module: types.ModuleType) -> bool:
    """Whether this is a file of the user's that can be imported by its name, given its path."""
    spec = getattr(module, "__spec__", None)
    name = module.__name__
    return (
        name not in _PRIVATE_NAMES
        and not name.startswith(SHIPPED)
        and spec is not None
        and spec.name == name
        and sys.modules.get(name) is module
        and not is_installed(module)
    )


def home_of(obj: Any) -> tuple[str, str] | None:
    """(module, qualified name) under which an importable object is found; None for what lives in no module.

    The answer is checked: following the name gives this very object.
    """
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    home = getattr(obj, "__module__", None)
    if isinstance(name, str) and isinstance(home, str) and _follow(home, name) is obj:
        return home, name
    if isinstance(home, str) and isinstance(name, str) and isinstance(obj, type | types.FunctionType):
        return None  # code that lost its name (a closure, a redefined function) must not be found by chance
    return _search(obj)


def local_home(obj: Any) -> tuple[str, str] | None:
    """(module, name) of an object that a module of the user's holds."""
    for module in local_modules():
        for key, value in list(vars(module).items()):
            if value is obj and key.isidentifier():
                return module.__name__, key
    return None


def _follow(home: str, qualname: str) -> Any:
    found: Any = sys.modules.get(home)
    if found is None or home in _PRIVATE_NAMES:
        return None
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _search(obj: Any) -> tuple[str, str] | None:
    """Looks an object without a name of its own (torch.float32, a registry) up in all modules, by identity."""
    found = []
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or name in _PRIVATE_NAMES or module.__name__ != name:
            continue
        keys = [key for key, value in list(vars(module).items()) if value is obj and key.isidentifier()]
        if keys and (is_installed(module) or is_local(module)):
            found.append((len(name.split(".")), name.startswith("_"), name, min(keys)))
    return min(found)[2:] if found else None


def version_of(top: str) -> str | None:
    """Version of the distribution that provides the top-level module `top`; None for the standard library."""
    if top in sys.stdlib_module_names or top == _OWN:
        return None
    for distribution in _distributions().get(top, ()):
        return metadata.version(distribution)
    return "unknown version"


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def shown_path(file: str) -> str:
    """A file as its owner would name it: relative to the working directory where it lies below, else in full."""
    if file.startswith("<"):
        return file
    path = Path(os.path.abspath(file))
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.as_posix()


@dataclass
class LocalModules:
    """The user's own modules that have to travel, each with the packages it lies in and the modules it imports."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Path in the bundle → text."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Module → its entry in the manifest."""
    imports: set[str] = field(default_factory=set)
    """Top-level names of installed modules that they import."""

    def add(self, name: str) -> None:
        """Adds module `name`, its parents and its imports. NotSource or ShipError if it is no Python text."""
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            self._add_one(".".join(parts[:i]))

    def _add_one(self, name: str) -> None:
        if name in self.entries:
            return
        spec = find(name)
        if spec is None:
            raise NotSource(f"local module {name}: not found by its name")
        if name.split(".")[0] in sys.stdlib_module_names:
            raise ShipError(
                f"the local module {name!r} ({spec.origin}) has the name of a standard module, which it would replace "
                f"in the trainer; rename the file"
            )
        if spec.origin is None or spec.loader is None or not spec.has_location:
            self.entries[name] = {"path": None, "package": True, "file": name, "sha256": ""}
            return
        if not spec.origin.endswith(".py"):
            raise ShipError(
                f"the local module {name!r} is {spec.origin}, compiled code that cannot travel; build it into the "
                f"trainer image and give image=..., or replace it by a .py file"
            )
        package = spec.submodule_search_locations is not None
        path = "modules/" + name.replace(".", "/") + ("/__init__.py" if package else ".py")
        text = Path(spec.origin).read_bytes()
        self.files[path] = text
        self.entries[name] = {
            "path": path,
            "package": package,
            "file": shown_path(spec.origin),
            "sha256": hashlib.sha256(text).hexdigest(),
        }
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise NotSource(f"local module {name}: no longer valid Python ({error})") from error
        for wanted in imported_names(tree, name if package else name.rpartition(".")[0]):
            self.follow(wanted)

    def follow(self, wanted: str) -> None:
        """Adds the module that the dotted name `wanted` of an import statement lies in, if it is the user's own."""
        top = wanted.split(".")[0]
        try:
            found = find(top)
        except (ImportError, ValueError):
            return
        if found is None:
            return  # an optional import, or a guarded one; the check in a fresh process tells
        if _is_installed_spec(found):
            self.imports.add(top)
            return
        parts = wanted.split(".")
        for i in range(len(parts), 0, -1):  # the last words may be names within a module
            if find(".".join(parts[:i])) is not None:
                self.add(".".join(parts[:i]))
                return


def _is_installed_spec(spec: importlib.machinery.ModuleSpec) -> bool:
    if spec.name.split(".")[0] == _OWN or spec.origin in ("built-in", "frozen"):
        return True
    if spec.origin:
        return is_installed_file(spec.origin)
    return all(is_installed_file(os.path.join(place, "")) for place in spec.submodule_search_locations or ())


def find(name: str) -> importlib.machinery.ModuleSpec | None:
    """Spec of a module without importing it or its parents; None if there is none."""
    module = sys.modules.get(name)
    if module is not None and getattr(module, "__spec__", None) is not None:
        return module.__spec__
    parent, _, _last = name.rpartition(".")
    if not parent:
        try:
            return importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None
    outer = find(parent)
    if outer is None or outer.submodule_search_locations is None:
        return None
    return importlib.machinery.PathFinder.find_spec(name, list(outer.submodule_search_locations))


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of all modules, and of names in modules, that the import statements in `tree` ask for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")
                outer = outer[: len(outer) - (node.level - 1)]
                base = ".".join(filter(None, [*outer, base]))
            yield from (f"{base}.{alias.name}" if alias.name != "*" else base for alias in node.names)


def local_modules() -> list[types.ModuleType]:
    """All loaded modules that are the user's own files."""
    return [m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType) and is_local(m)]
