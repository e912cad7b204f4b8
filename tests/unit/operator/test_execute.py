"""Carrying out actions: everything may be done twice, and a refusal becomes words."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rl.job import names
from nemo_rl_operator import build
from nemo_rl_operator.execute import Executor, NamespaceGoneError
from nemo_rl_operator.observe import Blocked
from nemo_rl_operator.plan import Action, Create, Delete, Kind
from nemo_rl_operator.runtime.cache import Cache
from nemo_rl_operator.runtime.client import ApiError
from unit.operator import make
from unit.operator.fake_api import FakeApi

RESOURCE = make.resource()
JOB = Create(Kind.JOB, build.attempt_job(RESOURCE, make.parsed(), 1, make.IMAGE))
MAP = Create(Kind.CONFIG_MAP, build.frozen_job(RESOURCE, make.parsed()))
CLAIM = Create(Kind.CLAIM, build.output_claim(RESOURCE, make.parsed()) or {})


async def run(api: FakeApi, *actions: Action, cache: Cache | None = None) -> Blocked | None:
    return await Executor(api, Cache() if cache is None else cache).run(RESOURCE, actions)  # type: ignore[arg-type]


def foreign(kind: Kind, name: str, **meta: Any) -> dict[str, Any]:
    return {"kind": "Anything", "metadata": {"name": name, **meta}}


async def test_what_a_job_needs_is_made_before_it() -> None:
    api = FakeApi()
    assert await run(api, JOB, MAP, CLAIM) is None
    assert api.made() == ["CONFIG_MAP x-job", "CLAIM x-output", "JOB x-1"]


async def test_doing_it_twice_is_success() -> None:
    api = FakeApi()
    await run(api, MAP, CLAIM, JOB)
    assert await run(api, MAP, CLAIM, JOB) is None


async def test_the_cache_knows_what_was_made_before_the_watch_does() -> None:
    cache = Cache()
    await run(FakeApi(), JOB, cache=cache)
    assert list(cache.get(("ns", "x")).jobs) == ["x-1"]


@pytest.mark.parametrize(
    ("action", "kind", "name"),
    [(JOB, Kind.JOB, "x-1"), (MAP, Kind.CONFIG_MAP, "x-job"), (CLAIM, Kind.CLAIM, "x-output")],
)
async def test_a_name_that_somebody_else_has_is_a_conflict(action: Create, kind: Kind, name: str) -> None:
    api = FakeApi()
    api.put(kind, foreign(kind, name))
    blocked = await run(api, action)
    assert blocked is not None
    assert (blocked.conflict, blocked.fatal) == (True, False)
    assert f"{name} exists and does not belong to this job" in blocked.message


async def test_nothing_is_started_when_something_it_needs_is_blocked() -> None:
    api = FakeApi()
    api.put(Kind.CONFIG_MAP, foreign(Kind.CONFIG_MAP, "x-job"))
    assert await run(api, MAP, JOB) is not None
    assert "JOB x-1" not in api.made()


async def test_a_claim_kept_from_an_earlier_job_of_the_name_is_used_again() -> None:
    api = FakeApi()
    api.put(Kind.CLAIM, foreign(Kind.CLAIM, "x-output", labels={names.LABEL_JOB: "x", names.LABEL_JOB_UID: "old"}))
    assert await run(api, CLAIM) is None


async def test_children_of_an_earlier_job_of_the_name_are_waited_for() -> None:
    owner = {"kind": names.KIND, "name": "x", "uid": "old", "controller": True}
    api = FakeApi()
    api.put(Kind.JOB, foreign(Kind.JOB, "x-1", ownerReferences=[owner]))
    blocked = await run(api, JOB)
    assert blocked is not None
    assert (blocked.conflict, blocked.fatal) == (False, False)
    assert "to be deleted" in blocked.message


async def test_our_own_job_that_is_being_deleted_is_not_taken_for_a_new_one() -> None:
    api = FakeApi()
    await run(api, JOB)
    api.objects[Kind.JOB, "x-1"]["metadata"]["deletionTimestamp"] = make.at(0)
    assert await run(api, JOB) is not None


@pytest.mark.parametrize(
    ("code", "message", "reason", "fatal"),
    [
        (422, 'Job "x-1" is invalid: spec.template.spec.tolerations: Invalid value', "Refused", True),
        (400, 'strict decoding error: unknown field "spec.template.spec.affinity.x"', "Refused", True),
        (413, "Request entity too large", "Refused", True),
        (
            403,
            'jobs "x-1" is forbidden: exceeded quota: q, requested: count/jobs=1, used: count/jobs=1, limited: count/jobs=1',
            "QuotaExceeded",
            False,
        ),
        (403, 'admission webhook "policy" denied the request: no', "Refused", False),
    ],
)
async def test_refusals_become_words(code: int, message: str, reason: str, fatal: bool) -> None:
    api = FakeApi()
    api.refuse["POST", Kind.JOB] = ApiError(code, "", message)
    blocked = await run(api, JOB)
    assert blocked is not None
    assert (blocked.reason, blocked.fatal) == (reason, fatal)


@pytest.mark.parametrize("code", [0, 429, 500, 503])
async def test_what_only_time_cures_is_raised(code: int) -> None:
    api = FakeApi()
    api.refuse["POST", Kind.JOB] = ApiError(code, "", "later")
    with pytest.raises(ApiError, match="later"):
        await run(api, JOB)


@pytest.mark.parametrize(
    "error",
    [
        ApiError(404, "NotFound", 'namespaces "ns" not found'),
        ApiError(403, "Forbidden", "unable to create new content in namespace ns because it is being terminated"),
    ],
)
async def test_a_namespace_on_its_way_out_ends_the_work(error: ApiError) -> None:
    api = FakeApi()
    api.refuse["POST", Kind.JOB] = error
    with pytest.raises(NamespaceGoneError):
        await run(api, JOB)


async def test_deleting_what_is_gone_or_replaced_is_success() -> None:
    api = FakeApi()
    assert await run(api, Delete(Kind.JOB, "x-1", "u")) is None
    api.put(Kind.JOB, foreign(Kind.JOB, "x-1", uid="another"))
    assert await run(api, Delete(Kind.JOB, "x-1", "u")) is None
    assert (Kind.JOB, "x-1") in api.objects


async def test_a_file_server_that_cannot_be_made_does_not_hold_up_the_job() -> None:
    api = FakeApi()
    api.refuse["POST", Kind.POD] = ApiError(403, "Forbidden", "no pods today")
    pod = Create(Kind.POD, build.files_pod(RESOURCE, make.parsed(), make.IMAGE))
    assert await run(api, pod, JOB) is None
