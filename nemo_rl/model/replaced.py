"""Modules whose forward is replaced where they stand, in a model that somebody else made."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Replaced(nn.Module):
    """What such a module becomes: of a class made from its own, so that it still is one of those."""

    own: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copies, and what is pickled, are of the class that others know
        return _new, (self.own,), self.__dict__


def class_of(kind: type[Replaced], own: type[nn.Module], **constants: Any) -> type[Any]:
    """Returns the class that a module of the class `own` becomes, with the forward of `kind`."""
    return type(own.__name__, (kind, own), {"own": own, "__module__": own.__module__, **constants})


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)
