"""The cache: what counts as a change, and what late news may not do."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.job import names
from nemo_rl_operator import observe
from nemo_rl_operator.runtime.cache import Cache
from unit.operator import make

KEY = ("ns", "x")


def raw_pod(version: int, phase: str = "Running", uid: str = "u1", **meta: Any) -> dict[str, Any]:
    labels = {names.LABEL_JOB: "x", names.LABEL_JOB_UID: make.UID, names.LABEL_ATTEMPT: "1"}
    metadata = {"namespace": "ns", "name": "p", "uid": uid, "resourceVersion": str(version), "labels": labels}
    return {"metadata": metadata | meta, "status": {"phase": phase}}


def raw_resource(version: int, **fields: Any) -> dict[str, Any]:
    metadata = {"namespace": "ns", "name": "x", "uid": make.UID, "resourceVersion": str(version), "generation": 1}
    return {"metadata": metadata, "spec": make.spec()} | fields


def test_what_changes_a_decision_is_told_and_bookkeeping_is_not() -> None:
    cache = Cache()
    assert cache.put("resource", raw_resource(1)) == KEY
    assert cache.put("resource", raw_resource(2)) is None
    assert cache.put("resource", raw_resource(3, status={"phase": "Running"})) == KEY
    resource = cache.get(KEY).resource
    assert resource is not None
    assert resource.version == "3", "the newest version is kept: status writes need it"


def test_a_job_waits_until_something_of_it_runs_or_has_ended() -> None:
    cache = Cache()
    assert not cache.get(KEY).waits
    cache.put("resource", raw_resource(1))
    cache.put("pod", raw_pod(2, "Pending"))
    assert cache.get(KEY).waits
    cache.put("resource", raw_resource(3, status={"phase": "Starting"}))
    assert cache.get(KEY).waits
    for version, phase in enumerate(("Running", "Succeeded", "Failed"), start=4):
        cache.put("pod", raw_pod(version, phase))
        assert not cache.get(KEY).waits
    cache.remove("pod", KEY, "p")
    assert cache.get(KEY).waits
    meta = {"namespace": "ns", "name": "x-1", "uid": "j", "resourceVersion": "8", "labels": {names.LABEL_JOB: "x"}}
    failed = {"conditions": [{"type": "Failed", "status": "True"}]}
    cache.put("job", {"metadata": meta, "spec": {}, "status": failed})
    assert not cache.get(KEY).waits
    cache.remove("job", KEY, "x-1")
    for phase in ("Running", "Suspended", "Succeeded", "Failed"):
        cache.put("resource", raw_resource(9, status={"phase": phase}))
        assert not cache.get(KEY).waits


def test_an_object_without_our_label_is_not_taken_in() -> None:
    cache = Cache()
    assert cache.put("pod", raw_pod(1, labels={})) is None
    assert len(cache) == 0


def test_an_older_version_is_ignored() -> None:
    cache = Cache()
    cache.put("pod", raw_pod(5, "Succeeded"))
    assert cache.put("pod", raw_pod(4, "Running")) is None
    assert cache.get(KEY).pods["p"].phase == "Succeeded"


def test_a_new_object_of_the_same_name_takes_the_place() -> None:
    cache = Cache()
    cache.put("pod", raw_pod(5, uid="u1"))
    assert cache.put("pod", raw_pod(9, "Pending", uid="u2")) == KEY
    assert cache.remove("pod", KEY, "p", "u1") is None, "the old one's end is no news"
    assert cache.remove("pod", KEY, "p", "u2") == KEY
    assert len(cache) == 0


@given(st.permutations(range(1, 7)))
def test_news_in_any_order_give_the_newest_picture(order: list[int]) -> None:
    cache = Cache()
    for version in order:
        cache.put("pod", raw_pod(version, phase=f"phase {version}"))
    assert cache.get(KEY).pods["p"].phase == "phase 6"


def test_it_counts_and_names_what_it_holds() -> None:
    cache = Cache()
    cache.put("resource", raw_resource(1))
    cache.put("pod", raw_pod(2))
    assert cache.sizes() == {"resource": 1, "job": 0, "pod": 1, "workload": 0}
    assert cache.names("pod") == {("ns", "p"): (KEY, "u1")}
    assert cache.version("pod", "ns", "p") == 2


def raw_job(version: int, uid: str = "j1", **status: Any) -> dict[str, Any]:
    labels = {names.LABEL_JOB: "x", names.LABEL_JOB_UID: make.UID, names.LABEL_ATTEMPT: "1"}
    metadata = {"namespace": "ns", "name": "x-1", "uid": uid, "resourceVersion": str(version), "labels": labels}
    return {"metadata": metadata, "spec": {}, "status": status}


OWNED = {"ownerReferences": [{"uid": "j1", "controller": True}]}


def test_a_deleted_pod_that_had_ended_is_remembered_as_long_as_its_job() -> None:
    cache = Cache()
    cache.put("job", raw_job(1))
    cache.put("pod", raw_pod(2, "Running", **OWNED))
    assert cache.pod_gone(raw_pod(3, "Failed", **OWNED)) == KEY
    assert cache.get(KEY).pods["p"].phase == "Failed", "it says why the Job will have failed"
    assert cache.names("pod") == {}, "no list will have it, and that is no ghost"
    cache.remove("job", KEY, "x-1", "j1")
    assert len(cache) == 0


def test_a_deleted_pod_tells_nothing_before_its_job_has_ended() -> None:
    cache = Cache()
    cache.put("job", raw_job(1))
    cache.pod_gone(raw_pod(3, "Failed", **OWNED))
    assert cache.get(KEY).known_pods == [], "Kueue may have suspended the Job: another pod will take its place"
    cache.put("job", raw_job(4, conditions=[{"type": "Failed", "status": "True"}]))
    assert [pod.phase for pod in cache.get(KEY).known_pods] == ["Failed"]
    deleting = raw_job(5)
    deleting["metadata"]["deletionTimestamp"] = make.at(0)
    cache.put("job", deleting)
    assert [pod.phase for pod in cache.get(KEY).known_pods] == ["Failed"], "its last word: what it saved"


def test_of_deleted_pods_only_the_newest_of_each_index_is_remembered() -> None:
    cache = Cache()
    cache.put("job", raw_job(1))
    for version in range(2, 50):
        cache.pod_gone(raw_pod(version, "Failed", name=f"p{version}", **OWNED))
    assert list(cache.get(KEY).pods) == ["p49"]
    assert cache.version("pod", "ns", "p48") == 0


def test_a_pod_that_is_missing_from_a_list_is_remembered_too() -> None:
    cache = Cache()
    cache.put("job", raw_job(1))
    cache.put("pod", raw_pod(2, "Failed", **OWNED))
    assert cache.remove_pod(KEY, "p", "another uid") is None
    assert cache.names("pod") != {}
    assert cache.remove_pod(KEY, "p", "u1") == KEY
    assert cache.names("pod") == {}
    assert cache.get(KEY).pods["p"].phase == "Failed"


def test_a_deleted_pod_that_had_not_ended_or_has_no_job_is_forgotten() -> None:
    cache = Cache()
    cache.put("job", raw_job(1))
    cache.put("pod", raw_pod(2, "Running", **OWNED))
    assert cache.pod_gone(raw_pod(3, "Running", **OWNED)) == KEY
    assert cache.get(KEY).pods == {}
    cache.remove("job", KEY, "x-1", "j1")
    cache.put("pod", raw_pod(4, "Running", **OWNED))
    cache.pod_gone(raw_pod(5, "Failed", **OWNED))
    assert len(cache) == 0


def test_what_is_made_of_pods_grows_with_their_number_and_not_with_its_square() -> None:
    def seconds(count: int) -> float:
        status = make.status(make.record(1), phase="Running")
        found = make.resource(status, resources={"nodes": min(count, 1024)})
        pods = [dataclasses.replace(make.running_pod(1, i), name=f"x-1-{i}", uid=f"p{i}") for i in range(count)]
        times = []
        for _ in range(5):
            begin = time.process_time()
            observe.observe(found, [make.attempt(1)], pods)
            times.append(time.process_time() - begin)
        return min(times)

    seconds(100)
    assert seconds(8000) < 40 * max(seconds(800), 1e-3), "ten times as many, with much room for a busy machine"


def test_parsed_specs_are_bounded_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = observe._Parser()
    texts = [json.dumps(make.spec(reward={"source": "#" * 50_000 + str(n)})) for n in range(200)]
    for text in texts:
        parser(text)
    assert sum(map(len, parser._known)) <= observe.PARSED_BYTES
    assert parser(texts[-1]) is parser(texts[-1])
    assert parser(texts[0]).spec.reward.source.endswith("0")  # type: ignore[union-attr]


def test_what_a_job_runs_is_looked_at_once_for_each_of_its_specifications(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Job is told of several times in its life, and a digest of all that it runs is dear."""
    looked: list[int] = []
    plain = observe.fingerprint
    monkeypatch.setattr(observe, "fingerprint", lambda spec: looked.append(1) or plain(spec))
    cache = Cache()

    def content(version: int, generation: int, image: str, uid: str = "j1") -> str:
        job = raw_job(version, uid)
        job["metadata"]["generation"] = generation
        job["spec"] = {"template": {"spec": {"containers": [{"name": "trainer", "image": image}]}}}
        cache.put("job", job)
        return next(iter(cache.get(KEY).jobs.values())).content

    first = content(1, 1, "a")
    assert content(2, 1, "a") == first
    assert len(looked) == 1
    changed = content(3, 2, "b")
    assert changed != first
    assert content(4, 1, "a", uid="j2") == first, "another Job of that name"
    assert content(5, 2, "b", uid="j3") == changed
    assert len(looked) == 4
