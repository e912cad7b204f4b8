"""Jobs whose specification was changed after their start, which the policy that comes with the definition refuses.

Where that is missing, such a change is not taken: the job goes on as it was when it started, which is what its frozen job
says. That a ConfigMap is this very frozen job shows its digest in the status, which nobody but the operator writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from nemo_rl.job import names
from nemo_rl.job.status import JobStatus
from nemo_rl_operator import frozen
from nemo_rl_operator.observe import Resource, abridged, is_abridged
from nemo_rl_operator.plan import Kind
from nemo_rl_operator.runtime.cache import Key
from nemo_rl_operator.runtime.client import Api


@dataclass(frozen=True)
class Started:
    """What is known of one generation of a job."""

    uid: str
    generation: int
    spec: str = ""
    """The specification to go on with, abridged like that of a resource; empty where it is the job's own."""
    changed: str = ""
    """What of it was changed, in words."""


class StartedJobs:
    """Reads a frozen job once for each generation of a specification, but for the first, which nobody has changed."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[Key, Started] = {}

    def forget(self, key: Key) -> None:
        self._known.pop(key, None)

    def known(self, key: Key, resource: Resource) -> Started | None:
        """What was read; None where that was of another generation."""
        found = self._known.get(key)
        return found if found and (found.uid, found.generation) == (resource.uid, resource.generation) else None

    def unread(self, key: Key, resource: Resource, status: JobStatus) -> bool:
        """Whether it must be read before this job can be decided about."""
        return resource.generation > 1 and status.job_digest is not None and self.known(key, resource) is None

    async def read(self, key: Key, resource: Resource, status: JobStatus) -> Resource:
        """The resource with the specification to go on with, whole if the resource is. What is kept of it is abridged."""
        data = await self._api.get(Kind.CONFIG_MAP, key[0], names.frozen_job(key[1]))
        content = ((data or {}).get("data") or {}).get(names.JOB_KEY, "")
        spec: dict[str, Any] | None = None
        changed = ""
        if status.job_digest == frozen.short_digest(content):
            spec, changed = frozen.unchanged(json.loads(content)["spec"], resource)
        if spec is None:
            self._known[key] = Started(resource.uid, resource.generation)
            return resource
        text = json.dumps(abridged(spec), separators=(",", ":"))
        self._known[key] = Started(resource.uid, resource.generation, text, changed)
        return replace(resource, spec=json.dumps(spec, separators=(",", ":")), abridged=False)


def going_on(resource: Resource, started: Started | None) -> Resource:
    """The resource with the specification to go on with."""
    if started is None or not started.spec:
        return resource
    return replace(resource, spec=started.spec, abridged=is_abridged(json.loads(started.spec)))
