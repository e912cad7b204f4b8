"""Tells one reward from another by all that decides its values: code, helpers, constants, attributes and files that it reads.

Code counts by its syntax tree where the source is at hand, without comments, docstrings and annotations, so that the same
reward has the same fingerprint under another minor version of Python; else by its byte code.
"""

from __future__ import annotations
import __future__

import ast
import datetime
import decimal
import dis
import enum
import fractions
import functools
import hashlib
import importlib.util
import json
import linecache
import math
import os
import pathlib
import re
import sys
import types
import uuid
from collections.abc import Iterator
from functools import cache
from typing import Any

from nemo_rl.environments.pickling import is_installed_file
from nemo_rl.run.directory import DIGEST

_SHOWN = 80
"""Longest value that is kept as it is; longer ones as a digest."""
_LARGEST = 1 << 28
"""Bytes of a file or array that are read whole; of larger ones the ends, or a sample."""
_SAMPLE = 4096
_READ_SUFFIXES = frozenset(
    {".json", ".jsonl", ".txt", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".parquet", ".npy", ".npz", ".pt", ".pkl"}
    | {".safetensors", ".md", ".jinja", ".j2", ".xml", ".html", ".arrow", ".gz"}
)
"""Of files with these names the contents count. Not of logs and data bases, which a reward writes itself."""
_WRITES = re.compile(r"(?:[wax][bt]?\+?|r[bt]?\+|[wax]\+?[bt])\Z")
_WRITING_CALLS = frozenset({"write_text", "write_bytes", "savez", "save", "to_csv", "to_json", "to_parquet", "dump"})
_PLAIN = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    range,
    complex,
)
_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag


def fingerprint(target: Any) -> dict[str, Any]:
    """What decides the values of a callable, by name: short constants as they are, code and long values as digests.

    Equal in every process for equal rewards. What only exists in this process (a connection, a lock) counts by its type.
    """
    walk = _Walk()
    walk.value(target)
    walk.count_files()
    return {name: _plain(text) for name, text in sorted(walk.parts.items())}


class _Walk:
    """One pass over the objects that a callable reaches, each once."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self._labels: dict[int, str] = {}
        self._alive: list[Any] = []
        self._writes = False
        self._files: set[str] = set()

    def value(self, value: Any) -> str:
        """A text that is equal for equal values. What it reaches beyond itself is put into `parts`."""
        if value is None or type(value) in (bool, int, float):
            return json.dumps(value)
        if isinstance(value, str):
            self._file(value)
            return _short(json.dumps(value, ensure_ascii=False))
        if isinstance(value, bytes | bytearray):
            return _short(repr(bytes(value)))
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, _PLAIN):
            return _short(repr(value))
        if isinstance(value, pathlib.PurePath):
            self._file(str(value))
            return _short(repr(str(value)))
        if isinstance(value, re.Pattern):
            return _short(f"{value.pattern!r}, flags {int(value.flags)}")
        if id(value) in self._labels:
            return self._labels[id(value)]
        self._alive.append(value)  # an id stays that of the object while it lives
        self._labels[id(value)] = f"<{type(value).__qualname__}>"
        found = self._compound(value)
        self._labels[id(value)] = found
        return found

    def _compound(self, value: Any) -> str:
        if isinstance(value, list | tuple | dict | set | frozenset):
            return _short(self._container(value))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return f"{self.value(value.__func__)} of {self.value(value.__self__)}"
        if isinstance(value, functools.partial):
            given = [self.value(item) for item in value.args]
            given += [f"{name}={self.value(item)}" for name, item in sorted(value.keywords.items())]
            label = self.value(value.func)
            if given:
                self._put(f"arguments of partial({label.removesuffix('()')})", _short(", ".join(given)))
            return f"partial({label})"
        if isinstance(value, staticmethod | classmethod):
            return self.value(value.__func__)
        if isinstance(value, property):
            return ", ".join(self.value(part) for part in (value.fget, value.fset) if part is not None)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, type):
            return self._class(value)
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None and not isinstance(value, types.ModuleType):
            return self.value(wrapped)
        if (numbers := _numbers(value)) is not None:
            return numbers
        return self._instance(value)

    def _container(self, value: Any) -> str:
        try:
            return json.dumps(value, sort_keys=True, allow_nan=True)
        except (TypeError, ValueError):
            pass
        if isinstance(value, dict):
            pairs = sorted((self.value(key), self.value(item)) for key, item in value.items())
            return "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
        items = [self.value(item) for item in value]
        if isinstance(value, set | frozenset):
            items.sort()
        return "[" + ", ".join(items) + "]"

    # ------------------------------------------------------------------ code

    def _function(self, function: types.FunctionType) -> str:
        code = function.__code__
        name = function.__qualname__.rpartition("<locals>.")[2]
        label = "lambda" if name == "<lambda>" else f"{name}()"
        self._labels[id(function)] = label
        for free, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._named(free, content)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if defaults:
            self._put(f"defaults of {label}", _short(", ".join(map(self.value, defaults))))
        if is_installed_file(code.co_filename):
            self._put(label, f"of {function.__module__}")
            return label
        self._put(label, DIGEST + _code_digest(function))
        names, attributes = _names_of(code)
        for used in names:
            if used in function.__globals__:
                self._global(used, function.__globals__[used], attributes)
        for module in _imported_within(code, function.__globals__.get("__package__")):
            self._module(module, attributes)
        for text in _texts_in(code):
            self._file(text)
        opens = "open" in names or "open" in attributes
        writes = opens and any(_WRITES.match(text) for text in _texts_in(code))
        self._writes = self._writes or writes or bool(_WRITING_CALLS.intersection(attributes))
        return label

    def _global(self, name: str, value: Any, attributes: list[str]) -> None:
        if isinstance(value, types.ModuleType):
            self._module(value, attributes)
        else:
            self._named(name, value)

    def _named(self, name: str, value: Any) -> None:
        text = self.value(value)
        reached = isinstance(value, types.FunctionType | types.MethodType | type | types.ModuleType)
        if not reached:  # what is put by its own name already
            self._put(name, text)

    def _module(self, module: types.ModuleType | str, attributes: list[str]) -> None:
        """Of a module of the user's, what the code names of it."""
        if isinstance(module, str):
            loaded = sys.modules.get(module)
            if loaded is None:
                self._source_of(module)
                return
            module = loaded
        if not _is_users(module) or (id(module) in self._labels and not attributes):
            return
        for name in attributes:
            if name in vars(module):
                value = vars(module)[name]
                if isinstance(value, types.ModuleType):
                    if value is not module and id(value) not in self._labels:
                        self._labels[id(value)] = f"module {value.__name__}"
                        self._module(value, attributes)
                else:
                    self._named(f"{module.__name__}.{name}", value)

    def _source_of(self, name: str) -> None:
        """A module that the code imports when it is called, and that is not loaded yet."""
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return
        if spec is None or spec.origin is None or not spec.origin.endswith(".py") or is_installed_file(spec.origin):
            return
        with open(spec.origin, encoding="utf-8", errors="replace") as stream:
            self._put(f"module {name}", DIGEST + _sha(_canonical_text(stream.read())))

    def _class(self, cls: type) -> str:
        label = f"class {cls.__qualname__.rpartition('<locals>.')[2]}"
        self._labels[id(cls)] = label
        if not _is_users_class(cls):
            return label
        for base in cls.__mro__[1:]:
            if base is not object:
                self.value(base)
        for name, value in vars(cls).items():
            if isinstance(
                value, types.FunctionType | staticmethod | classmethod | property | functools.cached_property
            ):
                self.value(getattr(value, "func", value))
            elif not name.startswith("__") and not isinstance(value, types.MemberDescriptorType):
                self._put(f"{label.removeprefix('class ')}.{name}", self.value(value))
        return label

    def _instance(self, value: Any) -> str:
        cls = type(value)
        name = cls.__qualname__.rpartition("<locals>.")[2]
        self.value(cls)
        if not _is_users_class(cls) and not _holds_plain_fields(cls):
            return f"<{cls.__module__}.{name}>"
        for attribute, content in sorted(_attributes(value)):
            self._put(f"{name}.{attribute}", self.value(content))
        return f"<{name}>"

    # ------------------------------------------------------------------ files, and what is found

    def _file(self, text: str) -> None:
        if not 2 < len(text) < 1024 or "\n" in text or os.path.splitext(text)[1].lower() not in _READ_SUFFIXES:
            return
        self._files.add(text)

    def count_files(self) -> None:
        """The contents of files whose names were found; of none where the code writes files, for these change by it."""
        for text in sorted(self._files) if not self._writes else ():
            path = os.path.expanduser(text)
            if os.path.isfile(path) and os.access(path, os.R_OK):
                self._put(f"file {text}", DIGEST + _file_digest(path))

    def _put(self, name: str, text: str) -> None:
        number, base = 2, name
        while name in self.parts and self.parts[name] != text:
            name, number = f"{base} #{number}", number + 1
        self.parts[name] = text


def _plain(text: str) -> Any:
    """A constant as itself, so that a difference is said as one writes it."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else DIGEST + _sha(text)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _file_digest(path: str) -> str:
    digest = hashlib.sha256()
    size = os.path.getsize(path)
    digest.update(str(size).encode())
    with open(path, "rb") as stream:
        if size <= _LARGEST:
            while block := stream.read(1 << 20):
                digest.update(block)
        else:
            digest.update(stream.read(1 << 20))
            stream.seek(-(1 << 20), os.SEEK_END)
            digest.update(stream.read())
    return digest.hexdigest()[:24]


def _is_users(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return module.__name__ == "__main__" or (isinstance(file, str) and not is_installed_file(file))


def _is_users_class(cls: type) -> bool:
    if cls.__module__ == "builtins":
        return False
    module = sys.modules.get(cls.__module__)
    if module is not None and getattr(module, "__file__", None) is not None:
        return _is_users(module)
    files = [v.__code__.co_filename for v in vars(cls).values() if isinstance(v, types.FunctionType)]
    return cls.__module__ not in sys.stdlib_module_names and not any(map(is_installed_file, files))


def _holds_plain_fields(cls: type) -> bool:
    return hasattr(cls, "__dataclass_fields__") or hasattr(cls, "model_fields") or cls is types.SimpleNamespace


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _numbers(value: Any) -> str | None:
    """Digest of an array, a tensor, or the weights of a torch module; None for anything else."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        weights = [f"{name} {_numbers(tensor)}" for name, tensor in value.state_dict().items()]
        return f"{type(value).__qualname__} {DIGEST}{_sha(' '.join(weights))}"
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach()
        step = max(1, math.ceil(value.numel() * value.element_size() / _LARGEST))
        flat = value.reshape(-1)[::step].cpu()
        content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()[:24]}"
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        if value.dtype.hasobject:
            return repr(value.tolist())
        content = numpy.ascontiguousarray(value).tobytes()
        return f"{value.dtype} {value.shape} {hashlib.sha256(content).hexdigest()[:24]}"
    return None


# --- what code names --------------------------------------------------------------------------------------------------


def _all_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_codes(constant)


def _names_of(code: types.CodeType) -> tuple[list[str], list[str]]:
    """The global names that code reads, and all names that follow a dot or an import in it."""
    names: dict[str, None] = {}
    others: dict[str, None] = {}
    for part in _all_codes(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names[instruction.argval] = None
        others |= dict.fromkeys(part.co_names)
    return list(names), list(others)


def _imported_within(code: types.CodeType, package: str | None) -> list[str]:
    found: dict[str, None] = {}
    for part in _all_codes(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname == "IMPORT_NAME" and instruction.argval:
                found[instruction.argval] = None
                if package:
                    found[f"{package}.{instruction.argval}"] = None
    return list(found)


def _texts_in(code: types.CodeType) -> Iterator[str]:
    for part in _all_codes(code):
        for constant in part.co_consts:
            if isinstance(constant, str):
                yield constant


# --- code as a digest -------------------------------------------------------------------------------------------------


def _code_digest(function: types.FunctionType) -> str:
    node = _node_of(function.__code__)
    if node is not None:
        # The values of defaults count by themselves.
        arguments = node.args  # type: ignore[attr-defined]
        parts = [_canonical(arguments, without=("defaults", "kw_defaults"))]
        parts += [_canonical(getattr(node, name), name) for name in ("body", "decorator_list") if hasattr(node, name)]
        return _sha(repr((type(node).__name__, function.__name__, parts)))
    return _sha(repr(_code_parts(function.__code__)))


def _node_of(code: types.CodeType) -> ast.AST | None:
    """The syntax tree that a code object was compiled from; None where the source does not say so, or is not there."""
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename))
    parsed = _parsed(text, code.co_filename, code.co_flags & _FUTURES) if text else None
    if parsed is None:
        return None
    tree, compiled = parsed
    wanted = repr(_code_parts(code))
    if not any(
        c.co_firstlineno == code.co_firstlineno and c.co_name == code.co_name and repr(_code_parts(c)) == wanted
        for c in _all_codes(compiled)
    ):
        return None  # edited since it was loaded, or loaded in another way than from these lines
    nodes = [node for node in ast.walk(tree) if _begins_at(node, code)]
    if len(nodes) > 1:  # several lambdas in a line: the one around the instructions
        places = [
            (line, column) for line, _, column, _ in code.co_positions() if line is not None and column is not None
        ]
        place = places[-1] if places else (0, 0)
        around = [n for n in nodes if (n.lineno, n.col_offset) <= place < (n.end_lineno, n.end_col_offset)]  # type: ignore[attr-defined]
        nodes = sorted(around, key=lambda n: (n.lineno, n.col_offset))[-1:]  # type: ignore[attr-defined]
    return nodes[0] if nodes else None


def _begins_at(node: ast.AST, code: types.CodeType) -> bool:
    if isinstance(node, ast.Lambda):
        return code.co_name == "<lambda>" and node.lineno == code.co_firstlineno
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return node.name == code.co_name and first == code.co_firstlineno
    return False


@cache
def _parsed(text: str, file: str, futures: int) -> tuple[ast.AST, types.CodeType] | None:
    try:
        tree = ast.parse(text, file)
        return tree, compile(text, file, "exec", flags=futures, dont_inherit=True)
    except (SyntaxError, ValueError):
        return None


def _canonical_text(text: str) -> str:
    try:
        return repr(_canonical(ast.parse(text)))
    except (SyntaxError, ValueError):
        return text


def _canonical(node: Any, field: str = "", without: tuple[str, ...] = ()) -> Any:
    """A syntax tree without what changes nothing: comments, docstrings, annotations, and what Python versions add."""
    if isinstance(node, list):
        return [_canonical(item) for item in node if field != "body" or not _is_docstring(item)]
    if not isinstance(node, ast.AST):
        return sorted(map(repr, node)) if isinstance(node, frozenset) else repr(node)
    found: list[Any] = [type(node).__name__]
    for name in node._fields:
        value = getattr(node, name, None)
        if value is None and not isinstance(node, ast.Constant):
            continue
        if (
            value == []
            or name in without
            or name in ("ctx", "kind", "type_comment", "returns", "annotation", "type_params")
        ):
            continue
        found.append((name, _canonical(value, name)))
    return found


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _code_parts(code: types.CodeType) -> tuple[Any, ...]:
    return (code.co_name, code.co_code, code.co_names, code.co_varnames, tuple(map(_constant, code.co_consts)))


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code_parts(value)
    if isinstance(value, frozenset):  # its order depends on the process's hash seed
        return sorted(map(repr, value))
    return repr(value)
