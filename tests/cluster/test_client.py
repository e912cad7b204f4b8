"""The Python client and the command line against a real API server and operator; pods and their logs are played."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import nemo_rl
from cluster import manifests
from cluster.api import eventually
from cluster.manifests import failure, result
from cluster.operator_process import Operator
from cluster.rewards import near
from cluster.scene import Scene
from cluster.server import Cluster
from nemo_rl.backends import kubernetes as backend
from nemo_rl.backends.kubernetes import follow
from nemo_rl.backends.kubernetes.connect import connect
from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError, JobCancelled, JobNotFound
from nemo_rl.backends.kubernetes.job import Job
from nemo_rl.backends.kubernetes.naming import LABEL_DIGEST
from nemo_rl.backends.kubernetes.ship.errors import ShipError
from nemo_rl.cli import cluster_checks
from nemo_rl.cli.main import app
from nemo_rl.job import names
from nemo_rl.job.names import ExitCode

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]


@pytest.fixture
def namespace(scene: Scene, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    monkeypatch.delenv("NEMO_RL_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)
    # no kubelet is here that could serve a log; what a real one does is tested with a real one
    monkeypatch.setattr(follow.PodLogs, "open", _no_log)
    return scene.namespace


def _no_log(self: Any, pod: str, since: str | None) -> Iterator[bytes]:
    raise ApiError(404, f"pod {pod} has no log here")


def submit(namespace: str, **more: Any) -> Job:
    arguments: dict[str, Any] = {"model": "org/tiny", "dataset": ROWS, "reward_fn": near, "max_steps": 3, "gpus": 0}
    job = nemo_rl.train(**arguments | {"backend": "kubernetes", "namespace": namespace, "wait": False} | more)
    assert isinstance(job, Job)
    return job


def config_maps(scene: Scene) -> dict[str, Any]:
    found = scene.api.list("configmaps", scene.namespace, names.LABEL_BUNDLE)
    return {one["metadata"]["name"]: one for one in found}


def cli(*words: str) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def in_background(action: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(action())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, ended


# --- where


def test_the_probe_says_that_the_cluster_can_be_used(namespace: str) -> None:
    usable, reason = backend.probe(timeout=10)
    assert usable, reason
    assert "namespace default" in reason


def test_a_caller_without_rights_is_told_so(scene: Scene, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = connect(namespace)
    headers = cluster.client.update_params_for_auth
    monkeypatch.setattr(
        cluster.client,
        "update_params_for_auth",
        lambda given, *rest, **more: (given.update({"Impersonate-User": "nobody"}), headers(given, *rest, **more))[0],
    )
    from nemo_rl.backends.kubernetes.connect import require

    with pytest.raises(ClusterError, match=r"refuses you|you may not create rltrainingjobs"):
        require(cluster)


def test_a_server_that_is_not_there_is_said_at_once(
    namespace: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import yaml

    config = yaml.safe_load(cluster.kubeconfig.read_text())
    for one in config["clusters"]:
        one["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    usable, reason = backend.probe(timeout=10)
    assert not usable
    assert "does not answer" in reason
    assert cli("ps").exit_code == 1


# --- submitting


def test_a_call_becomes_a_job_that_owns_its_bundles(scene: Scene, namespace: str, operator: Operator) -> None:
    job = submit(namespace)
    resource = scene.job(job.name)
    assert job.name.startswith("grpo-tiny-")
    assert resource["metadata"]["labels"][LABEL_DIGEST]
    assert resource["spec"]["reward"]["bundle"] == "reward"
    assert resource["spec"]["dataset"]["path"] == "bundle://dataset/rows.jsonl"
    found = config_maps(scene)
    assert sorted(found) == sorted(n for b in resource["spec"]["bundles"] for n in b["configMaps"])
    for one in found.values():
        assert [o["uid"] for o in one["metadata"]["ownerReferences"]] == [resource["metadata"]["uid"]]
        assert one["immutable"] is True
    scene.attempt(1, job.name).run()
    scene.phase("Running", name=job.name)


def test_each_job_has_its_own_code_and_data_and_the_same_call_uploads_nothing(
    scene: Scene, namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who submits may make ConfigMaps only, and neither changes nor deletes any."""
    first = submit(namespace, name="first")
    before = config_maps(scene)
    second = submit(namespace, name="second", max_steps=4)
    owners = {n: [o["uid"] for o in one["metadata"]["ownerReferences"]] for n, one in config_maps(scene).items()}
    for job in (first, second):
        mine = {n for bundle in job.resource["spec"]["bundles"] for n in bundle["configMaps"]}
        assert mine and all(n.startswith(f"{job.name}-b-") for n in mine)
        assert all(owners[n] == [job.resource["metadata"]["uid"]] for n in mine)
    capsys.readouterr()
    assert submit(namespace, name="first").resource["metadata"]["uid"] == first.resource["metadata"]["uid"]
    assert "nothing was uploaded" in capsys.readouterr().out
    first.delete()
    scene.gone(names.PLURAL, "first")
    eventually(lambda: not set(before) & set(config_maps(scene)), "its ConfigMaps go with a job")
    assert len(config_maps(scene)) == len(before)


def test_a_job_of_the_name_of_one_just_deleted_waits_for_its_leftovers(scene: Scene, namespace: str) -> None:
    first = submit(namespace, name="again")
    first.delete()
    scene.gone(names.PLURAL, "again")
    second = submit(namespace, name="again")
    for one in config_maps(scene).values():
        assert [o["uid"] for o in one["metadata"]["ownerReferences"]] == [second.resource["metadata"]["uid"]]


def test_a_strangers_job_with_the_label_of_my_call_is_not_followed(scene: Scene, namespace: str) -> None:
    mine = submit(namespace)
    labels = mine.resource["metadata"]["labels"]
    mine.delete()
    scene.gone(names.PLURAL, mine.name)
    theirs = manifests.job("theirs", "sft", job_labels=labels, training={"trustRemoteCode": True})
    scene.api.create(names.PLURAL, namespace, theirs)
    assert submit(namespace).name != "theirs"


def test_the_same_call_finds_its_live_job(scene: Scene, namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = submit(namespace)
    capsys.readouterr()
    assert submit(namespace).name == first.name
    assert "found this very job" in capsys.readouterr().out
    assert len(scene.api.list(names.PLURAL, namespace)) == 1
    assert submit(namespace, max_steps=4).name != first.name


def test_the_same_call_finds_a_result_that_nobody_fetched_and_starts_anew_after_that(
    scene: Scene, namespace: str, operator: Operator
) -> None:
    first = submit(namespace)
    scene.succeed(name=first.name)
    assert submit(namespace).name == first.name
    first._mark_collected()
    again = submit(namespace)
    assert again.name == f"{first.name}-2"


def test_a_name_of_another_job_is_refused(namespace: str) -> None:
    submit(namespace, name="mine")
    with pytest.raises(ClusterError, match=r"with other content exists.*give another name"):
        submit(namespace, name="mine", max_steps=9)


def test_a_reward_that_fails_is_refused_before_a_job_is_there(scene: Scene, namespace: str) -> None:
    def broken(prompt: str, response: str) -> float:
        raise KeyError("there is no such thing")

    with pytest.raises(nemo_rl.RewardError, match="no such thing"):
        submit(namespace, reward_fn=broken)
    assert scene.api.list(names.PLURAL, namespace) == []
    assert config_maps(scene) == {}


def test_a_reward_that_learns_nothing_is_warned_about(namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    submit(namespace, reward_fn=lambda prompt, response: 0.5)
    assert "warning: the reward gave 0.5" in capsys.readouterr().out


def test_what_a_dry_run_prints_is_what_kubectl_takes(scene: Scene, namespace: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "job.yaml").write_text(
        f"apiVersion: {names.API_VERSION}\nkind: {names.KIND}\nmetadata: {{name: dry}}\nspec:\n"
        "  model: org/tiny\n  dataset: {path: ./rows.jsonl}\n  reward: {builtin: exact_match}\n"
    )
    printed = cli("train", "job.yaml", "--backend", "kubernetes", "--dry-run")
    assert printed.exit_code == 0, printed.output
    scene.kubectl("apply", "--server-side", "-f", "-", stdin=printed.stdout)
    applied = scene.job("dry")
    assert len(config_maps(scene)) == 1
    submitted = cli("train", "job.yaml", "--backend", "kubernetes", "--no-wait", "-n", namespace)
    assert submitted.exit_code == 0, submitted.output
    assert "found this very job" in submitted.output
    assert scene.job("dry")["metadata"]["uid"] == applied["metadata"]["uid"]
    assert scene.job("dry")["spec"] == applied["spec"]
    (way,) = re.findall(r"^# kubectl (delete .*)$", printed.stdout, re.MULTILINE)
    cli("rm", "dry", "-n", namespace)
    scene.gone(names.PLURAL, "dry")
    scene.kubectl(*way.split())
    assert config_maps(scene) == {}, "the command that it prints takes all away"


def test_what_travelled_is_what_was_given(scene: Scene, namespace: str) -> None:
    import gzip
    import io
    import tarfile

    job = submit(namespace)
    (bundle,) = (b for b in job.resource["spec"]["bundles"] if b["name"] == "dataset")
    parts = [config_maps(scene)[name]["binaryData"][names.BUNDLE_KEY] for name in bundle["configMaps"]]
    data = b"".join(base64.b64decode(part) for part in parts)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as archive:
        file = archive.extractfile("rows.jsonl")
        assert file is not None
        assert [json.loads(line) for line in file] == ROWS


@pytest.fixture
def info(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Publishes what an installation tells its users, in a namespace that is the test's own."""
    monkeypatch.setenv(names.SYSTEM_NAMESPACE_VARIABLE, scene.namespace)

    def publish(**data: str) -> None:
        name = {"name": names.INFO_CONFIG_MAP}
        scene.api.create("configmaps", scene.namespace, {"metadata": name, "data": data})

    return publish


def only_a_pickle_can_hold_it() -> Any:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec("def reward(prompt, response):\n    return float(len(response))", space)
    return space["reward"]


def test_a_pickle_for_another_python_than_the_images_is_refused_before_a_job_is_there(
    scene: Scene, namespace: str, info: Callable[..., None]
) -> None:
    info(trainerImage="trainer:1", trainerPython="3.99")
    with pytest.raises(ShipError, match=r"3\.99 in the image"):
        submit(namespace, reward_fn=only_a_pickle_can_hold_it())
    assert scene.api.list(names.PLURAL, namespace) == []
    assert submit(namespace).name, "what travels as source is not concerned"
    assert submit(namespace, reward_fn=only_a_pickle_can_hold_it(), image="mine:1").name, (
        "of another image nothing is known"
    )


# --- following


def test_a_failure_in_the_pod_becomes_an_error_here(scene: Scene, namespace: str, operator: Operator) -> None:
    trace = 'Traceback (most recent call last):\n  File "<cell>", line 2, in near\nKeyError: 3'
    thread, ended = in_background(lambda: submit(namespace, name="bad", wait=True))
    eventually(lambda: scene.api.find(names.PLURAL, namespace, "bad"), "the job is there")
    pod = scene.attempt(1, "bad").run()
    pod.serve({"step": 7, "totalSteps": 9, "checkpoint": {"latest": "bad/checkpoints/step-5", "latestStep": 5}})
    scene.until(lambda s: s["progress"]["step"] == 7, "progress", "bad")
    pod.exit(40, failure("KeyError: 3", exit_code=ExitCode.USER_ERROR, cause="KeyError", traceback=trace))
    thread.join(60)
    (error,) = ended
    assert isinstance(error, nemo_rl.TrainingFailed), error
    assert (error.cause, error.step) == (scene.status("bad")["failure"]["cause"], 7)
    assert error.traceback == trace
    assert error.checkpoint == "bad/checkpoints/step-5"
    assert "KeyError: 3" in str(error)
    assert any(trace in note for note in error.__notes__)


def test_phases_are_said_in_words_and_once(
    scene: Scene, namespace: str, operator: Operator, capsys: pytest.CaptureFixture[str]
) -> None:
    job = submit(namespace)
    pod = scene.attempt(1, job.name)
    thread, ended = in_background(job.follow)
    told = [capsys.readouterr().out]
    pod.unschedulable("0/8 nodes are available: 8 Insufficient nvidia.com/gpu.")
    message = scene.until(lambda s: "nvidia.com/gpu" in s.get("message", ""), "why it waits", job.name)["message"]
    eventually(lambda: told.append(capsys.readouterr().out) or message in "".join(told), "it is said here")
    pod.run()
    scene.phase("Running", name=job.name)
    pod.exit(0, result(3))
    thread.join(60)
    assert ended[0].phase == "Succeeded"
    assert ("".join(told) + capsys.readouterr().out).count(message) == 1


def test_following_goes_on_over_an_end_of_the_watch(
    scene: Scene, namespace: str, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "WATCH_SECONDS", 1)
    opened: list[str] = []
    watch = follow._watch
    monkeypatch.setattr(follow, "_watch", lambda *words: (opened.append("watch"), watch(*words))[1])
    job = submit(namespace)
    thread, ended = in_background(lambda: job.wait())
    pod = scene.attempt(1, job.name).run()
    scene.phase("Running", name=job.name)
    eventually(lambda: len(opened) > 2, "two watches have ended")
    pod.exit(0, result(3))
    thread.join(60)
    assert ended[0].phase == "Succeeded"


def test_a_job_that_is_deleted_while_it_is_followed_says_so(namespace: str) -> None:
    job = submit(namespace)
    thread, ended = in_background(lambda: job.wait())
    job.delete()
    thread.join(60)
    assert isinstance(ended[0], JobNotFound), ended


def test_without_an_operator_the_cure_is_named(
    namespace: str, own_operator: Any, scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_operator(namespace)  # stops the shared one and is not started
    monkeypatch.setattr(follow, "OPERATOR_SECONDS", 1.0)
    job = submit(namespace)
    assert job.follow(timeout=3).phase is None
    assert "is one running? kubectl get pods" in capsys.readouterr().out


def test_cancel_holds_the_job_and_resume_lets_it_go_on(scene: Scene, namespace: str, operator: Operator) -> None:
    job = submit(namespace)
    scene.attempt(1, job.name).run()
    scene.phase("Running", name=job.name)
    thread, ended = in_background(job.result)
    nemo_rl.attach(job.name, namespace=namespace).cancel()
    thread.join(60)
    assert isinstance(ended[0], JobCancelled), ended
    assert scene.phase("Suspended", name=job.name)
    job.resume()
    scene.attempt(2, job.name).run().exit(0, result(3))
    assert job.wait(60).phase == "Succeeded"
    with pytest.raises(ClusterError, match="has ended already"):
        job.cancel()


# --- finding again


def test_attach_and_jobs_find_what_is_there(namespace: str) -> None:
    submit(namespace, name="one")
    submit(namespace, name="two", max_steps=5)
    assert {job.name for job in nemo_rl.jobs(namespace=namespace)} == {"one", "two"}
    assert nemo_rl.attach("one", namespace=namespace).resource["spec"]["training"]["maxSteps"] == 3
    with pytest.raises(LookupError, match="found no job 'three'"):
        nemo_rl.attach("three", namespace=namespace)


def test_a_job_as_yaml_can_be_applied_again(scene: Scene, namespace: str) -> None:
    job = submit(namespace, name="one", secrets=["HF_TOKEN"])
    text = job.to_yaml()
    assert "secretKeyRef" in text
    before = scene.job("one")["metadata"]["generation"]
    scene.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)
    assert scene.job("one")["metadata"]["generation"] == before


# --- command line


def test_exit_codes_tell_the_state_of_a_job(scene: Scene, namespace: str, operator: Operator) -> None:
    def code(*words: str) -> int:
        return int(cli(*words, "-n", namespace).exit_code)

    assert code("status", "x") == 102
    scene.submit("x")
    scene.submit("bad")
    pod = scene.attempt(1).run()
    scene.phase("Running")
    assert code("status", "x") == 101
    assert code("wait", "x", "--timeout", "1") == 101
    assert code("cp", "x") == 101
    assert code("cancel", "x", "absent") == 102
    scene.phase("Suspended")
    assert code("status", "x") == 103
    assert code("wait", "x") == 103
    assert code("resume", "x") == 0
    scene.attempt(2).run().exit(0, result(1))
    assert code("wait", "x") == 0
    scene.attempt(1, "bad").run().exit(40, failure("no", exit_code=40))
    assert code("wait", "bad") == 100
    assert code("rm", "x", "bad") == 0
    scene.gone(names.PLURAL, "x")
    assert code("wait", "x") == 102
    assert not pod.alive


def test_ps_and_status_as_text_and_as_json(scene: Scene, namespace: str, operator: Operator) -> None:
    assert json.loads(cli("ps", "-n", namespace, "-o", "json").stdout) == []
    scene.submit("x")
    pod = scene.attempt(1).run()
    pod.serve({"step": 120, "totalSteps": 500, "metrics": {"reward": 0.61}, "secondsRemaining": 840})
    scene.until(lambda s: s["progress"]["step"] == 120, "progress")
    header, row = cli("ps", "-n", namespace).stdout.splitlines()
    assert header.split() == ["NAME", "ALGO", "MODEL", "PHASE", "STEP", "SCORE", "ETA", "AGE"]
    assert row.split()[:7] == ["x", "grpo", "tiny", "Running", "120/500", "0.61", "14m"]
    (one,) = json.loads(cli("ps", "-n", namespace, "-o", "json").stdout)
    assert (one["name"], one["step"], one["score"], one["exitCode"]) == ("x", "120/500", "0.61", 101)
    assert "no outputs" in cli("ps", "-n", namespace, "--kept").output
    status = json.loads(cli("status", "x", "-n", namespace, "-o", "json").stdout)
    assert status["status"]["progress"]["metrics"] == {"reward": "0.61"}
    assert "step 120/500 reward=0.61" in cli("status", "x", "-n", namespace).stdout
    assert cli("rm", "x", "-n", namespace).exit_code == 0
    scene.gone(names.PLURAL, "x")
    header, row = cli("ps", "-n", namespace, "--kept").stdout.splitlines()[:2]
    assert header.split() == ["CLAIM", "JOB", "SIZE", "AGE"]
    assert row.split()[:3] == ["x-output", "x", "20Gi"]
    (claim,) = json.loads(cli("ps", "-n", namespace, "--kept", "-o", "json").stdout)
    assert (claim["name"], claim["job"], claim["namespace"]) == ("x-output", "x", namespace)


def test_train_ends_with_the_code_of_a_failed_job(
    scene: Scene, namespace: str, operator: Operator, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(
        f"apiVersion: {names.API_VERSION}\nkind: {names.KIND}\nmetadata: {{name: x, namespace: {namespace}}}\nspec:\n"
        "  model: org/tiny\n  dataset: {inline: [{prompt: a, answer: b}]}\n  reward: {builtin: exact_match}\n"
    )
    thread, ended = in_background(lambda: cli("train", "job.yaml", "--backend", "kubernetes"))
    eventually(lambda: scene.api.find(names.PLURAL, namespace, "x"), "the job is there")
    scene.attempt(1).run().exit(40, failure("bad reward", exit_code=40))
    thread.join(60)
    assert ended[0].exit_code == 100
    assert "bad reward" in ended[0].output


def test_doctor_tells_the_state_of_the_cluster(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(names.SYSTEM_NAMESPACE_VARIABLE, namespace)
    found = json.loads(cli("doctor", "-n", namespace, "-o", "json").stdout)
    states = {check["subject"]: check for check in found}
    assert states["cluster"]["state"] == states["definition"]["state"] == states["rights"]["state"] == "good"
    assert states["operator"]["state"] == "bad"  # it runs, but not as a Deployment
    assert "helm install" in states["operator"]["cure"]
    assert states["versions"]["state"] == "absent"


@pytest.mark.parametrize(
    ("version", "python", "state"), [("", "", "good"), ("9.9.9", "", "bad"), ("", "3.99", "absent")], ids=str
)
def test_doctor_compares_the_versions_here_and_there(
    namespace: str, info: Callable[..., None], version: str, python: str, state: str
) -> None:
    here = importlib.metadata.version("nemo-rl")
    info(version=version or here, trainerImage="trainer:1", trainerPython=python or cluster_checks.PYTHON)
    found = json.loads(cli("doctor", "-n", namespace, "-o", "json").stdout)
    (told,) = (check for check in found if check["subject"] == "versions")
    assert told["state"] == state, told
    assert "trainer:1" in told["found"]
    assert bool(told["cure"]) == (state != "good")


def test_replicas_are_asked_for_listed_scaled_and_read(
    scene: Scene, namespace: str, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(namespace, rollout={"engine": "vllm", "replicas": 2, "gpus_per_replica": 0})
    trainer = scene.attempt(1, job.name).run()
    pods = [scene.kubelet.named(namespace, f"{names.rollout(job.name)}-{number}").run() for number in (0, 1)]
    servers = [
        {"address": f"{pods[0].address}:8000", "state": "Ready", "weightVersion": 3, "tokensPerSecond": 120},
        {"address": f"{pods[1].address}:8000", "state": "Refused", "message": "differs by 3 nats a token"},
    ]
    advice = "rollouts take 71% of a step: another rollout server would save about 24%"
    trainer.serve(
        {"step": 3, "rollout": servers, "bottleneck": {"phase": "Rollout", "share": "0.71", "advice": advice}}
    )
    scene.until(lambda s: s["rollout"]["ready"] == 1, "one is ready", job.name)
    said = cli("status", job.name, "-n", namespace).output
    assert "rollout replicas: 1 of 2 ready" in said
    assert f"{pods[0].name}: Ready, version 3, 120 tokens/s" in said
    assert f"{pods[1].name}: Refused, differs by 3 nats a token" in said
    assert f"waits for Rollout: {advice}" in said
    done = cli("scale", job.name, 3, "-n", namespace)
    assert done.exit_code == 0 and "gets 3 rollout replicas" in done.output
    scene.kubelet.named(namespace, f"{names.rollout(job.name)}-2")
    read: list[str] = []

    def log(self: Any, pod: str) -> Iterator[bytes]:
        read.append(pod)
        yield b"2026-11-29T05:00:00Z starting the vLLM server\n"

    monkeypatch.setattr(follow.PodLogs, "read_now", log)
    assert cli("logs", job.name, "--role", "rollout-1", "-n", namespace).output == "starting the vLLM server\n"
    assert read == [pods[1].name]
    assert "--role trainers is none" in cli("logs", job.name, "--role", "trainers", "-n", namespace).output
    scene.submit("plain")
    refused = cli("scale", "plain", 2, "-n", namespace)
    assert refused.exit_code == 1 and "has no rollout replicas" in refused.output
