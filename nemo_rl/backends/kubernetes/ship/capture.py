"""The ladder by which code travels: by its name in the image, as source, as a pickle, or not at all."""

from __future__ import annotations

import functools
import json
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_rl.backends.kubernetes.ship.archive import Archive, pack
from nemo_rl.backends.kubernetes.ship.check import load_anew
from nemo_rl.backends.kubernetes.ship.chunks import render
from nemo_rl.backends.kubernetes.ship.describe import describe, difference, shares_variables
from nemo_rl.backends.kubernetes.ship.emit import Emitter, NameIt
from nemo_rl.backends.kubernetes.ship.errors import MissingModule, NotSource, ShipError
from nemo_rl.backends.kubernetes.ship.modules import home_of, is_installed, version_of
from nemo_rl.backends.kubernetes.ship.pickles import pickled
from nemo_rl.backends.kubernetes.ship.sources import cell_name, is_cell
from nemo_rl.backends.kubernetes.ship.tokens import refuse_tokens
from nemo_rl.worker.bundles import FORMAT, MANIFEST

_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", re.ASCII)
_PUBLIC = re.compile(r"[A-Za-z][\w]{0,199}", re.ASCII)
_RESTARTS = 100
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Capture:
    """How one object travels.

    `how` "function": the image has it under `function` (package.module:name), and no bundle is needed. "source" and
    "pickle": `files` is the content of a bundle in which the pod finds it under `entrypoint`; a pickle works only in
    Python `python`. `imports` names the installed packages (top-level module → version here) that the image needs.
    `notes` says why a higher rung was left. `origins` maps the names of cells in remote tracebacks to their names here.
    """

    how: Literal["function", "source", "pickle"]
    entrypoint: str | None = None
    function: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    python: str | None = None
    imports: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def archive(self) -> Archive:
        """The files as an archive for ConfigMaps. ShipError if it is too large, or if nothing has to travel."""
        return self.packed()

    def packed(self, limit: int | None = None) -> Archive:
        """The files as an archive of at most `limit` bytes."""
        if not self.files:
            raise ShipError(f"{self.function} is in the image; no bundle is needed for it")
        return pack(self.files, "the code with what it refers to", limit)


def capture(obj: Any, name: str = "reward", *, image_python: str | None = None) -> Capture:
    """Finds the way in which `obj` (a callable, an Environment, a callback, or a list or dict of such) travels.

    `name` is the entrypoint of what has no name of its own. `image_python` ("3.11") is the Python of the trainer image
    where it is known: a pickle for another one is refused now rather than in the pod. Raises ShipError that names what
    cannot travel and the cure.
    """
    if function := importable(obj):
        return Capture("function", function=function)
    try:
        found = _as_source(obj, name)
    except NotSource as error:
        if shares_variables(describe(obj)):  # cloudpickle would silently part them
            raise ShipError(
                f"cannot ship {name}: {error.what}; keep the state in an object of a class instead"
            ) from error
        found = _as_pickle(obj, name, error.what, image_python)
    refuse_tokens(found.files)
    return found


def importable(obj: Any) -> str | None:
    """package.module:name of a function or class of an installed distribution; None for the user's own code."""
    if not isinstance(obj, types.FunctionType | types.BuiltinFunctionType | type):
        return None
    home = home_of(obj)
    if home is None or not is_installed(sys.modules[home[0]]) or not _DOTTED.fullmatch(":".join(home)):
        return None
    return ":".join(home)


def _as_source(obj: Any, name: str) -> Capture:
    """The bundle of source that was proven to give the same object. NotSource with the last reason otherwise."""
    here = describe(obj)
    reasons: list[str] = []
    for rerun_decorators in (True, False):
        try:
            emitter, variable = _emit(obj, name, rerun_decorators, set())
        except NotSource as error:
            reasons.append(error.what)
            continue
        try:
            return _proven(obj, name, here, emitter, variable)
        except NotSource as error:
            reasons.append(error.what)
            if not emitter.reran:
                break
    raise NotSource(reasons[0])


def _emit(obj: Any, name: str, rerun_decorators: bool, extra: set[str]) -> tuple[Emitter, str]:
    named: set[int] = set()
    alive: list[Any] = []
    for _ in range(_RESTARTS):
        emitter = Emitter(rerun_decorators, named, alive)
        try:
            variable = emitter.entry(obj, name)
        except NameIt as container:
            named.add(container.identity)
            continue
        except RecursionError:
            raise NotSource("it is nested too deeply") from None
        for module in sorted(extra):
            emitter.modules.add(module)
        return emitter, variable
    raise NotSource("its values refer to each other in too many ways")


def _proven(obj: Any, name: str, here: Any, emitter: Emitter, variable: str) -> Capture:
    """Loads the bundle elsewhere and compares. Modules found missing there are added, then it is tried again."""
    strays: set[str] = set()
    while True:
        found = _bundle(name, emitter, variable)
        assert found.entrypoint is not None
        try:
            loaded = load_anew(found.files, found.entrypoint, compare=True)
            new = set(loaded.strays) - emitter.modules.entries.keys() - strays
        except MissingModule as error:
            new = {error.name} - emitter.modules.entries.keys()
            if not new:
                raise NotSource(str(error)) from error
        if not new:
            break
        strays |= new
        for stray in sorted(new):
            emitter.modules.add(stray)
    differs = difference(here, loaded.description)
    if differs:
        raise NotSource(f"made anew it is not the same: {differs}")
    return found


def _bundle(name: str, emitter: Emitter, variable: str) -> Capture:
    entrypoint = variable if _PUBLIC.fullmatch(variable) else name
    file = f"code/{entrypoint}.py"
    title = f"{entrypoint}, from {', '.join(sorted(emitter.sources)) or 'installed and local modules'}"
    text, chunks = render(title, emitter.imports, emitter.chunks)
    imports = {top: version for top in sorted(emitter.modules.imports) if (version := version_of(top))}
    manifest = {
        "format": FORMAT,
        "kind": "source",
        "title": title,
        "entries": {entrypoint: variable},
        "file": file,
        "chunks": chunks,
        "modules": emitter.modules.entries,
        "imports": imports,
    }
    files = {
        MANIFEST: json.dumps(manifest, indent=1, sort_keys=True).encode(),
        file: text.encode("utf-8"),
        **emitter.modules.files,
    }
    origins = {label: cell_name(s.filename) for label, s in emitter.sources.items() if is_cell(s.filename)}
    return Capture("source", entrypoint, files=files, imports=imports, origins=origins)


def _as_pickle(obj: Any, name: str, reason: str, image_python: str | None) -> Capture:
    cure = (
        "define it in a .py file or a notebook cell, with constants that are plain values, and create connections, "
        "models and files inside it on first use"
    )
    if image_python is not None and image_python != HERE:
        raise ShipError(
            f"cannot ship {name}: {reason}. So it would have to travel as a pickle, which needs the same Python on "
            f"both sides: found {HERE} here, {image_python} in the image. Cure: {cure}; or use Python {image_python}"
        )
    try:
        files, imports = pickled(obj, name)
        load_anew(files, name, compare=False)
    except (NotSource, MissingModule) as error:
        raise ShipError(f"cannot ship {name}: {reason}; nor can it be pickled: {error}. Cure: {cure}") from error
    note = f"{name} travels as a pickle for Python {HERE}, because {reason}"
    return Capture("pickle", name, files=files, python=HERE, imports=imports, notes=(note,))
