"""Carry out the actions of a decision. Everything may be done twice: names are fixed, and what exists is looked at."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from nemo_rl.job import names
from nemo_rl.job.text import one_line
from nemo_rl_operator import build, children, frozen, kueue, reasons
from nemo_rl_operator.observe import Blocked, Resource
from nemo_rl_operator.pending import from_warning
from nemo_rl_operator.plan import Action, Create, Delete, Kind, Report, Update
from nemo_rl_operator.runtime import timestamps
from nemo_rl_operator.runtime.cache import Cache
from nemo_rl_operator.runtime.client import Api, ApiError, Object

log = logging.getLogger(__name__)


TOKEN_BYTES = 32


class NamespaceGoneError(Exception):
    """The namespace is being deleted: there is nothing left to do for the job."""


@dataclass(frozen=True)
class Done:
    """How far the actions came."""

    blocked: Blocked | None = None
    """Why an object could not be made that the job cannot go on without."""
    unserved: Blocked | None = None
    """Why the file server could not be made; nothing else waits for it."""


class Executor:
    """Makes and deletes objects, and tells the cache what the API server answered, ahead of the watch."""

    def __init__(self, api: Api, cache: Cache, clock: Callable[[], datetime] = timestamps.now) -> None:
        self._api, self._cache, self._clock = api, cache, clock

    async def run(self, resource: Resource, actions: Iterable[Action]) -> Done:
        """Do all of them: first deletions, then what Jobs and pods need, then those, the trainer's Job before its replicas.

        Raises ApiError where trying again later is all there is to do.
        """
        actions = list(actions)
        for action in actions:
            if isinstance(action, Delete):
                await self._delete(resource, action)
            elif isinstance(action, Update):
                await self._update(resource, action)
        creations = [a for a in actions if isinstance(a, Create)]
        first = [a for a in creations if a.kind not in (Kind.JOB, Kind.STATEFUL_SET, Kind.POD)]
        there: dict[Kind, Object] = {}
        found = await asyncio.gather(*(self._create(resource, a, there) for a in first))
        kinds = {action.kind for action in creations}
        alone = (
            Kind.POD in kinds and Kind.JOB not in kinds
        )  # then it is the file server alone that reads the frozen job
        blocks = [b for a, b in zip(first, found, strict=True) if not (alone and a.kind is Kind.CONFIG_MAP)]
        for action in actions:
            if isinstance(action, Report):
                await self._report(resource, action)
        for action in creations:
            if any(blocks):
                break
            if action.kind is Kind.JOB:
                blocks.append(await self._create(resource, _pinned(action, there), there))
            elif action.kind is Kind.STATEFUL_SET:
                blocks.append(await self._create(resource, action, there))
        unserved = None
        for action in creations:
            if action.kind is Kind.POD:
                unserved = next((b for b in (*found, *blocks) if b), None) or await self._serve(resource, action, there)
        return Done(next((block for block in blocks if block), None), unserved)

    async def _serve(self, resource: Resource, action: Create, there: dict[Kind, Object]) -> Blocked | None:
        """Make the file server. Whatever hinders it, training goes on."""
        try:
            block = await self._create(resource, _pinned(action, there), there)
        except ApiError as error:
            block = Blocked(reasons.API_FAILS, f"the file server cannot be made: {words(error)}", fatal=False)
        if block:
            log.warning("%s/%s: no file server: %s", resource.namespace, resource.name, one_line(block.message))
        return block

    async def _delete(self, resource: Resource, action: Delete) -> None:
        try:
            left = await self._api.delete(action.kind, resource.namespace, action.name, action.uid, action.foreground)
        except ApiError as error:
            if error.status == 404:
                self._forget(resource, action)
                return
            if error.status == 409:  # another object of that name
                return
            raise
        if left.get("kind") == "Status":  # gone at once
            self._forget(resource, action)
        self._remember(action.kind, left)

    async def _update(self, resource: Resource, action: Update) -> None:
        """Change an object, if it is still the one that was seen; that it is gone, or another's, shows at the next look."""
        try:
            await self._api.update(action.kind, resource.namespace, action.name, action.uid, {"spec": action.spec})
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _create(self, resource: Resource, action: Create, there: dict[Kind, Object]) -> Blocked | None:
        """Make it. What is there already and says the same goes into `there`."""
        try:
            if action.kind is Kind.JOB and (images := _volumes_of_images(action.body)):
                # a server that does not know them takes the Job, and leaves an empty folder in place of the image
                kept = await self._api.create(action.kind, resource.namespace, action.body, dry_run=True)
                if not images <= _volumes_of_images(kept):
                    text = reasons.NO_IMAGE_VOLUMES_MESSAGE.format(volumes=", ".join(sorted(images)))
                    return Blocked(reasons.REFUSED, text, fatal=True)
            made = await self._api.create(action.kind, resource.namespace, _with_token(action))
        except ApiError as error:
            if error.status == 409 and action.kind in (Kind.SECRET, Kind.NETWORK_POLICY):
                return (
                    None  # made before: the name has the job's uid. What is in a Secret is not for the operator to read
                )
            if error.status == 409:
                return await self._existing(resource, action, there)
            return _refusal(error, action)
        self._remember(action.kind, made)
        return None

    async def _report(self, resource: Resource, action: Report) -> None:
        """Read first: Kueue writes conditions of the same object, and may have just done so."""
        key = (resource.namespace, resource.name)
        found = await self._api.get(Kind.WORKLOAD, resource.namespace, action.name)
        if found is None or found["metadata"]["uid"] != action.uid:
            self._cache.remove("workload", key, action.name, action.uid)
            return
        changed = kueue.with_conditions(found, action, timestamps.write(self._clock()))
        if changed is None:
            self._cache.put("workload", found)
            return
        version = found["metadata"]["resourceVersion"]
        left = await self._api.patch_part(Kind.WORKLOAD, resource.namespace, action.name, version, "status", changed)
        self._cache.put("workload", left)

    async def _existing(self, resource: Resource, action: Create, there: dict[Kind, Object]) -> Blocked | None:
        """An object of that name exists. Ours: fine. An earlier job's: it is on its way out. Otherwise: a conflict."""
        name = action.body["metadata"]["name"]
        found = await self._api.get(action.kind, resource.namespace, name)
        if found is None:
            raise ApiError(0, "Gone", f"{name} existed a moment ago")
        meta = found["metadata"]
        owner: Object = next((o for o in meta.get("ownerReferences") or () if o.get("controller")), {})
        what = f"{action.body['kind']} {name}"
        ours = owner.get("uid") == resource.uid
        if action.kind is Kind.CLAIM and not owner:
            ours = (meta.get("labels") or {}).get(names.LABEL_JOB) == resource.name  # kept from an earlier job
        if ours and not meta.get("deletionTimestamp"):
            if name == names.frozen_job(resource.name) and (changed := _changed(action, found)):
                there[action.kind] = changed
                return await self._create(resource, replace(action, body=changed), there)
            return self._adopt(action, found, there)
        if ours or (owner.get("kind") == names.KIND and owner.get("name") == resource.name):
            return Blocked(
                reasons.ENDING, f"waiting for {what} of an earlier run of this name to be deleted", fatal=False
            )
        cure = "delete it, or give the job another name"
        if action.kind is Kind.CLAIM:
            cure = f"set spec.output.claim to {name} to use it, or give the job another name"
        text = f"{what} exists and does not belong to this job; {cure}"
        return Blocked("NameConflict", text, fatal=False, conflict=True)

    def _adopt(self, action: Create, found: Object, there: dict[Kind, Object]) -> Blocked | None:
        """An object that says it is the job's: it counts as such where its content is what we would make.

        Anybody can write an owner into what he makes, so the owner alone proves nothing.
        """
        differs = children.difference(action.kind, found, action.body)
        if differs:
            name = action.body["metadata"]["name"]
            text = f"{action.body['kind']} {name} exists with other content ({differs}); {_cure(action.kind, name)}"
            stray = (name, found["metadata"]["uid"]) if action.kind is Kind.JOB else None
            return Blocked("NameConflict", text, fatal=False, conflict=True, stray=stray)
        there[action.kind] = found
        self._remember(action.kind, found)
        return None

    def _remember(self, kind: Kind, answer: Object) -> None:
        if answer.get("kind") == "Status":
            return
        if kind is Kind.JOB:
            self._cache.put("job", answer)
        elif kind is Kind.POD:
            self._cache.put("pod", answer)
        elif kind is Kind.WORKLOAD:
            self._cache.put("workload", answer)

    def _forget(self, resource: Resource, action: Delete) -> None:
        key = (resource.namespace, resource.name)
        if action.kind is Kind.JOB:
            self._cache.remove("job", key, action.name, action.uid)
        elif action.kind is Kind.POD:
            self._cache.remove("pod", key, action.name, action.uid)
        elif action.kind is Kind.WORKLOAD:
            self._cache.remove("workload", key, action.name, action.uid)


def _with_token(action: Create) -> Object:
    """The object as it is made: a Secret with tokens that nobody else knows."""
    if action.kind is not Kind.SECRET:
        return action.body
    keys = (names.TOKEN_KEY, names.ROLLOUT_TOKEN_KEY)
    return {**action.body, "stringData": {key: secrets.token_hex(TOKEN_BYTES) for key in keys}}


def _volumes_of_images(job: Object) -> set[str]:
    """Of a Job's pods, by the names that the job gives them."""
    return {
        v["name"].removeprefix(build.VOLUME_PREFIX)
        for v in job["spec"]["template"]["spec"].get("volumes") or ()
        if v.get("image")
    }


def _changed(action: Create, found: Object) -> Object | None:
    """The frozen job as it is by now, where a job was changed while it was suspended; beside the first one."""
    if action.kind is not Kind.CONFIG_MAP or not children.difference(action.kind, found, action.body):
        return None
    return frozen.changed(found, action.body)


def _pinned(action: Create, there: dict[Kind, Object]) -> Create:
    """With name and digest of the frozen job that is there: another version of the operator may have made it."""
    config_map = there.get(Kind.CONFIG_MAP)
    return replace(action, body=frozen.pin(action.body, config_map)) if config_map else action


def _cure(kind: Kind, name: str) -> str:
    if kind is Kind.CLAIM:
        return f"set spec.output.claim to {name} to use it as it is, delete it, or give the job another name"
    if kind is Kind.JOB:
        return f"it is deleted after {children.STRAY_SECONDS} s"
    return "somebody else made it: delete it, and the job goes on"


def words(error: ApiError) -> str:
    """What the API server said, at a length that fits into a status."""
    return error.message[:700] or str(error)


_OURS = re.compile(r'[A-Za-z.]+ "[^"]*" is invalid: |.*(strict decoding error|cannot be handled as a )', re.DOTALL)
"""How the API server itself begins, where a field of the object is wrong. Policies and webhooks of others begin otherwise,
whatever code they answer with: `... is forbidden: ValidatingAdmissionPolicy`, `admission webhook "x" denied the request`."""


def _refusal(error: ApiError, action: Create) -> Blocked:
    """What a refused creation means for the job. Raises again what only time can cure."""
    what = f"{action.body['kind']} {action.body['metadata']['name']}"
    text = f"the API server refuses {what}: {words(error)}"
    if error.status == 404 or "because it is being terminated" in error.message:
        raise NamespaceGoneError(error.message)
    if error.status == 413 or (error.status in (400, 422) and _OURS.match(error.message)):
        return Blocked(reasons.REFUSED, text, fatal=True)
    if error.status == 403 and "exceeded quota" in error.message:
        return Blocked(reasons.QUOTA, from_warning(error.message).message, fatal=False)
    if 400 <= error.status < 500 and not error.transient:
        return Blocked(reasons.REFUSED, text, fatal=False)
    raise error
