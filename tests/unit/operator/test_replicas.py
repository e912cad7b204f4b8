"""Rollout replicas: what is made for them, what it costs, and what the status, its message and Events say of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_rl.job import names
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl.job.status import JobStatus, Progress, TerminationMessage
from nemo_rl_operator import build
from nemo_rl_operator.decide import Decision, decide
from nemo_rl_operator.observe import PodView, ReplicaSetView, pod_view
from nemo_rl_operator.plan import Delete, Kind, Need, Update
from unit.operator import make
from unit.operator.test_reconcile import KEY, Setting

ROLLOUT: dict[str, Any] = {"engine": "vllm", "replicas": 2, "gpusPerReplica": 4, "resources": {"memory": "64Gi"}}


def spec(**rollout: Any) -> RLTrainingJobSpec:
    return make.parsed(rollout={**ROLLOUT, **rollout})


def replica(number: int, **fields: Any) -> PodView:
    values = {"phase": "Running", "ip": f"10.1.0.{number}", "started": make.at(-20), **fields}
    return make.pod(0, number, name=f"x-rollout-{number}", controller="set-1", replica=True, **values)


def told(*servers: tuple[int, str, dict[str, Any]]) -> Progress:
    said = [{"address": f"10.1.0.{number}:8000", "state": state, **more} for number, state, more in servers]
    return Progress.of_a_pod({"step": 5, "totalSteps": 10, "rollout": said})


def after(
    status: JobStatus, *replicas: PodView, progress: Progress | None = None, replicas_asked: int = 2, **seen: Any
) -> Decision:
    """The decision about a job whose trainer runs."""
    found = make.resource(status, rollout={**ROLLOUT, "replicas": replicas_asked})
    pods = [make.running_pod(), *replicas]
    snapshot = make.seen(found, [make.attempt()], pods, progress, rollout_image=make.ROLLOUT_IMAGE, **seen)
    return decide(snapshot, make.NOW)


def running(**fields: Any) -> JobStatus:
    return make.status(make.record(), phase="Running", reason="Training", **fields)


def the_set(**fields: Any) -> ReplicaSetView:
    content = build.replica_content(make.resource(), spec(), make.ROLLOUT_IMAGE)
    return replace(ReplicaSetView("x-rollout", "set-1", make.UID, False, 2, content), **fields)


# --- what is made


def test_a_replica_is_restricted_and_knows_nothing_but_its_word() -> None:
    resource = make.resource()
    body = build.replica_set(resource, spec(), make.ROLLOUT_IMAGE)
    assert body["metadata"]["ownerReferences"][0]["uid"] == make.UID
    assert (body["spec"]["replicas"], body["spec"]["podManagementPolicy"]) == (2, "Parallel")
    pod = body["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["image"] == make.ROLLOUT_IMAGE
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "4"}
    (secret,) = [v["secret"] for v in pod["volumes"] if "secret" in v]
    assert secret["items"] == [{"key": "rollout", "path": "rollout"}], "the word of the ranks is not the replicas'"
    labels = body["spec"]["template"]["metadata"]["labels"]
    for selector in (body["spec"]["selector"]["matchLabels"], build.replica_service(resource)["spec"]["selector"]):
        assert selector.items() <= labels.items()
    trainer = build.trainer_pod(resource, spec(), 1, make.IMAGE)
    variables = {e["name"]: e["value"] for e in trainer["containers"][0]["env"]}
    assert variables[names.ROLLOUT_ADDRESSES_VARIABLE] == "x-rollout:8000"
    assert any(mount["mountPath"] == names.TOKEN_DIR for mount in trainer["containers"][0]["volumeMounts"])


def test_a_job_that_has_none_gets_nothing_of_it() -> None:
    plain = make.parsed()
    trainer = build.trainer_pod(make.resource(), plain, 1, make.IMAGE)
    assert names.ROLLOUT_ADDRESSES_VARIABLE not in str(trainer)
    assert build.run_secret(make.resource(), plain) is None


def test_how_many_there_are_is_not_part_of_the_frozen_job() -> None:
    texts = {
        build.frozen_job(make.resource(rollout={**ROLLOUT, "replicas": n}), spec(replicas=n))["data"][names.JOB_KEY]
        for n in (1, 7)
    }
    assert len(texts) == 1
    assert '"replicas":1' in texts.pop(), "but that there are some is"


def test_long_names_leave_room_for_the_controllers_digest() -> None:
    one, other = (names.rollout("a" * 49 + letter) for letter in "xy")
    assert one != other
    assert max(len(names.rollout("a" * n)) for n in range(1, 51)) <= 52


# --- what is done


async def test_a_life_with_replicas_costs_few_calls_more() -> None:
    setting = Setting(rollout_image=make.ROLLOUT_IMAGE)
    setting.api.put_job(rollout=ROLLOUT)
    for seconds in (0, 1):
        setting.now = make.later(seconds)
        setting.deliver()
        await setting.reconcile(KEY)
    found = setting.api.objects[Kind.STATEFUL_SET, "x-rollout"]
    for number in (0, 1):
        owner = {"kind": "StatefulSet", "name": "x-rollout", "uid": found["metadata"]["uid"], "controller": True}
        meta = {"name": f"x-rollout-{number}", "uid": f"r-{number}", "ownerReferences": [owner]}
        meta["labels"] = found["spec"]["template"]["metadata"]["labels"]
        setting.api.put(Kind.POD, {"metadata": meta, "status": {"phase": "Running", "podIP": f"10.1.0.{number}"}})
    setting.pod("Running", running={})
    setting.progress = told((0, "Ready", {"weightVersion": 5, "tokensPerSecond": 70}), (1, "Loading", {}))
    setting.deliver()
    await setting.reconcile(KEY)
    rollout = setting.status["rollout"]
    assert (rollout["replicas"], rollout["ready"], rollout["text"], rollout["weightVersion"]) == (2, 1, "1/2", 5)
    assert rollout["members"][0] == {"name": "x-rollout-0", "state": "Ready", "weightVersion": 5, "tokensPerSecond": 70}
    assert "1 of 2 rollout replicas are ready" in setting.status["message"]
    assert setting.status["gpus"] == 1 + 2 * 4
    word = TerminationMessage(kind="result", total_steps=10).encode()
    setting.pod("Succeeded", terminated={"exitCode": 0, "message": word})
    setting.deliver()
    await setting.reconcile(KEY)
    assert setting.status["phase"] == "Succeeded"
    assert "rollout" not in setting.status
    assert (Kind.STATEFUL_SET, "x-rollout") not in setting.api.objects
    calls = [(verb, kind.name) for verb, kind, _ in setting.api.calls if verb != "PATCH"]
    assert calls.index(("POST", "JOB")) < calls.index(("POST", "STATEFUL_SET")), (
        "what there is room for is the trainer's"
    )
    assert sorted(calls) == sorted(
        [("POST", kind) for kind in ("CONFIG_MAP", "CLAIM", "SECRET", "JOB", "SERVICE", "STATEFUL_SET")]
        + [("GET", "STATEFUL_SET")] * 3
        + [("DELETE", "STATEFUL_SET")]
    )


def test_scaling_changes_the_set_and_nothing_else() -> None:
    first = after(running(), replica(0), replica(1), replica_set=the_set(), replica_set_read=True)
    assert first.actions == ()
    again = after(first.status, replica(0), replica(1), replicas_asked=3)
    assert again.needs == {Need.REPLICAS}
    known = {"replica_set": the_set(), "replica_set_read": True}
    scaled = after(first.status, replica(0), replica(1), replicas_asked=3, **known)
    assert scaled.actions == (Update(Kind.STATEFUL_SET, "x-rollout", "set-1", {"replicas": 3}),)
    assert scaled.status.rollout is not None
    assert [member.state for member in scaled.status.rollout.members] == ["Loading", "Loading", "Pending"]


def test_a_set_that_runs_something_else_is_made_ours_again() -> None:
    found = after(running(), replica(0), replica(1), replica_set=the_set(content="other"), replica_set_read=True)
    (update,) = found.actions
    assert (
        isinstance(update, Update) and update.spec["template"]["spec"]["containers"][0]["image"] == make.ROLLOUT_IMAGE
    )


def test_a_set_of_somebody_else_is_left_alone() -> None:
    found = after(running(), replica(0), replica_set=the_set(owner="another"), replica_set_read=True)
    assert found.actions == ()


def test_suspending_frees_the_replicas_and_waits_for_their_pods() -> None:
    before = after(running(), replica(0), replica(1), replica_set=the_set(), replica_set_read=True).status
    found = make.resource(before, rollout=ROLLOUT, suspend=True)

    def decided(*pods: PodView, **seen: Any) -> Decision:
        return decide(make.seen(found, [], pods, rollout_image=make.ROLLOUT_IMAGE, verified=1, **seen), make.NOW)

    known = {"replica_set": the_set(), "replica_set_read": True}
    first = decided(replica(0), replica(1), **known)
    assert Delete(Kind.STATEFUL_SET, "x-rollout", "set-1") in first.actions
    assert first.status.phase == "Running" and "waiting for rollout replica x-rollout-0" in (first.status.message or "")
    assert decided(replica_set_read=True).status.phase == "Suspended"


def test_the_trainer_lost_replicas_stay_warm_for_as_long_as_a_start_may_take() -> None:
    before = after(running(), replica(0), replica(1), replica_set=the_set(), replica_set_read=True).status
    lost = before.model_copy(deep=True)
    lost.attempts[0].end_time, lost.attempts[0].cause, lost.attempts[0].counted = make.at(0), "OutOfMemory", True
    lost.counted_failures = 1

    def decided(seconds: float, limit: int) -> Decision:
        found = make.resource(lost, rollout=ROLLOUT, startupTimeoutSeconds=limit)
        known = {"replica_set": the_set(), "replica_set_read": True, "verified": 1}
        pods = [replica(0), replica(1)]
        return decide(make.seen(found, [], pods, rollout_image=make.ROLLOUT_IMAGE, **known), make.later(seconds))

    warm = decided(3, 5)
    assert warm.status.reason == "BackOff" and not [a for a in warm.actions if isinstance(a, Delete)]
    assert warm.status.rollout is not None and warm.requeue_after is not None and warm.requeue_after <= 2.2
    assert [a for a in decided(7, 5).actions if isinstance(a, Delete)]


def test_a_job_without_an_image_for_them_is_not_started() -> None:
    found = decide(make.seen(make.resource(rollout=ROLLOUT)), make.NOW)
    assert (found.status.phase, found.status.reason) == ("Pending", "NoImage")
    assert "spec.rollout.image" in (found.status.message or "")
    queued = make.seen(make.resource(rollout=ROLLOUT, queue="team"), rollout_image=make.ROLLOUT_IMAGE, kueue="v1beta2")
    assert "Kueue's queues cannot have rollout replicas" in (decide(queued, make.NOW).status.message or "")


# --- what is said


def test_events_tell_what_was_lost_refused_and_is_back() -> None:
    ready = told((0, "Ready", {"weightVersion": 4}), (1, "Ready", {"weightVersion": 4}))
    known = {"replica_set": the_set(), "replica_set_read": True}
    status = after(running(), replica(0), replica(1), progress=ready, **known).status
    refused = after(
        status,
        replica(0),
        replica(1),
        progress=told((0, "Refused", {"message": "differs by 3 nats a token"}), (1, "Ready", {})),
    )
    (event,) = refused.events
    assert (event.reason, event.warning) == ("ReplicaRefused", True)
    assert "x-rollout-0 is refused and gets no requests: differs by 3 nats" in event.message
    crashed = replica(1, waiting="CrashLoopBackOff", last_end="it exited with 137 (OOMKilled)", restarts=2)
    lost = after(refused.status, replica(0), crashed, progress=ready)
    by_reason = {event.reason: event.message for event in lost.events}
    assert "x-rollout-1 is lost, the others go on: it exited with 137 (OOMKilled)" in by_reason["ReplicaLost"]
    assert "x-rollout-0 has version 4" in by_reason["ReplicaReady"]
    assert "x-rollout-1: it exited with 137" in (lost.status.message or "")
    assert after(lost.status, replica(0), crashed, progress=ready).events == (), "each once"


def test_why_a_replica_does_not_run_is_said_in_words() -> None:
    waits = replica(
        1,
        phase="Pending",
        ip="",
        scheduled=False,
        unschedulable="0/8 nodes are available: 8 Insufficient nvidia.com/gpu.",
    )
    found = after(running(), replica(0), waits, replica_set=the_set(), replica_set_read=True).status.rollout
    assert found is not None
    assert found.members[1].state == "Pending"
    assert (
        found.members[1].message
        == "waiting for 4 × nvidia.com/gpu: 0 of 8 nodes fit (8 have too little nvidia.com/gpu free)"
    )
    quota = 'FailedCreate: create Pod x-rollout-1 in StatefulSet x-rollout failed error: pods "x-rollout-1" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=4, used: requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8'
    refused = after(running(), replica(0), replica_set=the_set(), replica_set_read=True, replica_warning=quota)
    assert refused.status.rollout is not None
    text = refused.status.rollout.members[1].message or ""
    assert text.startswith("waiting for quota gpus: asked for requests.nvidia.com/gpu=4")
    later = after(refused.status, replica(0))
    assert later.status.rollout is not None
    assert later.status.rollout.members[1].message == text, "until somebody looks again"


def test_what_a_trainer_says_of_strangers_is_not_shown() -> None:
    lies = told((7, "Ready", {"weightVersion": 9}), (0, "Ready", {"weightVersion": 2**60, "message": "x" * 5000}))
    lies.rollout = [*(lies.rollout or [])]
    found = after(running(), replica(0), progress=lies, replica_set=the_set(), replica_set_read=True).status
    assert found.rollout is not None
    assert [member.name for member in found.rollout.members] == ["x-rollout-0", "x-rollout-1"]
    assert found.rollout.weight_version is None
    assert JobStatus.load(found.dump()).dump() == found.dump()


def test_only_pods_of_the_set_are_replicas() -> None:
    meta: dict[str, Any] = {
        "name": "x-rollout-3",
        "uid": "p",
        "labels": {names.LABEL_JOB: "x", names.LABEL_JOB_UID: make.UID, names.LABEL_COMPONENT: "rollout"},
    }
    stranger = pod_view({"metadata": meta, "status": {"phase": "Running"}})
    owner = {"kind": "StatefulSet", "name": "x-rollout", "uid": "s", "controller": True}
    ours = pod_view({"metadata": {**meta, "ownerReferences": [owner]}, "status": {"phase": "Running"}})
    assert (ours.replica, ours.index, ours.owner, ours.attempt) == (True, 3, make.UID, 0)
    assert stranger.owner == ""
