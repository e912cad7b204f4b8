"""Takes a shipped bundle apart in the pod: joins the parts, checks the digest, unpacks safely, loads the code in it.

The standard library alone is used here, so that a bundle can be checked and loaded by any Python from 3.11 on.
"""

from __future__ import annotations
import __future__

import ast
import base64
import gzip
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import linecache
import pickle
import sys
import tarfile
import types
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from nemo_rl.job import names

__path__: list[str] = []
"""Makes this module the parent of those that hold generated code; they lie in no folder of the package."""
SHIPPED = f"{__name__}.at_"
MANIFEST = "bundle.json"
FORMAT = 1
TIMES_UNPACKED = 8
MAX_UNPACKED_BYTES = TIMES_UNPACKED * names.MAX_BUNDLE_BYTES
"""Bytes of all files of a bundle together: what a small model or a large list of rows needs, and no zip bomb."""
MAX_FILES = 10_000
_TAR_OVERHEAD = 4096 * MAX_FILES
_CHUNK = 1 << 20


class BundleError(RuntimeError):
    """A shipped bundle cannot be used: incomplete, unsafe, or not loadable in this image."""


class BundleDigestMismatch(BundleError):
    """What arrived is not what the job names by its sha256; nothing of it was unpacked."""


class PythonMismatch(BundleError):
    """The bundle holds pickles of another Python version; reading them could end the interpreter."""


# --- From ConfigMap parts to a folder ---


def open_bundle(
    name: str, sha256: str, target: Path, *, root: Path = Path(names.BUNDLE_DIR), python: str | None = None
) -> Path:
    """Unpacks the bundle whose parts are mounted at root/name into target/name and returns that folder.

    Raises BundleDigestMismatch if the bytes are not those of `sha256`, PythonMismatch if `python` (the minor version
    that the job names for pickles) is not this one, BundleError if parts are missing or the archive is unsafe.
    """
    check_python(python, name)
    return open_archive(name, sha256, join_parts(root / name), target)


def open_archive(name: str, sha256: str, data: bytes, target: Path, limit: int = MAX_UNPACKED_BYTES) -> Path:
    """Unpacks the archive `data`, wherever it comes from, into target/name and returns that folder. `limit`: of all bytes in it.

    Raises BundleDigestMismatch if it is not the one of `sha256`, BundleError if it is unsafe.
    """
    check_digest(data, sha256, name)
    folder = target / name
    unpack(data, folder, limit)
    return folder


def join_parts(folder: Path) -> bytes:
    """The archive: the parts in a folder joined in order. BundleError where one is missing."""
    found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    expected = [names.bundle_part(index) for index in range(len(found))]
    if not found or found != expected:
        raise BundleError(
            f"bundle folder {folder}: found {', '.join(found) or 'no parts'}, expected {names.bundle_part(0)} and "
            f"its successors without a gap; submit the job again so that its ConfigMaps are made anew"
        )
    data = bytearray()
    for part in found:
        data += (folder / part).read_bytes()
        if len(data) > names.MAX_BUNDLE_BYTES:
            raise BundleError(f"bundle folder {folder}: more than the {names.MAX_BUNDLE_BYTES} bytes a bundle may have")
    return bytes(data)


def check_digest(data: bytes, sha256: str, name: str) -> None:
    """Raises BundleDigestMismatch unless `data` has the SHA-256 that the job names."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BundleDigestMismatch(
            f"bundle {name!r}: found sha256 {found} ({len(data)} bytes), expected {sha256}; its ConfigMaps, or its object "
            f"in the store, were changed or mixed up, and nothing was unpacked. Delete the job and submit it again"
        )


def check_python(python: str | None, name: str) -> None:
    """Raises PythonMismatch if a bundle that needs the minor version `python` cannot be read by this interpreter."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if sys.version_info < (3, 11):  # noqa: UP036 (the image is not ours to choose)
        raise PythonMismatch(f"bundle {name!r}: found Python {here} in this image, expected 3.11 or newer")
    if python is not None and python != here:
        raise PythonMismatch(
            f"bundle {name!r} holds pickles of Python {python}, found Python {here} in this image; pickled code works "
            f"only in the version that made it. Use an image with Python {python}, or define the code in a .py file or "
            f"a notebook cell so that it travels as source"
        )


class _Capped(io.RawIOBase):
    """A stream that refuses to give more than `limit` bytes, whatever the archive's headers claim."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream = stream
        self._left = self._limit = limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise BundleError(f"the bundle unpacks to more than {self._limit} bytes; refused")
        return data


def unpack(data: bytes, folder: Path, limit: int = MAX_UNPACKED_BYTES) -> None:
    """Writes the files of a tar.gz into the new or empty `folder`.

    Only plain files with relative names are accepted: no links, devices, absolute paths or `..`; at most
    `limit` bytes in MAX_FILES files. BundleError otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise BundleError(f"{folder} is not empty; a bundle is unpacked into a new folder")
    written = count = 0
    try:
        with (
            gzip.GzipFile(fileobj=io.BytesIO(data)) as inflated,
            tarfile.open(fileobj=_Capped(inflated, limit + _TAR_OVERHEAD), mode="r|") as archive,
        ):
            for member in archive:
                count += 1
                written += member.size
                if count > MAX_FILES or written > limit:
                    raise BundleError(f"the bundle holds more than {MAX_FILES} files or {limit} bytes; refused")
                path = _safe_path(member, folder)
                path.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                with open(path, "xb") as out:
                    _copy(content, out)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, FileExistsError, UnicodeError) as error:
        raise BundleError(f"the bundle is no valid tar.gz: {error}") from error


def _safe_path(member: tarfile.TarInfo, folder: Path) -> Path:
    name = PurePosixPath(member.name)
    unsafe = name.is_absolute() or ".." in name.parts or not name.parts or "\\" in member.name or "\0" in member.name
    if unsafe or not member.isreg():
        raise BundleError(f"the bundle holds {member.name!r}, expected only plain files with relative names; refused")
    return folder.joinpath(*name.parts)


def _copy(source: Any, out: BinaryIO) -> None:
    while block := source.read(_CHUNK):
        out.write(block)


# --- From a folder to the object in it ---


def load_entry(bundle_dir: Path, entrypoint: str | None = None) -> Any:
    """The reward, callback or other object that the unpacked bundle holds under `entrypoint` (default: its only one).

    The same folder gives the same object each time. A traceback through shipped code cites the user's own file or cell
    and its line. BundleError says what the image lacks; PythonMismatch comes before any pickle is read.
    """
    folder = Path(bundle_dir).resolve()
    check_python(None, folder.name)
    manifest = read_manifest(folder)
    entries: dict[str, str] = manifest["entries"]
    if entrypoint is None and len(entries) == 1:
        entrypoint = next(iter(entries))
    if entrypoint not in entries:
        raise BundleError(f"found entrypoint {entrypoint!r}, expected one of {', '.join(sorted(entries))}")
    if manifest["kind"] == "pickle":
        return _load_pickle(folder, manifest, entries[entrypoint])
    return getattr(_load_source(folder, manifest), entries[entrypoint])


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the bundle says of itself. BundleError if it holds no code, or comes from a newer client."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{folder} holds no {MANIFEST}: found a bundle of data, expected one of code") from None
    if manifest.get("format") != FORMAT:
        raise BundleError(
            f"found bundle format {manifest.get('format')}, expected {FORMAT}; use the trainer image of the client's "
            f"version"
        )
    return manifest


_objects: dict[tuple[Path, str], Any] = {}


def _load_pickle(folder: Path, manifest: Mapping[str, Any], file: str) -> Any:
    check_python(manifest["python"], folder.name)
    if (folder, file) not in _objects:
        if importlib.util.find_spec("cloudpickle") is None:
            raise BundleError("the bundle holds pickles, and this image has no cloudpickle; add it to the image")
        with _missing_modules_named(manifest), open(folder / file, "rb") as stream:
            _objects[folder, file] = pickle.load(stream)
    return _objects[folder, file]


def _load_source(folder: Path, manifest: Mapping[str, Any]) -> types.ModuleType:
    """The module of the generated file: named by its place, so that worker processes of this pod can import it too."""
    return importlib.import_module(SHIPPED + base64.b32encode(str(folder).encode()).decode().rstrip("=").lower())


class _GeneratedFile(importlib.abc.Loader):
    """Runs the chunks of a bundle's generated file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        manifest = read_manifest(self._folder)
        path = self._folder / manifest["file"]
        module.__doc__, module.__file__ = manifest.get("title"), str(path)
        _serve_modules(self._folder, manifest["modules"])
        lines = path.read_text(encoding="utf-8").split("\n")
        with _missing_modules_named(manifest):
            for chunk in manifest["chunks"]:
                _run_chunk(module, lines, chunk, str(path))
        _name_by_place(module)


def _name_by_place(module: types.ModuleType) -> None:
    """Lets pickle find what has another name here than where it was defined: lambdas, closures, hidden originals."""
    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType | type) and value.__module__ == module.__name__:
            found: Any = module
            for part in value.__qualname__.split("."):
                found = getattr(found, part, None)
            if found is not value:
                value.__qualname__ = name


def _run_chunk(module: types.ModuleType, lines: Sequence[str], chunk: Mapping[str, Any], path: str) -> None:
    """Runs one piece of the file under the user's own file name and line numbers.

    `bind` maps names that the piece defines to the names they get in the module (a hidden original of a decorated
    function must not take the name of the decorated one); without it the piece runs in the module itself.
    """
    text = lines[chunk["start"] - 1 : chunk["end"]]
    tree = ast.parse("\n".join(text))
    label = chunk.get("file") or path
    _move_lines(tree, chunk["lines"])
    _show_lines(label, text, chunk["lines"])
    code = compile_chunk(tree, label, bool(chunk.get("future")), chunk.get("imported", ()))
    if not chunk.get("bind"):
        exec(code, module.__dict__)
        return
    scratch: dict[str, Any] = {}
    exec(code, module.__dict__, scratch)
    for defined, bound in chunk["bind"].items():
        module.__dict__[bound] = scratch[defined]


def compile_chunk(tree: ast.Module, label: str, future: bool, imported: Sequence[str]) -> types.CodeType:
    """The code of a piece, equal to what its text gave where it stood; `future` postpones annotations.

    Python compiles `name.method()` otherwise where the same text imports `name`, so those imports are stated again in
    a branch that is never run.
    """
    if imported:
        branch = ast.parse("if False:\n    import " + ", ".join(imported))
        ast.increment_lineno(branch, tree.body[-1].lineno)
        tree = ast.Module(tree.body + branch.body, [])
    flags = __future__.annotations.compiler_flag if future else 0
    code: types.CodeType = compile(tree, label, "exec", flags=flags, dont_inherit=True)
    return code


def _original_line(line: int, segments: Sequence[Sequence[int]]) -> int:
    """Line `line` (from 1) of a piece in the user's file; segments are pairs (line of the piece, line there)."""
    start, original = segments[0]
    for here, there in segments:
        if here <= line:
            start, original = here, there
    return max(1, original + line - start)


def _move_lines(tree: ast.AST, segments: Sequence[Sequence[int]]) -> None:
    for node in ast.walk(tree):
        if hasattr(node, "lineno"):
            node.lineno = _original_line(node.lineno, segments)
            node.end_lineno = max(node.lineno, _original_line(node.end_lineno or 1, segments))  # type: ignore[attr-defined]


def _show_lines(label: str, text: Sequence[str], segments: Sequence[Sequence[int]]) -> None:
    """Puts the user's lines where tracebacks and inspect look for them."""
    known = linecache.cache.get(label)
    shown: list[str] = list(known[2]) if known is not None and len(known) == 4 else []
    for number, line in enumerate(text, start=1):
        place = _original_line(number, segments)
        shown.extend(["\n"] * (place - len(shown)))
        if number >= segments[0][0]:
            shown[place - 1] = line + "\n"
    # An entry without a time is never looked for on disk.
    linecache.cache[label] = (sum(map(len, shown)), None, shown, label)


class _missing_modules_named:  # noqa: N801 (a context manager, used like a function)
    """Turns a missing module into a sentence that says which package the image lacks."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self._imports: dict[str, str] = manifest.get("imports", {})

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            version = self._imports.get(error.name.split(".")[0])
            wanted = f"{error.name} ({version} where the job was submitted)" if version else error.name
            raise BundleError(
                f"the shipped code imports {wanted}, which is not in this image; use an image that has it, or import "
                f"it only where the client has it too"
            ) from error


# --- Local modules that travelled along ---


class _UserModule(importlib.machinery.SourceFileLoader):
    """Loads a shipped module under the user's own file name, so that tracebacks cite it."""

    def __init__(self, fullname: str, path: str, label: str) -> None:
        super().__init__(fullname, path)
        self._label = label

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> types.CodeType:  # type: ignore[override]
        text = importlib.util.decode_source(data)
        _show_lines(self._label, text.split("\n"), [[1, 1]])
        code: types.CodeType = compile(data, self._label, "exec", dont_inherit=True, optimize=_optimize)
        return code

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Writes no byte code: the folder may be read-only, and the name in it would be another."""

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        _pickle_by_value(module)


class _UserModules(importlib.abc.MetaPathFinder):
    """Finds generated files by their place, and local modules by their own names, before what is installed."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[Path, Mapping[str, Any]]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(SHIPPED):
            code = fullname.removeprefix(SHIPPED).upper()
            folder = Path(base64.b32decode(code + "=" * (-len(code) % 8)).decode())
            return importlib.machinery.ModuleSpec(fullname, _GeneratedFile(folder))
        if fullname not in self.files:
            return None
        file, entry = self.files[fullname]
        if entry["path"] is None:  # a folder without __init__.py
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(file)]
            return spec
        loader = _UserModule(fullname, str(file), entry["file"])
        places = [str(file.parent)] if entry["package"] else None
        return importlib.util.spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=places)


_finder = _UserModules()
sys.meta_path.insert(0, _finder)


def _serve_modules(folder: Path, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes the shipped modules importable. BundleError where a name is taken by another module."""
    for name, entry in modules.items():
        file = folder / (entry["path"] or "modules")
        known = _finder.files.get(name)
        if known is not None:
            if known[1].get("sha256") != entry.get("sha256"):
                raise BundleError(f"two bundles ship different modules called {name!r}; rename one of them")
            continue
        if name in sys.modules:
            taken = getattr(sys.modules[name], "__file__", None) or "the interpreter"
            raise BundleError(f"the shipped module {name!r} has the name of one in this image ({taken}); rename it")
        _finder.files[name] = (file, entry)


def shipped_modules() -> set[str]:
    """Names of the user's modules that bundles of this process provide."""
    return set(_finder.files)


def _pickle_by_value(module: types.ModuleType) -> None:
    """Lets cloudpickle carry objects of shipped modules to worker processes, which could not import them."""
    try:
        import cloudpickle  # type: ignore[import-untyped]
    except ImportError:
        return
    cloudpickle.register_pickle_by_value(module)


# --- What generated code calls to make objects again ---


def blank(cls: type, *args: Any, **kwargs: Any) -> Any:
    """An instance of `cls` that was not initialised."""
    return cls.__new__(cls, *args, **kwargs)


def fill(obj: Any, state: Any = None, items: Iterable[Any] = (), pairs: Iterable[tuple[Any, Any]] = ()) -> Any:
    """Gives `obj` its state and its elements by the rules of pickle, and returns it."""
    for item in items:
        obj.append(item)
    for key, value in pairs:
        obj[key] = value
    if state is None:
        return obj
    if hasattr(obj, "__setstate__"):
        obj.__setstate__(state)
        return obj
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if attributes:
        obj.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        setattr(obj, name, value)
    return obj
