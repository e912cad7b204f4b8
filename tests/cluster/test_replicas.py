"""Rollout replicas on a real API server: the resource's rules, the objects of a job, its status, scaling, and a run from end to end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.api import ApiError, Object, eventually
from cluster.kubelet import PlayedPod, answer
from cluster.manifests import result
from cluster.operator_process import ROLLOUT_IMAGE
from cluster.scene import Scene
from nemo_rl.job import names
from unit.rollout.fake import TOKEN, FakeServer

pytestmark = pytest.mark.usefixtures("operator")
ROLLOUT: dict[str, Any] = {"engine": "vllm", "replicas": 2, "gpusPerReplica": 0}


def replica(scene: Scene, number: int) -> PlayedPod:
    return scene.kubelet.named(scene.namespace, f"x-rollout-{number}")


def members(status: Object) -> dict[str, str]:
    return {member["name"]: member["state"] for member in status.get("rollout", {}).get("members", [])}


def told(*pods: PlayedPod, step: int = 5, state: str = "Ready", **more: Any) -> Object:
    servers = [{"address": f"{pod.address}:8000", "state": state, "weightVersion": step, **more} for pod in pods]
    return {"step": step, "totalSteps": 10, "rollout": servers}


# --- the resource


@pytest.mark.parametrize(
    ("rollout", "says"),
    [
        ({"engine": "vllm"}, "engine vllm needs one of python, urls and replicas"),
        ({"engine": "vllm", "replicas": 2, "urls": ["http://a:1"]}, "give exactly one of them"),
        ({"engine": "in_process", "replicas": 2}, "replicas are vLLM servers, but engine is in_process"),
        ({"engine": "vllm", "replicas": 0}, "should be greater than or equal to 1"),
        ({"engine": "vllm", "replicas": 2, "weightTransfer": "files"}, "replicas share no folder with the trainer"),
        ({"engine": "vllm", "urls": ["http://a:1"], "image": "i:1"}, "image and gpusPerReplica belong to replicas"),
    ],
)
def test_what_cannot_be_is_refused_in_words(scene: Scene, rollout: Object, says: str) -> None:
    with pytest.raises(ApiError) as refused:
        scene.submit(rollout=rollout)
    assert says in refused.value.message


def test_replicas_change_while_the_job_runs_and_nothing_else_of_the_rollout_does(scene: Scene) -> None:
    scene.submit(rollout=ROLLOUT)
    scene.change(rollout={"replicas": 3})
    for change, says in (
        ({"gpusPerReplica": 2}, "spec.rollout.gpusPerReplica cannot change after creation"),
        (
            {"replicas": None, "gpusPerReplica": 1, "urls": ["http://a:1"]},
            "spec.rollout.replicas may change, but neither come nor go",
        ),
    ):
        with pytest.raises(ApiError) as refused:
            scene.change(rollout=change)
        assert says in refused.value.message
    scene.submit("plain")
    said = scene.kubectl("scale", "rlj/plain", "--replicas=2", check=False)
    assert "replicas are vLLM servers, but engine is in_process" in said and "evaluating rule" not in said
    assert "rollout" not in scene.job("plain")["spec"]


# --- the operator


def test_replicas_come_with_the_first_attempt_stay_over_attempts_and_go_with_the_job(scene: Scene) -> None:
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    scene.api.patch("namespaces", None, scene.namespace, {"metadata": {"labels": labels}})
    scene.submit(rollout=ROLLOUT)
    trainer = scene.attempt(1).run()
    first, second = replica(scene, 0).run(), replica(scene, 1)
    pod = first.object
    assert pod["spec"]["containers"][0]["image"] == ROLLOUT_IMAGE
    assert pod["spec"]["automountServiceAccountToken"] is False
    uid = scene.job()["metadata"]["uid"]
    secret = scene.api.get("secrets", scene.namespace, names.run_secret("x", uid))
    assert set(secret["data"]) == {"token", "rollout"} and secret["data"]["token"] != secret["data"]["rollout"]
    service = scene.api.get("services", scene.namespace, "x-rollout")["spec"]
    assert service["clusterIP"] == "None" and service["selector"].items() <= pod["metadata"]["labels"].items()
    trainer.serve(told(first, tokensPerSecond=12))
    status = scene.until(lambda s: members(s) == {"x-rollout-0": "Ready", "x-rollout-1": "Pending"}, "one is ready")
    assert status["rollout"]["members"][0]["tokensPerSecond"] == 12
    assert "1 of 2 rollout replicas are ready" in status["message"]
    wide = scene.kubectl("get", "rlj", "x", "-o", "wide")
    assert "1/2" in wide.splitlines()[1] and "REPLICAS" in wide and "WAITS-FOR" in wide
    second.run()
    trainer.serve(told(first, second, step=6))
    scene.until(lambda s: s["rollout"]["ready"] == 2, "both are ready")
    before = {number: replica(scene, number).uid for number in (0, 1)}
    trainer.exit(137, reason="OOMKilled")
    scene.until(lambda s: s["attempts"][0].get("cause") == "OutOfMemory", "the attempt has ended")
    again = scene.attempt(2).run()
    assert {number: replica(scene, number).uid for number in (0, 1)} == before, "only the trainer was started anew"
    again.exit(0, result(10))
    scene.phase("Succeeded")
    scene.gone("statefulsets", "x-rollout")
    for number in (0, 1):
        scene.gone("pods", f"x-rollout-{number}")
    assert "rollout" not in scene.status()


def test_scale_is_kubectls_and_suspension_frees_all_pods(scene: Scene) -> None:
    scene.submit(rollout={**ROLLOUT, "replicas": 1})
    trainer = scene.attempt(1).run()
    pods = [replica(scene, 0).run()]
    scene.kubectl("scale", "rlj/x", "--replicas=3")
    pods += [replica(scene, number).run() for number in (1, 2)]
    trainer.serve(told(*pods))
    scene.until(lambda s: s["rollout"]["ready"] == 3, "three are ready")
    scale = json.loads(scene.kubectl("get", "--raw", f"{job_path(scene)}/scale"))
    assert (scale["spec"]["replicas"], scale["status"]["replicas"]) == (3, 3)
    assert names.LABEL_JOB_UID in scale["status"]["selector"]
    scene.kubectl("scale", "rlj/x", "--replicas=1")
    for number in (1, 2):
        scene.gone("pods", f"x-rollout-{number}")
    scene.until(lambda s: list(members(s)) == ["x-rollout-0"], "one is left")
    assert scene.status()["attempt"] == 1 and trainer.alive, "the trainer goes on"
    scene.change(suspend=True)
    scene.phase("Suspended")
    assert not scene.api.list("pods", scene.namespace, names.LABEL_JOB)
    scene.change(suspend=False)
    scene.attempt(2).run()
    replica(scene, 0)


def job_path(scene: Scene) -> str:
    return f"/apis/{names.API_VERSION}/namespaces/{scene.namespace}/{names.PLURAL}/x"


def test_what_was_lost_and_refused_is_an_event_and_no_end(scene: Scene) -> None:
    scene.submit(rollout=ROLLOUT)
    trainer = scene.attempt(1).run()
    first, second = (replica(scene, number).run() for number in (0, 1))
    trainer.serve(told(first, second))
    scene.until(lambda s: s["rollout"]["ready"] == 2, "both are ready")
    servers = [
        {"address": f"{first.address}:8000", "state": "Refused", "message": "differs by 3 nats a token"},
        *told(second)["rollout"],
    ]
    trainer.serve({"step": 6, "rollout": servers})
    scene.until(lambda s: members(s)["x-rollout-0"] == "Refused", "one is refused")
    scene.api.delete("pods", scene.namespace, "x-rollout-1")
    eventually(lambda: replica(scene, 1).uid != second.uid, "the pod is made anew")

    def reasons() -> set[str]:
        return {event["reason"] for event in scene.events()}

    eventually(lambda: {"ReplicaRefused", "ReplicaLost"} <= reasons(), "the Events")
    (refused,) = [event for event in scene.events() if event["reason"] == "ReplicaRefused"]
    assert "x-rollout-0 is refused and gets no requests: differs by 3 nats a token" in refused["message"]
    status = scene.status()
    assert (status["phase"], status["attempt"]) == ("Running", 1)


def test_with_no_right_replica_left_the_job_fails_without_a_retry(scene: Scene) -> None:
    scene.submit(rollout=ROLLOUT)
    word = {
        "kind": "failure",
        "exitCode": 40,
        "cause": "WeightSyncMismatch",
        "message": "no rollout server has version 3",
    }
    scene.attempt(1).run().exit(40, word)
    status = scene.phase("Failed")
    assert (status["failure"]["cause"], status["attempt"]) == ("WeightSyncMismatch", 1)
    scene.gone("statefulsets", "x-rollout")


def test_the_quota_that_a_replica_waits_for_is_said(scene: Scene) -> None:
    scene.submit(rollout=ROLLOUT)
    scene.attempt(1).run()
    _, lost = (replica(scene, number) for number in (0, 1))
    quota = {"metadata": {"name": "pods"}, "spec": {"hard": {"count/pods": "1"}}}
    scene.api.create("resourcequotas", scene.namespace, quota)
    eventually(
        lambda: scene.api.get("resourcequotas", scene.namespace, "pods").get("status", {}).get("used"),
        "the quota counts",
    )
    scene.api.delete("pods", scene.namespace, lost.name)

    def waits(status: Object) -> bool:
        return any("waiting for quota pods" in member.get("message", "") for member in status["rollout"]["members"])

    scene.until(waits, "a replica that waits for quota", seconds=120)


# --- from end to end: a real trainer, rollout servers as the test plays them, and the operator between


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a trainer as the frozen job says, in a folder that stands for its pod."""
    started: list[subprocess.Popen[bytes]] = []

    def start(scene: Scene, addresses: str) -> subprocess.Popen[bytes]:
        frozen = scene.api.get("configmaps", scene.namespace, names.frozen_job("x"))["data"][names.JOB_KEY]
        for folder in (names.JOB_DIR, names.OUTPUT_DIR, "/dev"):
            (tmp_path / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        (tmp_path / names.JOB_FILE.lstrip("/")).write_text(frozen)
        (tmp_path / names.TERMINATION_LOG.lstrip("/")).write_bytes(b"")
        environment = {**os.environ, "NEMO_RL_POD_ROOT": str(tmp_path), "NEMO_RL_POD_PORT": "0", "HF_HUB_OFFLINE": "1"}
        environment |= {names.ROLLOUT_ADDRESSES_VARIABLE: addresses, "NEMO_RL_ROLLOUT_TOKEN": TOKEN}
        log = (tmp_path / "log").open("wb")
        command = [sys.executable, "-m", names.WORKER_MODULE]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        log.close()
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.timeout(600)
def test_a_run_from_end_to_end(scene: Scene, worker: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    from unit.trainers.conftest import write_model

    example = yaml.safe_load((Path(__file__).parents[2] / "examples/grpo_replicas.yaml").read_text())["spec"]
    assert example["rollout"]["replicas"] == 2
    scene.submit(
        model=write_model(tmp_path / "model"),
        dataset={"inline": [{"prompt": f"{i}=", "answer": "4"} for i in range(10, 22)]},
        reward={"builtin": None, **example["reward"]},
        training={**example["training"], "maxSteps": 12, "saveEvery": 4},
        grpo={**example["grpo"], "numGenerationsPerPrompt": 4, "maxNewTokens": 6},
        # the tokens are the played servers', not the model's: only what is far off is taken for other weights
        rollout={**example["rollout"], "gpusPerReplica": 0, "mismatchLimit": 10, "timeoutSeconds": 300},
    )
    trainer = scene.attempt(1).run()
    pods = [replica(scene, number).run() for number in (0, 1)]
    servers = [FakeServer(tokens=15, host=pod.address, port=names.ROLLOUT_PORT, replica=True) for pod in pods]
    held = servers[0]
    try:
        held.hold.clear()  # until the test has seen what it is to see
        process = worker(scene, ",".join(server.address for server in servers))
        log = tmp_path / "log"
        port = int(
            eventually(
                lambda: next(
                    (line.rpartition(b" ")[2] for line in log.read_bytes().splitlines() if b"on port" in line), 0
                ),
                "the trainer serves its progress",
                300,
            )
        )

        def relay(handler: Any) -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=10) as found:
                answer(handler, found.read())

        trainer.serve(relay)
        scene.until(lambda s: s["rollout"]["members"][0]["state"] == "Loading", "what the trainer says", seconds=300)
        servers[1].tampered = True
        held.hold.set()
        wanted = {"x-rollout-0": "Ready", "x-rollout-1": "Refused"}
        scene.until(lambda s: members(s) == wanted, "one is ready and one refused", seconds=300)
        assert process.wait(300) == 0, log.read_text()[-3000:]
        history = [json.loads(line) for line in (tmp_path / "output/x/metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in history] == list(range(1, 13))
        assert len(held.updates) == 12 or len(held.updates) == 13
        assert len(servers[1].completed) <= 8 * len(servers[1].updates), "it was asked for the probe alone"
        trainer.exit(0, (tmp_path / names.TERMINATION_LOG.lstrip("/")).read_text())
        status = scene.phase("Succeeded")
        assert status["result"]["totalSteps"] == 12
        assert status["bottleneck"]["phase"] in ("Rollout", "Reward", "Training", "WeightSync", "Data")
        assert "ReplicaRefused" in {event["reason"] for event in scene.events()}
    finally:
        for server in servers:
            server.close()
