"""A specification that is changed after the start, where nothing refuses that: the job goes on as it was, and says so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.job import names
from nemo_rl.job.reading import read_spec
from nemo_rl_operator import frozen
from nemo_rl_operator.plan import Kind
from unit.operator import make
from unit.operator.fake_api import merge
from unit.operator.test_reconcile import KEY, Setting, started

ROWS = [{"prompt": f"{n} what is {n} plus {n}", "answer": str(2 * n)} for n in range(5_000)]

FIXED: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "org/other"}, "spec.model"),
    "a number": ({"training": {"maxSteps": 12345}}, "spec.training.maxSteps"),
    "null": ({"training": {"maxGradNorm": None}}, "spec.training.maxGradNorm"),
    "a list": ({"env": [{"name": "A", "value": "1"}]}, "spec.env"),
    "a new section": ({"validationDataset": {"name": "org/more"}}, "spec.validationDataset"),
    "what cannot be": ({"training": {"maxSteps": -1}}, "spec.training.maxSteps"),
}
FREE: dict[str, dict[str, Any]] = {
    "backoffLimit": {"backoffLimit": 9},
    "ttl": {"ttlSecondsAfterFinished": 60},
    "serveUntil": {"output": {"serveUntil": "2100-01-01T00:00:00Z"}},
    "memory": {"resources": {"memory": "7Gi"}},
    "tokens": {"training": {"tokensPerMicrobatch": 777}},
}


def change(setting: Setting, spec: dict[str, Any]) -> None:
    """As the API server takes it without the policy. In the specification, null is a value."""

    def filled(old: Any, new: Any) -> Any:
        if isinstance(new, dict) and isinstance(old, dict):
            return {**old, **{name: filled(old.get(name), value) for name, value in new.items()}}
        return new

    body = setting.api.objects[Kind.RESOURCE, "x"]
    body["metadata"]["generation"] += 1
    body["spec"] = filled(body["spec"], spec)
    setting.api.put(Kind.RESOURCE, body)
    setting.deliver()


def accepted(setting: Setting) -> tuple[str, str, str]:
    found = next(c for c in setting.status["conditions"] if c["type"] == "Accepted")
    return found["status"], found["reason"], found["message"]


async def fail_and_go_on(setting: Setting) -> dict[str, Any]:
    """The Job of the second attempt, after an infrastructure failure of the first."""
    setting.pod("Failed", terminated={"exitCode": 1})
    for later in (10, 100, 1000):
        setting.now = make.later(later)
        setting.deliver()
        await setting.reconcile(KEY)
    found: dict[str, Any] = setting.api.objects[Kind.JOB, "x-2"]["spec"]
    return found


@pytest.mark.parametrize("what", FIXED)
async def test_a_change_that_is_not_taken_is_said_and_the_next_attempt_runs_the_frozen_job(what: str) -> None:
    spec, path = FIXED[what]
    setting = await started()
    first = setting.api.objects[Kind.JOB, "x-1"]["spec"]["template"]
    kept = setting.api.objects[Kind.CONFIG_MAP, "x-job"]["data"]
    before = setting.api.objects[Kind.RESOURCE, "x"]["spec"]
    setting.pod("Running", running={})
    change(setting, spec)
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Running"
    status, reason, message = accepted(setting)
    assert (status, reason) == ("False", "ChangeNotTaken")
    assert path in message
    reads = sum(verb == "GET" for verb, _, _ in setting.api.calls)
    for _ in range(3):
        setting.deliver()
        await setting.reconcile(KEY)
    assert sum(verb == "GET" for verb, _, _ in setting.api.calls) == reads == 1, "read once"
    second = (await fail_and_go_on(setting))["template"]
    one, two = (template["spec"]["containers"][0] for template in (first, second))
    assert (one["args"], one["image"]) == (two["args"], two["image"]), "with the digest of the same frozen job"
    assert setting.api.objects[Kind.CONFIG_MAP, "x-job"]["data"] == kept
    body = setting.api.objects[Kind.RESOURCE, "x"]
    body["spec"] = before
    change(setting, {})
    await setting.reconcile(KEY)
    assert accepted(setting)[:2] == ("True", "Accepted"), "it was set back"


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(sorted(FIXED))), st.sets(st.sampled_from(sorted(FREE))))
def test_what_may_change_is_taken_and_nothing_else(fixed: set[str], free: set[str]) -> None:
    resource = make.resource()
    content = json.loads(frozen.text(resource, read_spec(json.loads(resource.spec)).spec))["spec"]
    now = json.loads(resource.spec)
    wanted = now
    for name in sorted(free):
        now, wanted = merge(now, FREE[name]), merge(wanted, FREE[name])
    for name in sorted(fixed):
        for section, value in FIXED[name][0].items():
            now = {**now, section: {**now.get(section, {}), **value} if isinstance(value, dict) else value}
    spec, changed = frozen.unchanged(content, make.resource(**now))
    assert (spec is None) == (not fixed) == (not changed)
    if spec is not None:
        assert read_spec(spec).spec == read_spec(wanted).spec
        assert "null" in fixed or "what cannot be" in fixed or all(FIXED[name][1] in changed for name in fixed)


async def test_a_frozen_job_that_somebody_else_made_is_not_gone_on_with() -> None:
    setting = await started()
    body = setting.api.objects[Kind.CONFIG_MAP, "x-job"]
    told = json.loads(body["data"][names.JOB_KEY])
    told["spec"]["model"] = "org/forged"
    body["data"] = {names.JOB_KEY: json.dumps(told)}
    change(setting, {"training": {"maxSteps": 12345}})
    setting.pod("Failed", terminated={"exitCode": 1})
    for later in (10, 100, 1000):
        setting.now = make.later(later)
        setting.deliver()
        await setting.reconcile(KEY)
    assert "JOB x-2" not in setting.api.made()
    assert setting.status["reason"] == "NameConflict"


async def test_a_change_of_what_may_change_is_no_news() -> None:
    setting = await started()
    change(setting, {"backoffLimit": 9, "ttlSecondsAfterFinished": 60})
    await setting.reconcile(KEY)
    assert accepted(setting)[:2] == ("True", "Accepted")


async def test_large_rows_are_compared_whole_and_the_first_ones_are_trained_on() -> None:
    setting = Setting()
    setting.api.put_job(dataset={"inline": ROWS})
    setting.deliver()
    await setting.reconcile(KEY)
    setting.now = make.later(1)
    setting.deliver()
    await setting.reconcile(KEY)
    change(setting, {"backoffLimit": 5})
    await setting.reconcile(KEY)
    assert accepted(setting)[:2] == ("True", "Accepted"), "the rows are as they were"
    change(setting, {"dataset": {"inline": ROWS[:-1]}})
    await setting.reconcile(KEY)
    if setting.status.get("jobDigest"):
        assert "spec.dataset.inline" in accepted(setting)[2]
        await fail_and_go_on(setting)
        text = setting.api.objects[Kind.CONFIG_MAP, "x-job"]["data"][names.JOB_KEY]
        assert json.loads(text)["spec"]["dataset"]["inline"] == ROWS
