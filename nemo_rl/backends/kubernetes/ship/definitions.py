"""Cuts the text of functions, closures and classes into chunks, each compared with the live byte code."""

from __future__ import annotations
import __future__

import ast
import types
from typing import Any

from nemo_rl.backends.kubernetes.ship.chunks import Chunk
from nemo_rl.backends.kubernetes.ship.errors import NotSource
from nemo_rl.backends.kubernetes.ship.sources import (
    FunctionNode,
    SourceText,
    all_codes,
    definition_lines,
    fingerprint,
    replace_nodes,
)
from nemo_rl.backends.kubernetes.ship.values import atom, is_atom

_ANNOTATIONS = __future__.annotations.compiler_flag
Found = tuple[types.FunctionType, SourceText, FunctionNode]


def function_chunk(
    source: SourceText, node: FunctionNode, function: types.FunctionType, target: str
) -> tuple[Chunk, bool]:
    """(the function without its decorators, bound to `target`; whether its defaults have to be set by value)."""
    replacements, by_value = _defaults(node, function)
    if isinstance(node, ast.Lambda):
        lines = _lambda_lines(source, node, replacements, f"{target} = ")
        return _proven(Chunk(lines, segments=[(1, node.lineno)]), source, [function]), by_value
    lines, start, indent = definition_lines(source, node, decorated=False)
    lines = replace_nodes(lines, start, replacements)
    chunk = Chunk(lines, segments=[(1, start)])
    if indent:
        chunk = Chunk(["if True:", *lines], segments=[(2, start)])
    if target != node.name:
        chunk.bind = {node.name: target}
    return _proven(chunk, source, [function]), by_value


def decorated_chunk(source: SourceText, node: ast.AST, function: types.FunctionType) -> Chunk:
    """The whole definition with its decorators."""
    lines, start, indent = definition_lines(source, node, decorated=True)
    chunk = Chunk(lines, segments=[(1, start)])
    if indent:
        chunk = Chunk(["if True:", *lines], segments=[(2, start)])
    chunk.future = bool(function.__code__.co_flags & _ANNOTATIONS)
    chunk.imported = source.imported_in(chunk.lines)
    if not _holds(chunk, [function]):
        raise NotSource(f"{function.__name__}: its text does not give the code that is loaded here")
    return chunk


def class_chunk(source: SourceText, node: ast.ClassDef, cls: type, target: str) -> Chunk:
    """A whole class. Its methods may use no variables of an enclosing function."""
    lines, start, indent = definition_lines(source, node, decorated=True)
    chunk = Chunk(lines, segments=[(1, start)])
    if indent:
        chunk = Chunk(["if True:", *lines], segments=[(2, start)])
    if target != node.name:
        chunk.bind = {node.name: target}
    chunk.imported = source.imported_in(chunk.lines)
    postponed = False
    for value in vars(cls).values():
        method = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if isinstance(method, types.FunctionType) and method.__qualname__.startswith(cls.__qualname__ + "."):
            outside = [name for name in method.__code__.co_freevars if name != "__class__"]
            if outside and method.__code__.co_filename == source.filename:
                raise NotSource(
                    f"class {cls.__name__}: its method {method.__name__} uses {outside[0]} of a function around it"
                )
            postponed |= bool(method.__code__.co_flags & _ANNOTATIONS)
    futures = [n for n in source.tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    chunk.future = postponed or any(alias.name == "annotations" for n in futures for alias in n.names)
    return chunk


def scope_chunk(
    scope: str, parameters: list[str], own: dict[str, types.FunctionType], found: list[Found]
) -> tuple[Chunk, dict[int, str], dict[int, bool]]:
    """A function `scope(parameters)` that defines closures and returns them in the order of `found`.

    `own` maps variables that hold a closure of the group to it. Returns the chunk, each closure's name inside (by id),
    and whether its defaults have to be set by value.
    """
    labels = {id(source) for _, source, _ in found}
    if len(labels) > 1:
        raise NotSource(f"{found[0][0].__qualname__}: its variables come from several files")
    blocks: list[tuple[str | None, list[str], int]] = []
    inner: dict[int, str] = {}
    by_value: dict[int, bool] = {}
    for i, (function, source, node) in enumerate(found):
        replacements, by_value[id(function)] = _defaults(node, function)
        if isinstance(node, ast.Lambda):
            held = next((name for name, f in own.items() if f is function), f"_lambda_{i}")
            blocks.append((None, _lambda_lines(source, node, replacements, f"{held} = "), node.lineno))
        else:
            held = node.name
            lines, start, indent = definition_lines(source, node, decorated=False)
            blocks.append((indent, replace_nodes(lines, start, replacements), start))
        inner[id(function)] = held
    clash = set(inner.values()) & (set(parameters) | {n for n, f in own.items() if inner[id(f)] != n})
    if clash or len(set(inner.values())) < len(inner):
        double = min(clash or set(inner.values()))
        raise NotSource(f"{found[0][0].__qualname__}: the name {double} stands for several things")
    base = min((indent for indent, _, _ in blocks if indent is not None), key=len, default="    ") or "    "
    lines, segments = [f"def {scope}({', '.join(parameters)}):"], []
    for own_indent, text, start in blocks:
        if own_indent is not None and own_indent != base:
            lines.append(f"{base}if True:")
        segments.append((len(lines) + 1, start))
        lines += [base + text[0], *text[1:]] if own_indent is None else text
    lines += [f"{base}{name} = {inner[id(f)]}" for name, f in own.items() if inner[id(f)] != name]
    lines.append(f"{base}return ({', '.join(inner[id(f)] for f, _, _ in found)},)")
    chunk = Chunk(lines, segments=segments)
    return _proven(chunk, found[0][1], [f for f, _, _ in found]), inner, by_value


def _proven(chunk: Chunk, source: SourceText, functions: list[types.FunctionType]) -> Chunk:
    """The chunk with annotations postponed if that changes no code, else as written; NotSource if neither fits."""
    try:
        chunk.imported = source.imported_in(chunk.lines)
    except SyntaxError:
        raise NotSource(f"{functions[0].__name__}: its text cannot be cut out of {source.filename}") from None
    for future in (True, False):
        chunk.future = future
        if _holds(chunk, functions):
            return chunk
    raise NotSource(f"{functions[0].__name__}: its text does not give the code that is loaded here")


def _holds(chunk: Chunk, functions: list[types.FunctionType]) -> bool:
    try:
        made = {fingerprint(code) for code in all_codes(chunk.compiled())}
    except (SyntaxError, ValueError):
        return False
    return all(fingerprint(function.__code__) in made for function in functions)


def _lambda_lines(source: SourceText, node: ast.Lambda, replacements: list[Any], before: str) -> list[str]:
    lines = source.lines[node.lineno - 1 : node.end_lineno]
    encoded = lines[-1].encode()
    lines[-1] = encoded[: node.end_col_offset].decode()
    lines = replace_nodes(lines, node.lineno, replacements)
    lines[0] = f"{before}({lines[0].encode()[node.col_offset :].decode()}"
    lines[-1] += ")"
    return lines


def _defaults(node: FunctionNode, function: types.FunctionType) -> tuple[list[tuple[ast.expr, str]], bool]:
    """Defaults that are no literals of the very value they have now give way to None, to be set by value."""
    positional = function.__defaults__ or ()
    named = function.__kwdefaults__ or {}
    pairs = list(zip(node.args.defaults, positional, strict=False))
    fitting = len(node.args.defaults) == len(positional)
    for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if default is not None:
            fitting &= arg.arg in named
            pairs.append((default, named.get(arg.arg)))
    fitting &= sum(default is not None for default in node.args.kw_defaults) == len(named)
    replaced = [(expr, "None") for expr, value in pairs if not _is_literal(expr, value)]
    if not fitting:
        known = {id(expr) for expr, _ in replaced}
        every = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        replaced += [(expr, "None") for expr in every if id(expr) not in known]
    return replaced, bool(replaced) or not fitting


def _is_literal(expression: ast.expr, value: Any) -> bool:
    if not is_atom(value):
        return False
    try:
        written = ast.literal_eval(expression)
    except (ValueError, SyntaxError, TypeError):
        return False
    return type(written) is type(value) and is_atom(written) and atom(written) == atom(value)
