"""A hostile way to the API server: refusals, delays, lost watches, rivals, and kill -9 between any two calls."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.api import ApiError, Object, eventually
from cluster.faults import Call, FaultyProxy
from cluster.kubelet import PlayedPod
from cluster.manifests import bundle, result
from cluster.operator_process import Operator, Operators
from cluster.scene import Scene
from cluster.server import Cluster
from nemo_rl.job import names
from nemo_rl.job.names import ExitCode
from nemo_rl.job.status import Cause
from ports import free_ports

MakeOperator = Callable[..., Operator]
MOST_CALLS = 60
LIVES_AT_ONCE = 5


@pytest.fixture
def proxy(cluster: Cluster, tmp_path: Path) -> Iterator[FaultyProxy]:
    with FaultyProxy(cluster.api, tmp_path) as made:
        yield made


def eventful_life(scene: Scene, nodes: int = 1) -> Object:
    """Free retry, counted retry, suspension and success in one job; the final status."""
    scene.submit(resources={"nodes": nodes}, backoffLimit=1)

    def run(number: int) -> list[PlayedPod]:
        return [scene.attempt(number, index=i).run() for i in range(nodes)]

    run(1)[0].disrupt()
    run(2)[0].oom()
    run(3)
    scene.phase("Running")
    scene.change(suspend=True)
    scene.phase("Suspended")
    scene.change(suspend=False)
    for pod in reversed(run(4)):
        pod.exit(0, result(10))
    return scene.phase("Succeeded")


def essence(status: Object) -> Object:
    """The status without what differs between two equal lives: times, the pods' names, and the job's digest."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: strip(v) for k, v in value.items() if not re.search(r"(time|since|seconds|pod|digest)$", k, re.I)
            }
        return [strip(v) for v in value] if isinstance(value, list) else value

    found = strip(status)
    found.get("conditions", []).sort(key=lambda c: c["type"])
    return dict(found)


def assert_one_job_for_each_attempt(scene: Scene, attempts: int) -> None:
    made = {j["metadata"]["name"] for j in scene.jobs()}
    assert made <= {names.attempt_job("x", n) for n in range(1, attempts + 1)}

    def live() -> list[Object]:
        return [j for j in scene.jobs() if not j.get("status", {}).get("conditions")]

    eventually(lambda: not live(), "no Job is live")


def assert_digest_of_the_frozen_job(scene: Scene, status: Object) -> None:
    content = scene.api.get("configmaps", scene.namespace, names.frozen_job("x"))["data"][names.JOB_KEY]
    assert status["jobDigest"] == hashlib.sha256(content.encode()).hexdigest()[: len(status["jobDigest"])]
    assert len(status["jobDigest"]) >= 32


@pytest.mark.timeout(900)
def test_kill_9_between_any_two_calls_changes_nothing(
    cluster: Cluster, new_scene: Callable[[str], Scene], own_operator: MakeOperator, tmp_path: Path
) -> None:
    def life(cut_after: int | None) -> tuple[int, Object | str]:
        """State changes asked for and the final status; the operator is killed at that call, and started again."""
        scene = new_scene(f"kill-{cut_after}")
        folder = tmp_path / f"kill-{cut_after}"
        with FaultyProxy(cluster.api, folder) as proxy:
            operator = own_operator(scene.namespace, proxy.kubeconfig)
            proxy.cut_after, proxy.on_cut = cut_after, operator.kill

            ended = threading.Event()

            def restart() -> None:
                if proxy.was_cut.wait(120) and not ended.is_set():
                    operator.start()

            threading.Thread(target=restart, daemon=True).start()
            try:
                operator.start()
                status = eventful_life(scene, nodes=2)
                eventually(lambda: operator.running, "the operator runs")
                assert_one_job_for_each_attempt(scene, 4)
                assert_digest_of_the_frozen_job(scene, status)
                assert cut_after is None or proxy.was_cut.is_set() or len(proxy.state_changes) < cut_after
                scene.close()
                return len(proxy.state_changes), essence(status)
            except AssertionError as error:
                return 0, f"killed after call {cut_after}: {error}\n{operator.tail(15)}"
            finally:
                ended.set()
                proxy.was_cut.set()
                operator.kill()

    calls, undisturbed = life(None)
    assert isinstance(undisturbed, dict), undisturbed
    assert [a["cause"] for a in undisturbed["attempts"]] == [
        Cause.DISRUPTED,
        Cause.OUT_OF_MEMORY,
        Cause.SUSPENDED,
        "Succeeded",
    ]
    assert 5 < calls < MOST_CALLS
    with ThreadPoolExecutor(LIVES_AT_ONCE) as pool:
        outcomes = dict(zip(range(1, calls + 1), pool.map(life, range(1, calls + 1)), strict=True))
    different = {n: status for n, (_, status) in outcomes.items() if status != undisturbed}
    assert different == {}, f"undisturbed: {undisturbed}"


@pytest.mark.parametrize("code", [409, 429, 500, 503])
def test_burst_of_refusals_is_overcome(proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator, code: int) -> None:
    # a conflict is an answer to a write of something that is there; the others may come at any time
    def matches(call: Call) -> bool:
        return call.path.endswith("/status") if code == 409 else call.mutating

    proxy.refuse(code, 4, matches)
    own_operator(scene.namespace, proxy.kubeconfig).start()
    status = eventful_life(scene)
    assert status["attempt"] == 4
    assert proxy.refusals[0].count == 0
    assert_one_job_for_each_attempt(scene, 4)


def test_refusals_while_it_starts_are_overcome(proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator) -> None:
    proxy.refuse(500, 6)
    scene.submit()
    own_operator(scene.namespace, proxy.kubeconfig).start()
    assert scene.succeed()["phase"] == "Succeeded"


def test_operator_is_not_ready_before_it_can_list(proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator) -> None:
    proxy.refuse(503, 1_000_000, lambda call: call.path.partition("?")[0].endswith("/pods"))
    operator = own_operator(scene.namespace, proxy.kubeconfig).start()
    eventually(lambda: "cannot list pods" in operator.say("/readyz"), "readiness says what it waits for")
    assert operator.probe("/healthz") == 200
    proxy.refusals.clear()
    operator.wait_ready()
    scene.submit()
    assert scene.succeed()["attempt"] == 1


def test_deaf_operator_says_that_it_is_not_alive(proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator) -> None:
    operator = own_operator(scene.namespace, proxy.kubeconfig).start().wait_ready()
    proxy.watching = False
    proxy.cut_watches()
    scene.submit()
    eventually(lambda: operator.probe("/healthz") == 500, "the resync notices what the watches did not tell", 60)
    assert "watches missed" in operator.say("/healthz")
    proxy.watching = True
    with operator.kept_alive():
        assert scene.succeed()["attempt"] == 1
    eventually(lambda: operator.probe("/healthz") == 200, "all is well again", 60)


def test_slow_api_server_is_only_slow(proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator) -> None:
    proxy.latency = 0.3
    own_operator(scene.namespace, proxy.kubeconfig).start()
    assert eventful_life(scene)["attempt"] == 4


def test_writes_of_others_do_not_disturb(scene: Scene, own_operator: MakeOperator) -> None:
    own_operator(scene.namespace).start()
    ended = threading.Event()

    def meddle() -> None:
        count = 0
        while not ended.wait(0.03):
            count += 1
            note = {"metadata": {"annotations": {"example.com/note": str(count)}}}
            with contextlib.suppress(ApiError, OSError):
                scene.api.patch(names.PLURAL, scene.namespace, "x", note)

    thread = threading.Thread(target=meddle, daemon=True)
    thread.start()
    try:
        assert eventful_life(scene)["attempt"] == 4
    finally:
        ended.set()
        thread.join()


def test_watches_that_are_cut_again_and_again_lose_nothing(
    proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator
) -> None:
    operator = own_operator(scene.namespace, proxy.kubeconfig).start()
    ended = threading.Event()
    said: set[str] = set()

    def cut() -> None:
        while not ended.wait(0.7):
            proxy.cut_watches()
            if operator.probe("/healthz") == 500:
                said.add(operator.say("/healthz"))

    thread = threading.Thread(target=cut, daemon=True)
    thread.start()
    try:
        assert eventful_life(scene)["attempt"] == 4
    finally:
        ended.set()
        thread.join()
    assert not said, "that is no reason to be restarted"


def test_two_operators_at_once_do_no_harm(scene: Scene, own_operator: MakeOperator) -> None:
    for _ in range(2):
        own_operator(scene.namespace).start().wait_ready()
    status = eventful_life(scene)
    assert [a["number"] for a in status["attempts"]] == [1, 2, 3, 4]
    assert status["countedFailures"] == 1
    assert_one_job_for_each_attempt(scene, 4)


def test_jobs_deleted_while_they_start_leave_nothing(scene: Scene, own_operator: MakeOperator) -> None:
    operator = own_operator(scene.namespace).start().wait_ready()
    jobs = [f"d{i}" for i in range(12)]
    for i, name in enumerate(jobs):
        scene.submit(name, resources={"nodes": 2}, output={"retain": False})
        if i % 2:
            eventually(lambda name=name: scene.jobs(name), f"the Job of {name}")  # type: ignore[misc]
        scene.api.delete(names.PLURAL, scene.namespace, name)

    def left() -> list[str]:
        kinds = ("jobs", "pods", "services", "persistentvolumeclaims")
        found = [o["metadata"]["name"] for kind in kinds for o in scene.api.list(kind, scene.namespace)]
        maps = scene.api.list("configmaps", scene.namespace, names.LABEL_JOB)
        return [*found, *(m["metadata"]["name"] for m in maps)]

    eventually(lambda: not left(), "nothing is left", 60)
    scene.submit("after")
    assert scene.succeed(name="after")["attempt"] == 1
    assert operator.running


def test_operator_that_was_away_catches_up(scene: Scene, own_operator: MakeOperator) -> None:
    operator = own_operator(scene.namespace).start().wait_ready()
    scene.submit("ends")
    scene.submit("fails")
    scene.submit("goes", output={"retain": False})
    ends, fails = scene.attempt(1, "ends").run(), scene.attempt(1, "fails").run()
    scene.attempt(1, "goes").run()
    scene.phase("Running", name="ends")
    operator.kill()
    ends.exit(0, result(10))
    fails.exit(ExitCode.USER_ERROR)
    scene.api.delete(names.PLURAL, scene.namespace, "goes")
    scene.submit("comes")
    operator.start()
    scene.phase("Succeeded", name="ends")
    assert scene.phase("Failed", name="fails")["failure"]["cause"] == Cause.USER_ERROR
    assert scene.succeed(name="comes")["attempt"] == 1
    scene.gone("jobs", names.attempt_job("goes", 1))


@pytest.mark.parametrize("code", [ExitCode.PREEMPTED, 137])
def test_pod_deleted_while_the_operator_is_away_is_a_free_retry(
    scene: Scene, own_operator: MakeOperator, code: int
) -> None:
    operator = own_operator(scene.namespace).start().wait_ready()
    scene.submit(backoffLimit=0)
    pod = scene.attempt(1).run()
    scene.phase("Running")
    operator.kill()
    pod.when_stopped(code)
    scene.kubectl("delete", "pod", pod.name, "--wait=false")
    scene.gone("pods", pod.name)
    eventually(lambda: scene.jobs()[0]["status"].get("conditions"), "the Job has failed")
    operator.start()
    found = scene.succeed(attempt=2)["attempts"][0]
    assert (found["cause"], found["counted"]) == (Cause.DISRUPTED, False)


def test_user_error_of_a_pod_that_is_gone_is_known_from_the_job(scene: Scene, own_operator: MakeOperator) -> None:
    operator = own_operator(scene.namespace).start().wait_ready()
    scene.submit()
    pod = scene.attempt(1).run()
    scene.phase("Running")
    operator.kill()
    pod.exit(ExitCode.USER_ERROR)
    eventually(lambda: scene.jobs()[0]["status"].get("conditions"), "the Job has failed")
    scene.api.delete("pods", scene.namespace, pod.name, gracePeriodSeconds=0)
    scene.gone("pods", pod.name)
    operator.start()
    assert scene.phase("Failed")["failure"]["cause"] == Cause.USER_ERROR


def test_restart_writes_nothing_for_finished_jobs(proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator) -> None:
    operator = own_operator(scene.namespace, proxy.kubeconfig).start().wait_ready()
    for i in range(5):
        scene.submit(f"x{i}")
        scene.succeed(name=f"x{i}")
    eventually(lambda: all(len(scene.events(f"x{i}")) >= 2 for i in range(5)), "all events are written")
    operator.stop()
    before = len(proxy.mutations)
    operator.start().wait_ready()
    scene.submit("marker")
    scene.succeed(name="marker")
    written = [call.path for call in proxy.mutations[before:]]
    assert [p for p in written if re.search(r"/x\d", p)] == []


def test_secrets_are_never_read(proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator) -> None:
    scene.secret("hub", token="hf_do_not_tell")
    own_operator(scene.namespace, proxy.kubeconfig).start()
    reference = {"secretKeyRef": {"name": "hub", "key": "token"}}
    scene.submit(env=[{"name": "HF_TOKEN", "valueFrom": reference}])
    scene.succeed()
    assert [call.path for call in proxy.calls if "/secrets" in call.path] == []


def test_one_life_takes_few_calls(proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator) -> None:
    operator = own_operator(scene.namespace, proxy.kubeconfig).start().wait_ready()
    before = len(proxy.calls)
    scene.submit()
    pod = scene.attempt(1).run()
    scene.phase("Running")
    pod.exit(0, result(10))
    scene.phase("Succeeded")
    eventually(lambda: len(scene.events()) >= 2, "events of the start and of the end")
    calls = proxy.calls[before:]
    status_writes = [c for c in calls if c.path.partition("?")[0].endswith("/status")]
    assert len(status_writes) <= 4, [f"{c.method} {c.path}" for c in calls]
    assert [c.path for c in calls if c.method == "GET" and "x" in c.path.split("/")[-1:]] == []
    assert operator.running


def calls_within(proxy: FaultyProxy, seconds: float) -> list[str]:
    """What the operator asks in that time, but for Events and the lists of its resyncs."""
    before = len(proxy.calls)
    time.sleep(seconds)
    found = [f"{call.method} {call.path.partition('?')[0]}" for call in proxy.calls[before:]]
    return [call for call in found if not re.search(r"^GET .*/(pods|jobs|rltrainingjobs)$|/events$", call)]


def test_a_job_under_a_full_quota_asks_rarer_and_rarer(
    proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator
) -> None:
    """As shipped after 10 s, and after half of the time that it has lasted, up to 5 minutes; here all is ten times as fast."""
    own_operator(scene.namespace, proxy.kubeconfig).start().wait_ready()
    body = {"metadata": {"name": "q"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    scene.api.create("resourcequotas", scene.namespace, body)
    eventually(lambda: scene.api.get("resourcequotas", scene.namespace, "q").get("status", {}).get("used"), "its use")
    scene.submit(resources={"nodes": 2})
    scene.message("quota")
    calls = calls_within(proxy, 8)
    tries = [call for call in calls if call.startswith("POST") and call.endswith("/jobs")]
    assert 2 <= len(tries) <= 6, calls
    assert len(calls) <= 8 * (len(tries) + 1) + 4, calls  # the window may end within a try


def test_a_job_that_waits_for_many_bundles_does_not_ask_for_each(
    proxy: FaultyProxy, scene: Scene, own_operator: MakeOperator
) -> None:
    """Each look is one list by label; of what is not in it, a few are asked for by name: somebody may have made them."""
    own_operator(scene.namespace, proxy.kubeconfig).start().wait_ready()
    scene.submit(bundles=[bundle(f"b{i}", 32) for i in range(2)])
    scene.message("64 of 64 bundle parts")
    calls = calls_within(proxy, 6)
    looks = [call for call in calls if call.endswith("/configmaps")]
    assert 2 <= len(looks) <= 10, calls
    assert len(calls) <= 10 * (len(looks) + 1), calls


def test_command_as_shipped_serves_and_ends_on_sigterm(cluster: Cluster, scene: Scene, operators: Operators) -> None:
    operators.pause()
    (health,) = free_ports(1)
    command = [sys.executable, "-m", "nemo_rl_operator.main", "run", "--namespace", scene.namespace]
    command += ["--health-port", str(health), "--metrics-port", "0"]
    environment = os.environ | {"KUBECONFIG": str(cluster.kubeconfig), names.IMAGE_VARIABLE: "localhost/trainer:test"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        scene.submit()
        assert scene.succeed()["attempt"] == 1
        process.terminate()
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "Traceback" not in output
