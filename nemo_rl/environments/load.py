"""Turns the reward of a specification (a name, inline source, a built-in, a shipped bundle) into the callable."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import linecache
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rl.environments.execute import summary, user_traceback
from nemo_rl.errors import RewardError
from nemo_rl.job.spec import RewardSpec

ENTRYPOINT = "reward"
"""The name that inline source defines unless entrypoint says another."""


def load_reward(spec: RewardSpec, bundles: Mapping[str, Path]) -> Any:
    """The reward that a specification describes: a callable, an Environment, or a list or dict of them.

    `bundles` are the folders of the job's unpacked bundles, by name. ValueError for a name that is not there,
    RewardError with the user's traceback for code that fails while it is loaded.
    """
    if spec.function is not None:
        return _load_function(spec.function)
    if spec.source is not None:
        return _load_source(spec.source, spec.entrypoint or ENTRYPOINT)
    if spec.builtin is not None:
        from nemo_rl.environments.builtin import BUILTINS

        return BUILTINS[spec.builtin]
    assert spec.bundle is not None
    return _load_bundle(spec.bundle, spec.entrypoint, bundles)


def _load_function(reference: str) -> Any:
    module_name, _, path = reference.partition(":")
    top = module_name.split(".")[0]
    here = os.getcwd()
    if importlib.util.find_spec(top) is None and here not in sys.path:
        # The installed command has its own folder on the path where `python` has the working directory.
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise _load_error(f"reward {reference!r}", error) from error
        raise ValueError(
            f"reward {reference!r}: found no module {error.name!r}; expected package.module:name that can be imported here. "
            f"Install the package, or start in the folder of the file"
        ) from None
    except Exception as error:
        raise _load_error(f"reward {reference!r}", error) from error
    return _attribute(module, path, f"reward {reference!r}")


def check_source(source: str, entrypoint: str) -> None:
    """Compiles inline source and looks for its entrypoint, without running it. ValueError for what cannot work."""
    try:
        tree = compile(source, "<reward>", "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        compile(source, "<reward>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise _load_error("the inline source of the reward", error) from None
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
    if entrypoint.split(".")[0] not in found and "*" not in found:
        listed = ", ".join(sorted(found)) or "nothing"
        raise ValueError(
            f"the inline source of the reward defines no {entrypoint!r}; found {listed}; name the function {entrypoint}, or "
            "give entrypoint"
        )


def _load_source(source: str, entrypoint: str) -> Any:
    """Runs inline source as a module of its own, known by its digest: the same text is the same module."""
    digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    name, file = f"nemo_rl_inline_reward_{digest}", f"<reward {digest}>"
    module = sys.modules.get(name)
    if module is None:
        # Without a time the entry is never looked for on disk: tracebacks and inspect show these lines.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        try:
            code = compile(source, file, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            raise _load_error("the inline source of the reward", error) from None
        module = types.ModuleType(name)
        module.__file__ = file
        sys.modules[name] = module
        try:
            exec(code, module.__dict__)
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception | SystemExit):
                raise
            raise _load_error("the inline source of the reward", error) from error
    return _attribute(module, entrypoint, "the inline source of the reward")


def load_source_file(path: Path, name: str) -> Any:
    """What a Python file defines under this name. The file is run as a script's imports are: modules beside it are found.

    ValueError where it defines no such name, RewardError with the traceback for code that fails.
    """
    module_name = f"nemo_rl_reward_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if (beside := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, beside)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise _load_error(f"the reward in {path}", error) from error
    return _attribute(module, name, f"the file {path}")


def _load_bundle(name: str, entrypoint: str | None, bundles: Mapping[str, Path]) -> Any:
    if name not in bundles:
        raise ValueError(
            f"the reward is in bundle {name!r}, found {', '.join(sorted(bundles)) or 'no bundles'}; bundles exist only in a "
            f"pod of the cluster. Locally give function, source or builtin"
        )
    from nemo_rl.worker.bundles import load_entry

    return load_entry(bundles[name], entrypoint)


def _attribute(module: types.ModuleType, path: str, what: str) -> Any:
    found: Any = module
    for part in path.replace(":", ".").split("."):
        if not hasattr(found, part):
            names = sorted(n for n, value in vars(found).items() if callable(value) and not n.startswith("_"))
            close = difflib.get_close_matches(part, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{what} defines no {part!r}, which it should by its entrypoint; found {', '.join(names) or 'no functions'}{hint}"
            )
        found = getattr(found, part)
    return found


def _load_error(what: str, error: BaseException) -> RewardError:
    trace = user_traceback(error)
    failed = RewardError(f"{what} could not be loaded: {summary(error).splitlines()[-1]}", trace)
    failed.add_note(trace.rstrip())
    return failed
