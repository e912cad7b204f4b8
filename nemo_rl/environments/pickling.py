"""Packs rewards so that a fresh process can make them again, and unpacks them there."""

from __future__ import annotations

import io
import linecache
import os
import pickle
import site
import sys
import sysconfig
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.environments.signature import BoundReward

_OWN = __name__.split(".")[0]


class CannotTravel(Exception):
    """A reward cannot be packed: it holds what exists in this process only. The text says what."""


def pack(rewards: Sequence[BoundReward]) -> bytes:
    """Bytes that `unpack` turns into the same rewards in another process. CannotTravel where that is not possible.

    Code of __main__, of notebooks and of local modules travels by value, as it is now; where that fails (a local module
    with an open file among its globals), local modules travel by name.
    """
    try:
        import cloudpickle
    except ImportError:
        raise CannotTravel("cloudpickle is not installed") from None
    try:
        with _local_modules_by_value(cloudpickle):
            payload = _dump(cloudpickle, list(rewards))
    except Exception as by_value:
        try:
            payload = _dump(cloudpickle, list(rewards))
        except Exception as by_name:
            raise CannotTravel(str(by_name) or type(by_name).__name__) from by_value
    # Sources that are no files (notebook cells, inline rewards), for the lines of tracebacks.
    sources = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and not os.path.exists(name)}
    return pickle.dumps((sources, payload))


def unpack(data: bytes) -> list[BoundReward]:
    """The rewards that `pack` packed."""
    sources, payload = pickle.loads(data)
    for name, (size, _time, lines, full_name) in sources.items():
        linecache.cache[name] = (size, None, lines, full_name)  # without a time it is never looked for on disk
    rewards: list[BoundReward] = pickle.loads(payload)
    return rewards


def _dump(cloudpickle: Any, rewards: list[BoundReward]) -> bytes:
    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            torch: Any = sys.modules.get("torch")
            if torch is not None and isinstance(obj, torch.Tensor) and obj.device.type != "cpu":
                raise pickle.PicklingError(f"a tensor on {obj.device}")
            return super().reducer_override(obj)

    buffer = io.BytesIO()
    Pickler(buffer).dump(rewards)
    return buffer.getvalue()


@contextmanager
def _local_modules_by_value(cloudpickle: Any) -> Iterator[None]:
    known = set(cloudpickle.list_registry_pickle_by_value())
    added = [module for module in list(sys.modules.values()) if _is_local(module) and module.__name__ not in known]
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


def _is_local(module: Any) -> bool:
    """Whether a module is a file of the user's rather than an installed one."""
    name = getattr(module, "__name__", None)
    file = getattr(module, "__file__", None)
    return (
        isinstance(module, types.ModuleType)
        and isinstance(name, str)
        and name.split(".")[0] not in (_OWN, "__main__", "__mp_main__")
        and sys.modules.get(name) is module
        and (_made_here(module) if file is None else not os.path.realpath(file).startswith(_installed_roots()))
    )


def _made_here(module: types.ModuleType) -> bool:
    """Whether a module without a file was made by code of this process (exec), so that no other one can import it."""
    return getattr(module, "__spec__", None) is None and module.__name__ not in sys.builtin_module_names


@cache
def is_installed_file(file: str) -> bool:
    """Whether a source file belongs to Python, to an installed package or to nemo-rl, rather than to the user."""
    own = os.path.dirname(os.path.dirname(os.path.realpath(__file__))) + os.sep
    return file.startswith("<frozen") or os.path.realpath(file).startswith((*_installed_roots(), own))


@cache
def _installed_roots() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    roots = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {*site.getsitepackages(), site.getusersitepackages()}
    roots |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages", "lib-dynload")}
    return tuple(sorted(os.path.realpath(root) + os.sep for root in roots))
