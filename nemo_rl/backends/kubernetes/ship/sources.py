"""Finds the text that a live function or class was made from, and proves by its byte code that it is that text."""

from __future__ import annotations
import __future__

import ast
import dis
import hashlib
import linecache
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nemo_rl.backends.kubernetes.ship.errors import NotSource
from nemo_rl.backends.kubernetes.ship.modules import shown_path

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag
_KEPT_FLAGS = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x80 | 0x100 | 0x200
"""What a function is (optimised, *args, generator, coroutine, …); not where it was nested, nor its futures."""
_CELL_FILE = re.compile(
    r"<ipython-input-|[/\\]ipykernel_\d+[/\\]|[/\\]marimo_\d+[/\\]|^<(stdin|python-input|command-|cell)"
)
_FIRST_ID = 1_000_000


def fingerprint(code: types.CodeType) -> str:
    """SHA-256 of what a code object does: instructions, names and constants, without file and line numbers."""
    return hashlib.sha256(repr(_parts(code)).encode("utf-8", "surrogatepass")).hexdigest()


def _parts(code: types.CodeType) -> tuple[Any, ...]:
    return (
        *(code.co_name, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        *(code.co_flags & _KEPT_FLAGS, code.co_code, code.co_names, code.co_varnames),
        *(code.co_freevars, code.co_cellvars, getattr(code, "co_exceptiontable", b"")),
        tuple(_constant(value) for value in code.co_consts),
    )


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _parts(value)
    if isinstance(value, tuple):
        return ("tuple", *(_constant(item) for item in value))
    if isinstance(value, frozenset):
        return ("frozenset", *sorted(repr(_constant(item)) for item in value))
    return (type(value).__name__, repr(value))


def all_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code object and all that are nested in it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from all_codes(value)


def global_names(code: types.CodeType) -> list[str]:
    """Names that the code, or code nested in it, reads or writes in its module, in order of appearance."""
    found: dict[str, None] = {}
    for each in all_codes(code):
        for step in dis.get_instructions(each):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"):
                found[step.argval] = None
    return list(found)


def written_cells(code: types.CodeType) -> set[str]:
    """Names of enclosing functions' variables that the code assigns (nonlocal)."""
    steps = (step for each in all_codes(code) for step in dis.get_instructions(each))
    return {step.argval for step in steps if step.opname in ("STORE_DEREF", "DELETE_DEREF")} & set(code.co_freevars)


def attribute_names(code: types.CodeType) -> set[str]:
    """Names that may be attributes somewhere in the code."""
    return {name for each in all_codes(code) for name in each.co_names}


def immediate_names(code: types.CodeType) -> tuple[list[str], list[str]]:
    """(names read while the module code runs, names read only when its functions are called)."""
    now: dict[str, None] = {}
    later: dict[str, None] = {}
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            runs_now = not value.co_flags & 0x1 or value.co_name in (
                "<listcomp>",
                "<setcomp>",
                "<dictcomp>",
                "<genexpr>",
            )
            if runs_now:  # the body of a class
                inner_now, inner_later = immediate_names(value)
                now.update(dict.fromkeys(inner_now))
                later.update(dict.fromkeys(inner_later))
            else:
                later.update(dict.fromkeys(global_names(value)))
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            now[step.argval] = None
    return list(now), list(later)


@dataclass(eq=False)
class SourceText:
    """One file or notebook cell, parsed, with the code object of each function in it."""

    filename: str
    text: str
    futures: int
    lines: list[str] = field(init=False)
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.lines = self.text.split("\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.tree = ast.parse(self.text)

    @cached_property
    def functions(self) -> list[tuple[FunctionNode, int, types.CodeType]]:
        """Each function-like node with its first line (of the first decorator) and its code.

        A second parse gets a line number of its own for each node, so that two lambdas on a line are told apart.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            marked = ast.parse(self.text)
            nodes = [node for node in ast.walk(self.tree) if isinstance(node, FunctionNode)]
            found: list[Any] = [node for node in ast.walk(marked) if isinstance(node, FunctionNode)]
            places = list(enumerate(found))
            # The line of a decorated function is that of its first decorator, which may be a lambda marked already.
            places += [(i, node.decorator_list[0]) for i, node in places if getattr(node, "decorator_list", None)]
            for i, place in places:
                place.lineno = place.end_lineno = _FIRST_ID + i
                place.col_offset = place.end_col_offset = 0
            flags = self.futures | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            try:
                module = compile(marked, self.filename, "exec", flags=flags, dont_inherit=True)
            except (SyntaxError, ValueError):
                return []
        codes = {code.co_firstlineno: code for code in all_codes(module) if not code.co_name.startswith("<genexpr")}
        for code in all_codes(
            module
        ):  # a comprehension in a default may share the line; the function's own name decides
            index = code.co_firstlineno - _FIRST_ID
            if 0 <= index < len(nodes) and code.co_name == getattr(nodes[index], "name", "<lambda>"):
                codes[code.co_firstlineno] = code
        return [
            (node, first_line(node), codes[_FIRST_ID + i]) for i, node in enumerate(nodes) if _FIRST_ID + i in codes
        ]

    @cached_property
    def imported(self) -> set[str]:
        """Names that import statements at the top of the text give."""
        found: set[str] = set()
        todo: list[ast.AST] = list(self.tree.body)
        while todo:
            node = todo.pop()
            if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
                found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            elif not isinstance(node, FunctionNode | ast.ClassDef):
                todo += ast.iter_child_nodes(node)
        return found - {"*"}

    def imported_in(self, lines: list[str]) -> list[str]:
        """Those of them that a piece of the text uses."""
        used = {node.id for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Name)}
        return sorted(self.imported & used)


def first_line(node: ast.AST) -> int:
    """Line on which a definition begins, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    line: int = node.lineno  # type: ignore[attr-defined]
    starts: list[int] = [decorator.lineno for decorator in decorators]
    return min([line, *starts])


_texts: dict[tuple[str, str, int], SourceText | None] = {}


def texts_of(filename: str, futures: int, module_globals: dict[str, Any] | None = None) -> list[SourceText]:
    """The known texts of a file or cell: what tracebacks would show, and what is on disk now."""
    candidates = ["".join(linecache.getlines(filename, module_globals))]
    if os.path.isfile(filename):
        linecache.checkcache(filename)
        candidates.append("".join(linecache.getlines(filename, module_globals)))
    found = []
    for text in dict.fromkeys(filter(None, candidates)):
        key = (filename, text, futures)
        if key not in _texts:
            try:
                _texts[key] = SourceText(filename, text, futures)
            except (SyntaxError, ValueError):
                _texts[key] = None
        if (source := _texts[key]) is not None:
            found.append(source)
    return found


def find_function(function: types.FunctionType) -> tuple[SourceText, FunctionNode]:
    """The text and the node that this very function was compiled from. NotSource if there is none (any more)."""
    code = function.__code__
    wanted = fingerprint(code)
    texts = texts_of(code.co_filename, code.co_flags & _FUTURES, function.__globals__)
    named = False
    for source in texts:
        for node, line, candidate in source.functions:
            if candidate.co_name != code.co_name:
                continue
            named = True
            if line == code.co_firstlineno and fingerprint(candidate) == wanted:
                return source, node
    name = "the lambda" if code.co_name == "<lambda>" else code.co_name
    if not texts:
        raise NotSource(f"{name}: its source text is not available ({code.co_filename})")
    changed = "it was edited after it was loaded" if named else "it is not defined there"
    raise NotSource(f"{name}: {label_of(texts[0])} does not hold the code that is loaded here ({changed})")


def find_class(cls: type) -> tuple[SourceText, ast.ClassDef]:
    """The text and the node of a class: around one of its methods, or by its name in the newest text of its module.

    The caller has to prove that it is the same class (see describe).
    """
    for value in vars(cls).values():
        method = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if not isinstance(method, types.FunctionType) or not method.__qualname__.startswith(cls.__qualname__ + "."):
            continue
        try:
            source, node = find_function(method)
        except NotSource:
            if not method.__code__.co_filename.startswith("<string"):
                raise
            continue  # generated, as by dataclass
        for outer in ast.walk(source.tree):
            if isinstance(outer, ast.ClassDef) and outer.name == cls.__name__ and node in outer.body:
                return source, outer
    for source in _module_texts(cls.__module__):
        nodes = [n for n in ast.walk(source.tree) if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
        if nodes:
            return source, nodes[-1]
    raise NotSource(f"class {cls.__name__}: its source text is not available")


def _module_texts(module: str) -> Iterator[SourceText]:
    """Texts in which a class of this module may be defined, newest first."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file:
        yield from texts_of(file, 0)
    for filename in reversed(list(linecache.cache)):
        if _CELL_FILE.search(filename):
            yield from texts_of(filename, 0)


def is_cell(filename: str) -> bool:
    """Whether a file name is made up by a notebook or an interactive interpreter."""
    return bool(_CELL_FILE.search(filename))


def label_of(source: SourceText) -> str:
    """How the user knows a text: the path of a file, or for a cell what it defines.

    A cell's own name holds process ids and counters, which would make the same cell another one after a restart.
    """
    if not is_cell(source.filename):
        return shown_path(source.filename)
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return f"<cell defining {node.name}>"
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return f"<cell defining {node.targets[0].id}>"
    return "<cell>"


def cell_name(filename: str) -> str:
    """A text's name on this machine: `Cell In[3]` for a cell of a running notebook, else its file name."""
    try:
        from IPython import get_ipython

        kind, name = get_ipython().compile.format_code_name(filename)
    except Exception:
        return filename
    return f"{kind} {name}"


# --- Cutting text ---


def definition_lines(source: SourceText, node: ast.AST, decorated: bool) -> tuple[list[str], int, str]:
    """(lines of a def or class, number of the first, its indentation)."""
    start = first_line(node) if decorated else node.lineno  # type: ignore[attr-defined]
    lines = source.lines[start - 1 : node.end_lineno]  # type: ignore[attr-defined]
    indent = re.match(r"[ \t]*", lines[0]).group()  # type: ignore[union-attr]
    return lines, start, indent


def replace_nodes(lines: list[str], start: int, replacements: list[tuple[ast.expr, str]]) -> list[str]:
    """Puts other text in the place of expressions, keeping the number of lines; `start` is the number of lines[0]."""
    encoded = [line.encode() for line in lines]
    for node, text in sorted(replacements, key=lambda pair: (pair[0].lineno, pair[0].col_offset), reverse=True):
        first, last = node.lineno - start, (node.end_lineno or node.lineno) - start
        tail = encoded[last][node.end_col_offset :]
        head = encoded[first][: node.col_offset]
        if first == last:
            encoded[first] = head + text.encode() + tail
        else:
            encoded[first] = head + text.encode()
            encoded[first + 1 : last] = [b""] * (last - first - 1)
            encoded[last] = tail
    return [line.decode() for line in encoded]
