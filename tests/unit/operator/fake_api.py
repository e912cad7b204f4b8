"""An API server in a dict, with what the operator relies on: names, uids, versions, refusals that a test asks for."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from nemo_rl.job import names
from nemo_rl_operator.plan import Kind
from nemo_rl_operator.runtime.client import ApiError, Object
from unit.operator import make


class FakeApi:
    """Same methods as client.Api. `refuse[verb, kind]` is raised instead of an answer; `calls` lists what was asked."""

    def __init__(self) -> None:
        self.objects: dict[tuple[Kind, str], Object] = {}
        self.refuse: dict[tuple[str, Kind], ApiError] = {}
        self.calls: list[tuple[str, Kind, str]] = []
        self.versions = itertools.count(100)
        self.kueue_version = ""
        self.completed: Callable[[Object], Object] = lambda body: body
        """What it would make of an object, where that is asked for only."""

    def _enter(self, verb: str, kind: Kind, name: str) -> None:
        self.calls.append((verb, kind, name))
        if (verb, kind) in self.refuse:
            raise self.refuse[verb, kind]

    def put(self, kind: Kind, body: Object) -> Object:
        found = copy.deepcopy(body)
        version = str(next(self.versions))
        found["metadata"].setdefault("uid", f"uid-{version}")
        found["metadata"] |= {"resourceVersion": version, "namespace": "ns", "creationTimestamp": make.at(0)}
        self.objects[kind, found["metadata"]["name"]] = found
        return copy.deepcopy(found)

    def put_job(self, **spec: Any) -> Object:
        """An RLTrainingJob `x`."""
        meta = {"name": "x", "uid": make.UID, "generation": 1}
        return self.put(Kind.RESOURCE, {"kind": names.KIND, "metadata": meta, "spec": make.spec(**spec)})

    async def create(self, kind: Kind, namespace: str, body: Object, *, dry_run: bool = False) -> Object:
        name = body["metadata"]["name"]
        if dry_run:
            return self.completed(copy.deepcopy(body))
        self._enter("POST", kind, name)
        if (kind, name) in self.objects:
            raise ApiError(409, "AlreadyExists", f"{name} already exists")
        return self.put(kind, body)

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Object | None:
        self._enter("GET", kind, name)
        return copy.deepcopy(self.objects.get((kind, name)))

    async def exists(self, kind: Kind, namespace: str, name: str) -> bool:
        self._enter("GET", kind, name)
        return (kind, name) in self.objects

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str, foreground: bool) -> Object:
        self._enter("DELETE", kind, name)
        found = self.objects.get((kind, name))
        if found is None:
            raise ApiError(404, "NotFound", f"{name} not found")
        if found["metadata"]["uid"] != uid:
            raise ApiError(409, "Conflict", "the uid differs")
        if foreground:
            found["metadata"]["deletionTimestamp"] = make.at(0)
            return self.put(kind, found)
        del self.objects[kind, name]
        return {"kind": "Status", "status": "Success"}

    async def patch_status(self, namespace: str, name: str, version: str, status: Object) -> Object:
        self._enter("PATCH", Kind.RESOURCE, name)
        found = self.objects.get((Kind.RESOURCE, name))
        if found is None:
            raise ApiError(404, "NotFound", f"{name} not found")
        if found["metadata"]["resourceVersion"] != version:
            raise ApiError(409, "Conflict", "the object has been modified")
        found["status"] = merge(found.get("status") or {}, status)
        return self.put(Kind.RESOURCE, found)

    async def items(self, kind: Kind, namespace: str, params: Mapping[str, str]) -> list[Object]:
        self._enter("LIST", kind, str(dict(params)))
        wanted = dict(part.split("=") for part in params.get("labelSelector", "").split(",") if part)
        found = [body for (held, _), body in self.objects.items() if held is kind]
        return [b for b in found if wanted.items() <= (b["metadata"].get("labels") or {}).items()]

    async def labelled(self, kind: Kind, namespace: str, label: str) -> list[str]:
        self._enter("LIST", kind, label)
        return [
            n for (k, n), body in self.objects.items() if k is kind and label in (body["metadata"].get("labels") or {})
        ]

    async def patch_part(
        self, kind: Kind, namespace: str, name: str, version: str, part: str, content: Object
    ) -> Object:
        self._enter("PATCH", kind, name)
        found = self.objects[kind, name]
        if found["metadata"]["resourceVersion"] != version:
            raise ApiError(409, "Conflict", "the object has been modified")
        found[part] = merge(found.get(part) or {}, content)
        return self.put(kind, found)

    def made(self) -> list[str]:
        return [f"{kind.name} {name}" for verb, kind, name in self.calls if verb == "POST"]


def merge(old: Object, patch: Object) -> Object:
    """A JSON merge patch (RFC 7396)."""
    found = dict(old)
    for name, value in patch.items():
        if value is None:
            found.pop(name, None)
        elif isinstance(value, dict):
            found[name] = merge(found.get(name) if isinstance(found.get(name), dict) else {}, value)  # type: ignore[arg-type]
        else:
            found[name] = value
    return found
