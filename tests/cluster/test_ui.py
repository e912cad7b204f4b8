"""The jobs of a cluster as the source of `nemo-rl ui`: what a viewer may see, and with how little asking."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.api import eventually
from cluster.operator_process import Operators
from cluster.pod_logs import log_node
from cluster.scene import Scene
from cluster.server import Cluster as Served
from nemo_rl.backends.kubernetes.connect import Cluster, connect, connect_with_token
from nemo_rl.job import names
from nemo_rl.ui import cluster as page
from nemo_rl.ui.cluster import Jobs
from nemo_rl.ui.listing import Details, Listing, SourceError


class Watched(Cluster):
    """A connection that remembers what it was asked."""

    lists: list[str]
    watches = 0

    def stream(self, path: str, **options: Any) -> Any:
        self.watches += 1
        return super().stream(path, **options)

    def request(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        self.lists = [*getattr(self, "lists", []), path]
        assert method == "GET", "the page changes nothing"
        return super().request(method, path, body, **options)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch, operators: Operators) -> None:
    """No waits, and no operator that writes other statuses than the tests do."""
    operators.pause()
    monkeypatch.setattr(page, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(page, "ANSWER_SECONDS", 60.0)


@pytest.fixture
def own(cluster: Served, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The connection of the administrator's kubeconfig, in the scene's namespace."""
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    found = connect(scene.namespace)
    return Watched(found.client, found.context, found.namespace)


def source(own: Cluster, scene: Scene) -> Jobs:
    return Jobs(lambda token: own, namespace=scene.namespace, title="test")


def told(scene: Scene, name: str, **status: Any) -> None:
    """Writes a status, as the operator does."""
    scene.api.patch(names.PLURAL, scene.namespace, name, {"status": {"observedGeneration": 1} | status}, "status")


def until(jobs: Jobs, check: Callable[[Listing], Any], what: str, token: str = "") -> Listing:
    def look() -> Listing | None:
        listing = jobs.list(token, None)
        return listing if check(listing) else None

    return eventually(look, what)


def test_the_list_is_read_once_and_then_only_what_changed(scene: Scene, own: Watched) -> None:
    scene.submit("one")
    scene.submit("two", algorithm="sft")
    jobs = source(own, scene)
    found = {row.name: row for row in jobs.list("", None).rows}
    assert set(found) == {"one", "two"}
    assert (found["one"].phase, found["two"].algorithm) == ("Pending", "sft")
    assert "No operator has taken note of it yet" in (found["one"].message or "")
    progress = {"step": 12, "totalSteps": 50, "text": "12/50", "percent": 24, "eta": "3m", "metrics": {"reward": "0.5"}}
    told(scene, "one", phase="Running", progress=progress)
    told(scene, "two", phase="Pending", reason="Unschedulable", message="0/3 nodes are available: 3 Insufficient cpu.")
    scene.submit("three")
    until(jobs, lambda listing: len(listing.rows) == 3, "a new job is listed")
    listing = until(jobs, lambda listing: any(row.phase == "Running" for row in listing.rows), "a change is seen")
    one = next(row for row in listing.rows if row.name == "one")
    assert (one.step, one.total_steps, one.percent, one.eta, one.score) == (12, 50, 24, "3m", "0.5")
    why = until(jobs, lambda seen: any(row.reason == "Unschedulable" for row in seen.rows), "why it is pending")
    assert "Insufficient cpu" in str(next(row.message for row in why.rows if row.name == "two"))
    scene.api.delete(names.PLURAL, scene.namespace, "three")
    until(jobs, lambda seen: {row.name for row in seen.rows} == {"one", "two"}, "a deleted job goes")
    assert own.watches >= 3
    assert len(own.lists) < own.watches  # one, unless the server forgot meanwhile what we had seen


def test_a_list_that_the_server_has_forgotten_is_read_anew(scene: Scene, own: Watched) -> None:
    scene.submit("one")
    jobs = source(own, scene)
    assert len(jobs.list("", None).rows) == 1
    [known] = jobs._lists.values()
    known._version = "1"  # older than anything that the server still knows
    scene.submit("two")
    until(jobs, lambda listing: len(listing.rows) == 2, "all jobs are there")


def test_an_api_server_that_is_away_leaves_what_was_there_and_is_tried_again(scene: Scene, own: Watched) -> None:
    scene.submit("one")
    jobs = source(own, scene)
    assert jobs.list("", None).problem is None
    address = own.client.configuration.host
    own.client.configuration.host = "https://127.0.0.1:1"
    listing = jobs.list("", None)
    assert listing.problem is not None
    assert listing.problem.kind == "unreachable"
    assert [row.name for row in listing.rows] == ["one"]
    assert listing.stale_since
    own.client.configuration.host = address
    until(jobs, lambda seen: seen.problem is None and len(seen.rows) == 1, "the list is renewed")


def test_a_viewer_sees_what_his_own_token_may_see(cluster: Served, scene: Scene, tmp_path: Path) -> None:
    scene.submit("one")
    scene.kubectl("create", "serviceaccount", "viewer")
    token = scene.kubectl("create", "token", "viewer").strip()
    authority, server = _authority(cluster, tmp_path)
    jobs = Jobs(lambda given: connect_with_token(given, server, authority), namespace=scene.namespace, title="test")
    refused = jobs.list(token, None)
    assert refused.rows == []
    assert refused.problem is not None
    assert refused.problem.kind == "forbidden"
    for words in (scene.namespace, "nemo-rl-view", "system:serviceaccount"):
        assert words in refused.problem.text
    with pytest.raises(SourceError) as error:
        jobs.details(token, f"{scene.namespace}/one")
    assert error.value.problem.kind == "forbidden"
    stranger = jobs.list("nobody.knows.me", None)
    assert stranger.problem is not None
    assert stranger.problem.kind == "sign-in"
    rules = [
        "--verb=get,list",
        "--resource=rltrainingjobs.nemo-rl.io",
    ]  # without watch: then the list is read each time
    scene.kubectl("create", "role", "look", *rules)
    scene.kubectl("create", "rolebinding", "look", "--role=look", f"--serviceaccount={scene.namespace}:viewer")
    until(jobs, lambda seen: [row.name for row in seen.rows] == ["one"], "the role holds", token)
    scene.submit("two")
    until(jobs, lambda seen: len(seen.rows) == 2, "without watch too", token)
    seen = jobs.details(token, f"{scene.namespace}/one")
    assert any("may not read the logs" in note for note in seen.notes)
    scene.kubectl("delete", "rolebinding", "look")
    until(
        jobs, lambda seen: seen.problem is not None and seen.rows == [], "what he may not see any more is gone", token
    )


def _authority(cluster: Served, folder: Path) -> tuple[Path, str]:
    import base64

    content = yaml.safe_load(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
    path = folder / "authority.crt"
    if "certificate-authority-data" in content:
        path.write_bytes(base64.b64decode(content["certificate-authority-data"]))
    else:
        path.write_bytes(Path(content["certificate-authority"]).read_bytes())
    return path, content["server"]


def seen(jobs: Jobs, key: str, check: Callable[[Details], bool]) -> Details:
    return eventually(lambda: found if check(found := jobs.details("", key)) else None, "what the log says is shown")


def test_curves_samples_and_log_come_from_the_pods_and_only_once(scene: Scene, own: Watched, tmp_path: Path) -> None:
    uid = scene.submit("one")["metadata"]["uid"]
    labels = {names.LABEL_JOB_UID: uid, names.LABEL_COMPONENT: names.COMPONENT_TRAINER}
    with log_node(scene.api, f"node-{scene.namespace}"[:60].rstrip("-"), tmp_path / "node") as node:
        node.pod(scene.namespace, "one-1-0-a", labels | {names.LABEL_ATTEMPT: "1"}, "Failed")
        node.write(
            "one-1-0-a", "begins", "step=1/50 reward=0.1", "step=2/50 reward=0.2", "step=3/50 reward=0.9", second=1
        )
        jobs = source(own, scene)
        key = f"{scene.namespace}/one"
        seen(jobs, key, lambda found: found.curves["steps"] == [1, 2, 3])
        # the second attempt goes on from the checkpoint of step 1
        node.pod(scene.namespace, "one-2-0-b", labels | {names.LABEL_ATTEMPT: "2"})
        evil = 'sample step=2 reward=0.5 prompt="<b>hi</b>" completion="<script>1</script>"'
        node.write("one-2-0-b", "goes on", "step=2/50 reward=0.3", evil, second=5)
        second = seen(jobs, key, lambda found: found.curves["steps"] == [1, 2])
        assert second.curves["metrics"]["reward"] == [0.1, 0.3]
        assert second.samples == [{"step": 2, "reward": 0.5, "prompt": "<b>hi</b>", "completion": "<script>1</script>"}]
        node.write("one-2-0-b", "step=3/50 reward=0.4", "\x1b[31mred\x1b[0m", second=5)
        third = seen(jobs, key, lambda found: found.curves["steps"] == [1, 2, 3])
        assert third.log is not None
        assert [line for line in third.log if not line.startswith("—")] == [
            *("begins", "step=1/50 reward=0.1", "step=2/50 reward=0.2", "step=3/50 reward=0.9"),
            *("goes on", "step=2/50 reward=0.3", "step=3/50 reward=0.4", "red"),
        ]
        assert "tailLines" in node.asked[0]
        assert "sinceTime" in node.asked[-1]


def test_a_job_that_is_gone_or_was_never_there_is_said(scene: Scene, own: Watched) -> None:
    scene.submit("one")
    jobs = source(own, scene)
    assert jobs.details("", f"{scene.namespace}/one").row.name == "one"
    scene.api.delete(names.PLURAL, scene.namespace, "one")
    scene.gone(names.PLURAL, "one")
    for key in (f"{scene.namespace}/one", f"{scene.namespace}/../../secrets", "x", "kube-system/a/b"):
        with pytest.raises(SourceError) as error:
            jobs.details("", key)
        assert error.value.problem.kind == "absent"


def test_details_hold_attempts_causes_traceback_and_replicas(scene: Scene) -> None:
    job = copy.deepcopy(scene.submit("one"))
    job["status"] = {
        "phase": "Failed",
        "attempts": [
            {"number": 1, "job": "one-1", "cause": "OutOfMemory", "counted": True, "message": "killed", "toStep": 7}
        ],
        "failure": {"cause": "UserError", "traceback": "Traceback\nValueError: <b>"},
        "rollout": {
            "replicas": 2,
            "ready": 1,
            "weightVersion": 6,
            "members": [
                {"name": "one-rollout-1", "state": "Refused", "message": "mismatch", "tokensPerSecond": 120},
                "x",
            ],
        },
        "bottleneck": {"phase": "Rollout", "share": "0.71", "advice": "Add a replica."},
        "gpuSeconds": 7200,
    }
    found = page.details_of(job).dump()
    assert found["attempts"][0]["cause"] == "OutOfMemory"
    assert found["attempts"][0]["to_step"] == 7
    assert found["traceback"].endswith("ValueError: <b>")
    assert found["replicas"]["members"] == [
        {"name": "one-rollout-1", "state": "Refused", "tokensPerSecond": "120", "message": "mismatch"}
    ]
    assert found["bottleneck"]["advice"] == "Add a replica."
    assert ("GPU hours", "2.0") in found["facts"]
    for broken in ({"rollout": [], "bottleneck": 5}, {"rollout": {"members": "x"}}, {"attempts": "none"}):
        page.details_of({**job, "status": broken}).dump()
