"""What must hold whatever happens, in whatever order, and however late the operator hears of it."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemo_rl.job.status import JobStatus
from nemo_rl_operator.policies.retry import MOST_FRUITLESS
from nemo_rl_operator.runtime import timestamps
from unit.operator.world import World

STEPS: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("tick")),  # what usually happens, so that stories get far
    st.tuples(st.just("tick")),
    st.tuples(st.just("tick")),
    st.tuples(st.just("reconcile"), st.sampled_from([None, None, None, 0, 1, 2, 3, 4])),
    st.tuples(st.just("hear"), st.sampled_from(["resource", "jobs", "pods", "workload", "all"])),
    st.tuples(st.just("controller")),
    st.tuples(st.just("run")),
    st.tuples(st.just("end deleted")),
    st.tuples(st.just("end"), st.integers(0, 3), st.sampled_from([75, 75, 75, 1, 137, 0, 40])),
    st.tuples(st.just("evict"), st.integers(0, 3)),
    st.tuples(st.just("reject"), st.integers(0, 3)),
    st.tuples(st.just("sidecar"), st.booleans()),
    st.tuples(st.just("stranger"), st.integers(0, 9)),
    st.tuples(st.just("node clock"), st.sampled_from([-3600, 3600])),
    st.tuples(st.just("delete job")),
    st.tuples(st.just("delete pod"), st.integers(0, 3), st.sampled_from([False, False, True])),
    st.tuples(st.just("kueue"), st.booleans()),
    st.tuples(st.just("quota"), st.sampled_from([True, True, False])),
    st.tuples(st.just("delete workload")),
    st.tuples(st.just("suspend"), st.booleans()),
    st.tuples(st.just("replica"), st.integers(0, 3), st.sampled_from(["come", "go", "gone", "crash"])),
    st.tuples(st.just("say"), st.integers(0, 3), st.sampled_from(["Ready", "Lost", "Refused", "Loading"])),
    st.tuples(st.just("scale"), st.integers(1, 4)),
    st.tuples(st.just("delete replica set")),
    st.tuples(st.just("time"), st.sampled_from([0.5, 3.0, 12.0, 400.0])),
)
SCRIPTS = st.lists(STEPS, min_size=15, max_size=50)
FIELDS = st.sampled_from(
    [
        {},
        {"backoffLimit": 0},
        {"backoffLimit": 1000},
        {"activeDeadlineSeconds": 600},
        {"suspend": True},
        {"queue": "team"},
        {"queue": "team", "backoffLimit": 0},
        {"rollout": {"engine": "vllm", "replicas": 2}},
        {"rollout": {"engine": "vllm", "replicas": 2}, "backoffLimit": 1000, "startupTimeoutSeconds": 10},
    ]
)
Start = tuple[int, bool, dict[str, Any], bool]
WORLDS: st.SearchStrategy[Start] = st.tuples(st.sampled_from([1, 2]), st.booleans(), FIELDS, st.booleans())
MANY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def play(world: World, step: tuple[Any, ...]) -> None:
    what, *rest = step
    match what:
        case "reconcile":
            world.reconcile(die_after=rest[0])
        case "hear":
            world.hear_all() if rest[0] == "all" else world.hear(rest[0])
        case "tick":
            world.hear_all()
            world.reconcile()
            world.job_controller()
            world.run_pods()
        case "controller":
            world.job_controller()
        case "run":
            world.run_pods()
        case "end deleted":
            world.end_deleted_pods()
        case "end":
            world.end_pod(*rest)
        case "evict":
            world.end_pod(rest[0], 143, disruption="EvictionByEvictionAPI: drained")
        case "reject":
            world.reject_pod(rest[0])
        case "sidecar":
            world.sidecars = rest[0]
        case "stranger":
            world.stranger(rest[0])
        case "node clock":
            world.skew = rest[0]
        case "delete job":
            world.delete_job()
        case "delete pod":
            world.delete_pod(*rest)
        case "kueue":
            world.kueue(rest[0])
        case "quota":
            world.quota(rest[0])
        case "delete workload":
            world.delete_workload()
        case "suspend":
            world.suspend(rest[0])
        case "replica":
            world.replica(*rest)
        case "say":
            world.say(*rest)
        case "scale":
            world.scale(*rest)
        case "delete replica set":
            world.delete_replica_set()
        case "time":
            world.pass_time(rest[0])


def suspend_and_wait(world: World) -> None:
    """Suspends the job, and plays on for longer than a silent node is waited for."""
    world.suspend(True)
    for _ in range(10):
        world.hear_all()
        world.reconcile()
        world.job_controller()
        world.end_deleted_pods()
        world.job_controller()
        world.pass_time(5)


TICK = ("tick",)
OUTLIVED: list[tuple[Any, ...]] = [TICK, TICK, ("end", 0, 75), TICK, TICK, TICK]
LATE = ("reconcile", None)
SILENT_AFTER_AN_EVICTION: list[tuple[Any, ...]] = [*[TICK] * 3, ("evict", 0), ("delete pod", 0, True), TICK]
DEAF_TO_PODS: list[tuple[Any, ...]] = [
    LATE,
    ("controller",),
    ("run",),
    ("end", 0, 75),
    ("controller",),
    ("hear", "jobs"),
]
DEAF_TO_PODS += [("time", 12.0), LATE, ("time", 12.0), LATE, ("controller",)]
PREEMPTED: list[tuple[Any, ...]] = [TICK, TICK, ("kueue", True), ("controller",), ("end deleted",), ("kueue", False)]
PREEMPTED += [TICK, TICK, TICK]
UNHEARD: list[tuple[Any, ...]] = [("reconcile", None), ("controller",), ("run",), ("delete job",), ("reconcile", None)]
REPLACED: list[tuple[Any, ...]] = [*[TICK] * 12, ("delete pod", 0, False), ("end deleted",), ("controller",)]
SAME_SECOND: list[tuple[Any, ...]] = [*[TICK] * 6, ("delete job",), ("end deleted",), ("reconcile", None)]
SAME_SECOND += [("delete replica set",), TICK, ("sidecar", True), ("kueue", True), TICK]


@MANY
@example((2, True, {}, False), OUTLIVED)  # the Job is called failed while one of its pods still saves
@example((1, False, {}, False), PREEMPTED)  # Kueue takes the quota back and gives it again while the pod still saves
@example((2, True, {}, False), DEAF_TO_PODS)  # the operator hears of the failed Job, but not of its pods
@example(
    (1, False, {}, False), [*UNHEARD, ("controller",)]
)  # the operator never heard of the pod that outlives its Job
@example((1, False, {}, True), [*UNHEARD, ("controller",)])  # nor did it write that the attempt had begun
@given(WORLDS, SCRIPTS)
def test_there_are_never_two_live_attempts(start: Start, script: list[tuple[Any, ...]]) -> None:
    world = World(*start)
    for step in script:
        play(world, step)
        assert len(world.live_attempts()) <= 1


@MANY
@given(WORLDS, SCRIPTS)
def test_an_end_is_an_end(start: Start, script: list[tuple[Any, ...]]) -> None:
    world = World(*start)
    for step in script:
        play(world, step)
    ends = [phase for phase in world.seen_phases if phase in ("Succeeded", "Failed")]
    assert len(set(ends)) <= 1
    if ends:
        first = world.seen_phases.index(ends[0])
        assert set(world.seen_phases[first:]) == {ends[0]}


@MANY
@example(
    (1, False, {"rollout": {"engine": "vllm", "replicas": 2}}, False), SAME_SECOND
)  # two pods, 8 and 11, of one time
@given(WORLDS, SCRIPTS)
def test_every_story_comes_to_an_end(start: Start, script: list[tuple[Any, ...]]) -> None:
    world = World(*start)
    for step in script:
        play(world, step)
    world.suspend(False)
    world.kueue(False)
    world.settle()
    assert world.status.phase in ("Succeeded", "Failed")
    assert world.live_attempts() == set()
    assert world.status.condition("Finished").status == "True"  # type: ignore[union-attr]


HARMLESS = ("tick", "reconcile", "hear", "controller", "run", "end deleted", "evict", "delete job", "delete pod")
HARMLESS += ("replica", "say", "scale", "delete replica set")
HARMLESS += ("kueue", "quota", "delete workload", "suspend", "time", "reject", "sidecar", "stranger", "node clock")
LIMITED = st.sampled_from([{"backoffLimit": 0}, {"backoffLimit": 0, "queue": "team"}])
DELETED: list[tuple[Any, ...]] = [TICK, TICK, ("delete pod", 0, False), ("end deleted",), ("controller",)]


@MANY
@example((1, False, {"backoffLimit": 0}, False), DELETED)  # the operator hears of the Job's end only, the pod is gone
@example((1, False, {"backoffLimit": 0}, False), [TICK, TICK, ("delete pod", 0, True), ("time", 12.0), TICK])
@given(st.tuples(st.sampled_from([1, 2]), st.booleans(), LIMITED, st.booleans()), SCRIPTS)
def test_what_the_cluster_does_to_a_job_never_counts(start: Start, script: list[tuple[Any, ...]]) -> None:
    world = World(*start)
    for step in script:
        if step[0] in HARMLESS:
            play(world, step)
    world.suspend(False)
    world.kueue(False)
    world.settle()
    if not world.status.counted_failures:
        assert world.status.phase == "Succeeded"
        return
    ended = [attempt.message or "" for attempt in world.status.attempts if attempt.counted]
    assert all("in a row that ended without a new checkpoint" in message for message in ended)
    assert (world.status.attempt or 0) > MOST_FRUITLESS


@MANY
@example((1, False, {"rollout": {"engine": "vllm", "replicas": 2}}, False), REPLACED)  # and its message is as it was
@given(WORLDS, SCRIPTS)
def test_what_was_decided_is_not_decided_again(start: Start, script: list[tuple[Any, ...]]) -> None:
    world = World(*start)
    for step in script:
        play(world, step)
    world.progress = None  # what a trainer says anew is news, whenever it is heard
    world.hear_all()
    decided = world.reconcile()
    world.hear_all()
    snapshot, again = world.decide()
    assert again.actions == ()
    written = (
        snapshot.status if snapshot.status.phase else decided.status
    )  # that the first attempt starts may be unwritten
    assert again.status.dump() == written.dump()


@MANY
@given(WORLDS, SCRIPTS)
@example((2, True, {}, False), SILENT_AFTER_AN_EVICTION)
def test_a_suspended_job_has_no_pods_and_a_resumed_one_goes_on(start: Start, script: list[tuple[Any, ...]]) -> None:
    world = World(*start)
    for step in script:
        play(world, step)
    suspend_and_wait(world)
    if world.status.phase in ("Succeeded", "Failed"):
        return
    assert world.status.phase == "Suspended"
    assert world.live_attempts() == set()
    world.suspend(False)
    world.settle()
    assert world.status.phase in ("Succeeded", "Failed")


@MANY
@given(WORLDS, SCRIPTS)
def test_the_status_counts_what_happened(start: Start, script: list[tuple[Any, ...]]) -> None:
    world = World(*start)
    for step in script:
        play(world, step)
    status = world.status
    numbers = [attempt.number for attempt in status.attempts]
    assert numbers == sorted(set(numbers))
    assert all(attempt.end_time for attempt in status.attempts[:-1]), "only the newest attempt may be open"
    if len(numbers) == (status.attempt or 0):
        assert sum(bool(a.counted) for a in status.attempts) == (status.counted_failures or 0)
    assert JobStatus.load(status.dump()).dump() == status.dump()


@MANY
@given(SCRIPTS, st.randoms())
def test_late_news_change_nothing_in_the_end(script: list[tuple[Any, ...]], random: Any) -> None:
    """The same events of the cluster, once with an operator that hears all at once and once with one that lags."""
    outside = [step for step in script if step[0] in ("controller", "run", "end deleted", "time")]
    prompt, slow = World(), World()
    for step in outside:
        for world, lag in ((prompt, 0.0), (slow, 0.7)):
            if random.random() >= lag:
                world.hear_all()
                world.reconcile()
            play(world, step)
    for world in (prompt, slow):
        world.settle()
    assert (prompt.status.phase, slow.status.phase) == ("Succeeded", "Succeeded")
    assert prompt.status.counted_failures == slow.status.counted_failures


@MANY
@given(WORLDS, SCRIPTS)
def test_the_clock_of_the_deadline_never_runs_faster_than_pods_do(start: Start, script: list[tuple[Any, ...]]) -> None:
    """What it counts is at most the time in which a pod had a node, and each look that the operator took late."""
    nodes, hasty, _, patient = start
    world, had_a_node, late = World(nodes, hasty, {}, patient), 0.0, 0.0
    for step in script:
        seconds = step[1] if step[0] == "time" else 0.0
        if seconds and any(not pod.terminal for pod in world.live.pods.values()):
            had_a_node += seconds
        elif seconds and world.status.active_since:
            late += seconds  # nobody has told the operator yet
        play(world, step)
    status = world.status
    counted = (status.active_seconds or 0) - (timestamps.seconds_until(status.active_since, world.now) or 0.0)
    assert counted <= had_a_node + late + 1


@MANY
@given(WORLDS, SCRIPTS)
def test_no_time_in_the_status_is_a_nodes(start: Start, script: list[tuple[Any, ...]]) -> None:
    world = World(*start)
    world.skew = 3600
    for step in script:
        if step[0] != "node clock":
            play(world, step)
    found = world.status
    times = [found.completion_time, found.active_since, *(attempt.end_time for attempt in found.attempts)]
    assert all((timestamps.seconds_until(time, world.now) or 0.0) <= 1 for time in times)


def play_on(world: World) -> None:
    for _ in range(15):
        play(world, ("tick",))
        play(world, ("end deleted",))
        play(world, ("time", 12.0))


BUDGETS = st.sampled_from([{"budget": {"gpuHours": 0.01}}, {"budget": {"gpuHours": 0.2}}, {"budget": {"gpuHours": 1}}])
WITH_GPUS = st.tuples(st.sampled_from([1, 2]), st.booleans(), st.tuples(FIELDS, BUDGETS), st.booleans())


@settings(MANY, max_examples=60, derandomize=True)
@given(WITH_GPUS, SCRIPTS)
def test_gpu_seconds_are_at_most_those_of_pods_with_a_node_and_a_spent_budget_leaves_none(
    start: tuple[int, bool, tuple[dict[str, Any], dict[str, Any]], bool], script: list[tuple[Any, ...]]
) -> None:
    nodes, hasty, (fields, budget), patient = start
    world, held, counted = World(nodes, hasty, fields | budget, patient), 0.0, 0
    for step in script:
        if step[0] == "node clock":
            continue
        before = world.now
        # and those whose end nobody has told the operator yet
        seen = [found.pods | found.replicas for found in (world.live, world.cache)]
        live = {pod.name for pods in seen for pod in pods.values() if not pod.terminal}
        play(world, step)
        held += len(live) * (world.now - before).total_seconds()
        found = world.status.gpu_seconds or 0
        assert counted <= found, "what was counted is never forgotten"
        counted = found
    assert counted <= held + len(world.seen_phases) + 50, "each pod has one GPU here; times have whole seconds"
    play_on(world)
    if (world.status.gpu_seconds or 0) < 3600 * budget["budget"]["gpuHours"]:
        return
    play_on(world)
    status = world.status
    if not status.finished:
        assert status.phase == "Suspended"
        assert not world.live_attempts() and not [p for p in world.live.replicas.values() if not p.terminal]


GIVES_WAY: list[tuple[Any, ...]] = [TICK, ("quota", True), TICK, TICK, ("quota", False), TICK, ("end deleted",), TICK]


@MANY
@example((1, False, {"queue": "team"}, False), [*GIVES_WAY, TICK, TICK])
@example((2, False, {"queue": "team"}, False), [*GIVES_WAY, ("delete workload",), TICK, TICK])
@given(st.tuples(st.sampled_from([1, 2]), st.booleans(), st.just({"queue": "team"}), st.booleans()), SCRIPTS)
def test_pods_of_a_queued_job_start_on_its_quota_only(start: Start, script: list[tuple[Any, ...]]) -> None:
    """That it is never given back under a living pod, the world checks itself."""
    world = World(*start)
    for step in script:
        jobs, admitted = (
            set(world.live.jobs),
            [w for w in (world.live.workload, world.cache.workload) if w and w.admitted],
        )
        play(world, step)
        assert admitted or set(world.live.jobs) <= jobs, "an attempt was started without quota"


# --- rollout replicas that come, go, hang and lie

WITH_REPLICAS = {"rollout": {"engine": "vllm", "replicas": 2}}
ABOUT_REPLICAS = ("tick", "reconcile", "hear", "controller", "run", "end deleted", "replica", "say", "scale", "time")
ABOUT_REPLICAS += ("delete replica set",)


@MANY
@given(SCRIPTS)
def test_whatever_replicas_do_the_attempt_goes_on(script: list[tuple[Any, ...]]) -> None:
    world = World(fields=WITH_REPLICAS)
    for step in script:
        if step[0] in ABOUT_REPLICAS:
            play(world, step)
    assert (world.status.attempt or 0) <= 1
    assert all(attempt.end_time is None for attempt in world.status.attempts)
    assert set(world.seen_phases) <= {"Pending", "Starting", "Running"}


@MANY
@given(SCRIPTS)
def test_there_are_as_many_replicas_as_are_asked_for_while_the_job_runs_and_none_after_it(
    script: list[tuple[Any, ...]],
) -> None:
    world = World(fields={**WITH_REPLICAS, "backoffLimit": 1000})
    for step in script:
        play(world, step)
    world.suspend(False)
    world.kueue(False)
    for _ in range(6):
        world.hear_all()
        world.reconcile()
        world.job_controller()
        world.run_pods()
        world.end_deleted_pods()
        world.pass_time(35)
    if not world.status.finished and world.status.phase == "Running":
        assert world.live.replica_set is not None
        assert world.live.replica_set.replicas == world.replicas_asked
        assert world.status.rollout is not None
        assert [m.name for m in world.status.rollout.members] == [f"x-rollout-{n}" for n in range(world.replicas_asked)]
    world.settle()
    assert world.status.finished
    assert world.live.replica_set is None
    assert not world.live.replicas


@MANY
@given(SCRIPTS)
def test_a_suspended_job_has_no_replicas(script: list[tuple[Any, ...]]) -> None:
    world = World(fields=WITH_REPLICAS)
    for step in script:
        play(world, step)
    suspend_and_wait(world)
    assert world.live.replica_set is None
    assert not world.live.replicas
    if not world.status.finished:
        assert world.status.phase == "Suspended"
        assert world.status.rollout is None


@MANY
@given(SCRIPTS)
def test_only_a_pod_that_runs_is_ready_whatever_the_trainer_says(script: list[tuple[Any, ...]]) -> None:
    world = World(fields=WITH_REPLICAS)
    for step in script:
        play(world, step)
        rollout = world.status.rollout
        if step[0] == "tick" and rollout is not None:
            assert rollout.ready == sum(member.state == "Ready" for member in rollout.members)
            seen = world.cache.replicas
            for member in rollout.members:
                if member.state == "Ready":
                    assert seen[member.name].phase == "Running" and not seen[member.name].deleting


@MANY
@given(WORLDS, SCRIPTS)
def test_a_job_without_replicas_never_asks_for_them(start: Start, script: list[tuple[Any, ...]]) -> None:
    nodes, hasty, fields, patient = start
    world = World(nodes, hasty, {name: value for name, value in fields.items() if name != "rollout"}, patient)
    for step in script:
        play(world, step)
    world.settle()
    assert world.replica_reads == 0
    assert world.live.replica_set is None
    assert world.status.rollout is None
