"""Reading the pickles that torch writes, without running what they say: only torch's own data classes are made of them.

torch.distributed.checkpoint keeps its index, and plans a save or load among the ranks, in pickles. Whoever can write to
the claim, or reaches a port of the job, could put anything in their place.
"""

from __future__ import annotations

import builtins
import dataclasses
import enum
import io
import pickle
import traceback
from typing import IO, Any

import torch
from torch.distributed.checkpoint import api, filesystem, metadata, planner, storage

_MODULES = {module.__name__: module for module in (filesystem, metadata, planner, storage)}
_NAMED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): dict,
    (api.__name__, "CheckpointException"): api.CheckpointException,  # errors of other ranks, with their places
    ("traceback", "StackSummary"): traceback.StackSummary,
    ("traceback", "FrameSummary"): traceback.FrameSummary,
}
_LAYOUT = ("torch.serialization", "_get_layout")
_PATHS = ("pathlib", "pathlib._local")


class ForbiddenPickle(ValueError):
    """A pickle that names something else than data of torch; nothing of it was run."""


class _Restricted(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], what: str) -> None:
        super().__init__(stream)
        self._what = what

    def find_class(self, module: str, name: str) -> Any:
        """Data classes of torch's checkpoints, sizes and dtypes, paths as texts, and Python's own errors: all inert."""
        found: Any = None
        if (module, name) in _NAMED:
            found = _NAMED[module, name]
        elif (module, name) == _LAYOUT:
            found = _layout
        elif module in _MODULES and "." not in name:
            named = getattr(_MODULES[module], name, None)
            found = named if isinstance(named, type) and _is_data(named, module) else None
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            found = getattr(torch, name)
        elif module in _PATHS and name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            found = _joined
        elif (module, name) == ("builtins", "getattr"):
            found = _member  # how Python 3.11.0 to 3.11.3 write the member of an enumeration
        elif module == "builtins":
            named = getattr(builtins, name, None)
            found = named if isinstance(named, type) and issubclass(named, Exception) else None
        if found is None:
            raise ForbiddenPickle(
                f"{self._what} names {module}.{name}, which no index of tensors needs: somebody else wrote it. Nothing of "
                "it was run; start the run again without these files, and see who may write there"
            )
        return found


def _is_data(kind: type, module: str) -> bool:
    return kind.__module__ == module and (dataclasses.is_dataclass(kind) or issubclass(kind, enum.Enum))


def _member(kind: Any, name: Any) -> enum.Enum:
    """The member of an enumeration, and of nothing else an attribute."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise ForbiddenPickle(f"a pickle asks for {name!r} of {kind!r}, which is no member of an enumeration of torch's")


def _layout(name: str) -> torch.layout:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.layout) else torch.strided


def _joined(*parts: str) -> str:
    return "/".join(map(str, parts))


def load(stream: IO[bytes], what: str) -> Any:
    """The object in a pickle of torch's. ForbiddenPickle for any other; `what` is the pickle's name in the error.

    A damaged one raises as pickle.load does.
    """
    return _Restricted(stream, what).load()


def guard_collectives() -> None:
    """From now on torch's own exchanges of objects between ranks read only what `load` does."""
    from torch.distributed import distributed_c10d

    def restricted(tensor: Any, size: Any, group: Any = None, weights_only: bool = False) -> Any:
        data = tensor.cpu().numpy().tobytes()[: int(size)]
        return load(io.BytesIO(data), "a message between ranks")

    if not hasattr(distributed_c10d, "_tensor_to_object"):
        raise RuntimeError(
            f"torch {torch.__version__} exchanges objects between ranks in a way that nemo-rl does not know, and so cannot "
            "guard; use a version of torch within the bounds that nemo-rl asks for"
        )
    distributed_c10d._tensor_to_object = restricted  # type: ignore[assignment]
