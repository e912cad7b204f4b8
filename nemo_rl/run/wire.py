"""What ranks say to each other, as JSON that only a rank of the same job can have written. Nothing in it can run code."""

from __future__ import annotations

import base64
import builtins
import dataclasses
import hashlib
import hmac
import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

from nemo_rl.job import names

_KIND = "!"
"""Key of the objects that stand for what JSON has no form of; no rank's dict has it, for those of other keys are pairs."""
_PACKAGE = "nemo_rl"
_MAC_BYTES = 32


class ForgedMessage(RuntimeError):
    """Bytes that no rank of this job wrote, or that were meant for another place."""


def read_token(path: Path | None = None) -> bytes:
    """The secret that the operator gave to the pods of this job; empty outside of a cluster, where ranks are one user's."""
    path = path or Path(os.environ.get(names.TOKEN_VARIABLE, names.TOKEN_FILE))
    try:
        return path.read_bytes().strip()
    except FileNotFoundError:
        return b""


# --- signed bytes


def sign(key: bytes, place: str, content: bytes) -> bytes:
    """The content with a proof that who wrote it has the key, and meant it for this place."""
    return _proof(key, place, content) + content


def verify(key: bytes, place: str, signed: bytes) -> bytes:
    """The content of signed bytes; ForgedMessage where they were not signed by this key for this place."""
    proof, content = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, place, content)):
        raise ForgedMessage(
            f"a message for {place} was not written by a rank of this job; somebody else reaches its ports: "
            "guard its pods with a NetworkPolicy"
        )
    return content


def derived(key: bytes, salt: bytes) -> bytes:
    """Another key, which only those who have this one can make of the salt."""
    return hmac.new(key, b"key\0" + salt, hashlib.sha256).digest()


def secret(key: bytes, purpose: str) -> str:
    """A word that only those who have the key know."""
    return derived(key, purpose.encode()).hex()


def _proof(key: bytes, place: str, content: bytes) -> bytes:
    return hmac.new(key, place.encode() + b"\0" + content, hashlib.sha256).digest()


# --- values


def dumps(value: Any) -> bytes:
    """JSON of plain values, bytes, paths, times, tuples, tensors, errors and the package's own dataclasses, nested as they are.

    TypeError for anything else: what has no such form does not travel between ranks.
    """
    return json.dumps(_encode(value), separators=(",", ":")).encode()


def loads(data: bytes) -> Any:
    """The value that `dumps` wrote. ValueError for what it did not."""
    return _decode(json.loads(data))


def _encode(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [_encode(each) for each in value]
    if isinstance(value, tuple) and type(value) is tuple:
        return {_KIND: "tuple", "of": [_encode(each) for each in value]}
    if isinstance(value, Mapping):
        if all(type(name) is str and name != _KIND for name in value):
            return {name: _encode(each) for name, each in value.items()}
        return {_KIND: "dict", "of": [[_encode(name), _encode(each)] for name, each in value.items()]}
    if isinstance(value, set | frozenset):
        return {_KIND: "set", "of": [_encode(each) for each in value]}
    if isinstance(value, bytes):
        return {_KIND: "bytes", "of": base64.b64encode(value).decode()}
    if isinstance(value, datetime):
        return {_KIND: "time", "of": value.isoformat()}
    if isinstance(value, PurePath):
        return {_KIND: "path", "of": str(value)}
    if isinstance(value, BaseException):
        return _encode_error(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and _is_ours(type(value)):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_KIND: "dataclass", "class": _name(type(value)), "of": fields}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return _encode(value.item())
    if _is_tensor(value):
        return _encode_tensor(value)
    if isinstance(value, bool | int | float | str):  # numbers of other libraries, and enumerations of plain values
        return _encode(next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)))
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} cannot travel between ranks")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {name: _decode(each) for name, each in value.items()}
    kind, content = value[_KIND], value.get("of")
    if kind == "tuple":
        return tuple(_decode(each) for each in content)
    if kind == "dict":
        return {_decode(name): _decode(each) for name, each in content}
    if kind == "set":
        return {_decode(each) for each in content}
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "time":
        return datetime.fromisoformat(content)
    if kind == "path":
        return Path(content)
    if kind == "dataclass":
        return _filled(_class(value["class"]), {name: _decode(each) for name, each in content.items()})
    if kind == "tensor":
        return _decode_tensor(value)
    if kind == "error":
        return _decode_error(value) if _travels(value["class"]) else None
    raise ValueError(f"found a value of kind {kind!r}; expected one that ranks of this version exchange")


# --- classes


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == _PACKAGE


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str) -> type:
    """A dataclass of the package that this process has loaded."""
    module, _, qualname = name.partition(":")
    found = getattr(sys.modules.get(module), qualname, None)
    if not isinstance(found, type) or not _is_ours(found) or not dataclasses.is_dataclass(found):
        raise ValueError(f"found an object of {name!r}; expected a dataclass of {_PACKAGE}")
    return found


def _filled(kind: type, values: dict[str, Any]) -> Any:
    """An object of a dataclass with these values; none of its code runs."""
    made = object.__new__(kind)
    for field in dataclasses.fields(kind):
        object.__setattr__(made, field.name, values[field.name])
    return made


# --- errors


def _encode_error(error: BaseException) -> Any:
    """The type's name, the arguments, the attributes and the notes; what has no form here travels as its text."""
    arguments: tuple[Any, ...] = error.args
    if isinstance(error, OSError) and error.filename is not None and len(arguments) == 2:
        arguments = (*arguments, error.filename)
    attributes = {name: each for name, each in vars(error).items() if name != "__notes__"}
    return {
        _KIND: "error",
        "class": _name(type(error)),
        "args": [_or_text(each) for each in arguments],
        "attributes": {name: _or_text(each) for name, each in attributes.items()},
        "notes": [str(note) for note in getattr(error, "__notes__", ())],
    }


def _or_text(value: Any) -> Any:
    try:
        return _encode(value)
    except TypeError:
        return str(value)


def _decode_error(value: Mapping[str, Any]) -> BaseException:
    kind = _error_class(value["class"])
    assert kind is not None
    arguments = tuple(_decode(each) for each in value["args"])
    try:
        made = kind(*arguments) if kind.__module__ == "builtins" else kind.__new__(kind, *arguments)
    except TypeError:
        made = kind.__new__(kind)
    if not isinstance(made, OSError):  # which keeps the file's name apart
        made.args = arguments
    for name, each in value["attributes"].items():
        if not name.startswith("__"):
            vars(made)[name] = _decode(each)
    for note in value["notes"]:
        made.add_note(str(note))
    return made


def _travels(name: str) -> bool:
    return _error_class(name) is not None


def _error_class(name: str) -> type[BaseException] | None:
    """An error of Python, torch or ours; None for one of somebody else's, whose code is not to run here."""
    module, _, qualname = name.partition(":")
    found = None
    if module == "builtins":
        found = getattr(builtins, qualname, None)
    elif module.partition(".")[0] in (_PACKAGE, "torch"):
        found = getattr(sys.modules.get(module), qualname, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


# --- tensors


def _is_tensor(value: Any) -> bool:
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def _encode_tensor(value: Any) -> Any:
    from safetensors.torch import save

    return {_KIND: "tensor", "of": base64.b64encode(save({"": value.detach().cpu().contiguous()})).decode()}


def _decode_tensor(value: Mapping[str, Any]) -> Any:
    from safetensors.torch import load

    return load(base64.b64decode(value["of"]))[""]
