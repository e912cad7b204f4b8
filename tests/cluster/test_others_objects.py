"""What others write, run and forbid in the same cluster stops neither the operator nor a job."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.api import ApiError, Object, eventually, path
from cluster.kubelet import answer
from cluster.manifests import bundle, failure, job, result
from cluster.operator_process import Operator
from cluster.scene import Scene
from cluster.server import Cluster
from lab import pki
from nemo_rl.backends.kubernetes import outputs
from nemo_rl.backends.kubernetes.connect import connect
from nemo_rl.backends.kubernetes.errors import ClusterError
from nemo_rl.job import names

OwnOperator = Callable[..., Operator]
ADMISSION = "/apis/admissionregistration.k8s.io/v1/"


def deep(name: str, depth: int, where: str) -> str:
    """A manifest with a field that is nested so deep."""
    field = {"affinity": {"a": "@@"}} if where == "affinity" else {where: {"inline": [{"prompt": "p", "x": "@@"}]}}
    return json.dumps(job(name, **field)).replace('"@@"', "[" * depth + "1" + "]" * depth)


@pytest.mark.parametrize("where", ["dataset", "validationDataset", "affinity"])
@pytest.mark.parametrize("depth", [150, 1500])
def test_deeply_nested_fields_stop_nobody_else(scene: Scene, own_operator: OwnOperator, where: str, depth: int) -> None:
    operator = own_operator(scene.namespace).start().wait_ready()
    scene.submit("other")
    other = scene.attempt(1, "other").run()
    scene.phase("Running", name="other")
    said = scene.kubectl("create", "--validate=false", "-f", "-", stdin=deep("deep", depth, where), check=False)
    taken = "created" in said
    if taken:
        status = scene.until(lambda s: s.get("phase"), "a status of its own", "deep")
        assert (status["phase"], status["reason"]) == ("Failed", "InvalidSpec")
        assert "nested more than 32 levels" in status["message"]
    other.exit(0, result())
    scene.phase("Succeeded", name="other")
    assert operator.probe("/healthz") == 200
    operator.stop()
    operator.start().wait_ready()
    scene.submit("later")
    assert scene.succeed(name="later")["phase"] == "Succeeded"


@pytest.fixture
def deny(scene: Scene, cluster: Cluster) -> Iterator[Callable[[str, str | None], Callable[[], None]]]:
    """A function that lets a policy of somebody else deny creations in the scene's namespace; it gives back another that
    lifts it."""
    ended: list[Callable[[], None]] = []
    word = scene.namespace

    def on(plural: str, group: str | None = None) -> Callable[[], None]:
        rules = [{"apiGroups": [group or ""], "apiVersions": ["*"], "operations": ["CREATE"], "resources": [plural]}]
        selector = {"matchLabels": {"kubernetes.io/metadata.name": word}}
        spec = {
            "validations": [{"expression": "false", "message": "image verification timed out"}],
            "matchConstraints": {"namespaceSelector": selector, "resourceRules": rules},
        }
        binding = {"policyName": word, "validationActions": ["Deny"]}
        for kind, content in (("Policy", spec), ("PolicyBinding", binding)):
            body = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": f"ValidatingAdmission{kind}"}
            where = ADMISSION + f"validatingadmission{'policies' if kind == 'Policy' else 'policybindings'}"
            cluster.api.request("POST", where, body | {"metadata": {"name": word}, "spec": content})
        eventually(lambda: denied(plural), "the policy is in force")
        ended.append(off)
        return off

    def denied(plural: str) -> bool:
        pod = {"restartPolicy": "Never", "containers": [{"name": "a", "image": "a"}]}
        body: Object = {"metadata": {"generateName": "probe-"}}
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        specs: Object = {"jobs": {"template": {"spec": pod}}, "pods": pod, "persistentvolumeclaims": claim}
        body |= {"spec": specs[plural]} if plural in specs else {}
        try:
            cluster.api.request("POST", path(plural, word) + "?dryRun=All", body)
        except ApiError as error:
            return "image verification" in str(error)
        return False

    def off() -> None:
        for plural in ("validatingadmissionpolicybindings", "validatingadmissionpolicies"):
            with contextlib.suppress(ApiError):
                cluster.api.request("DELETE", f"{ADMISSION}{plural}/{word}")

    yield on
    for each in ended:
        each()


@pytest.mark.parametrize(
    ("plural", "group"), [("jobs", "batch"), ("configmaps", None), ("persistentvolumeclaims", None)]
)
def test_a_denied_first_attempt_waits_and_says_why(
    scene: Scene, operator: Operator, deny: Any, plural: str, group: str | None
) -> None:
    off = deny(plural, group)
    scene.submit(backoffLimit=0)
    status = scene.message("image verification timed out", seconds=15)
    assert status["phase"] == "Pending"
    assert scene.condition("Blocked")["status"] == "True"
    off()
    scene.attempt(1).run()
    scene.phase("Running")
    scene.until(lambda s: scene.condition("Blocked").get("status") == "False", "no longer blocked")


def test_a_denied_later_attempt_waits(scene: Scene, operator: Operator, deny: Any) -> None:
    scene.submit(backoffLimit=0)
    first = scene.attempt(1).run()
    scene.phase("Running")
    off = deny("jobs", "batch")
    first.evict()
    assert scene.message("image verification timed out", seconds=15)["phase"] == "Pending"
    off()
    assert scene.succeed(attempt=2)["phase"] == "Succeeded"


@contextlib.contextmanager
def webhook(scene: Scene, cluster: Cluster, client: Object) -> Iterator[None]:
    """With a webhook of somebody else for the Jobs of the scene's namespace; `client` says how it is reached."""
    selector = {"matchLabels": {"kubernetes.io/metadata.name": scene.namespace}}
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    hook = {
        **{"name": "mjob.example.org", "failurePolicy": "Fail", "sideEffects": "None", "timeoutSeconds": 1},
        **{"admissionReviewVersions": ["v1"], "namespaceSelector": selector, "rules": [rule]},
        "clientConfig": client,
    }
    where = ADMISSION + "mutatingwebhookconfigurations"
    body = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration"}
    cluster.api.request("POST", where, body | {"metadata": {"name": scene.namespace}, "webhooks": [hook]})
    try:
        yield
    finally:
        cluster.api.request("DELETE", f"{where}/{scene.namespace}")


def test_a_webhook_that_is_down_is_said(scene: Scene, operator: Operator, cluster: Cluster) -> None:
    with webhook(scene, cluster, {"url": "https://127.0.0.1:1/"}):
        time.sleep(1)
        scene.submit(backoffLimit=0)
        assert scene.message("failed calling webhook", "mjob.example.org", seconds=15)["phase"] == "Pending"
    scene.attempt(1).run()
    scene.phase("Running")


class Denies(BaseHTTPRequestHandler):
    """A webhook that denies without a code, as those do whose own look-up failed."""

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = {"message": "verify-images: registry timeout"}
        response = {"uid": review["request"]["uid"], "allowed": False, "status": status}
        answer(self, json.dumps({k: review[k] for k in ("apiVersion", "kind")} | {"response": response}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def denying(cluster: Cluster, tmp_path: Path) -> Iterator[Object]:
    """How a webhook that denies is reached."""
    if cluster.plane is None:
        pytest.skip("the API server is somebody else's and may not reach this machine")
    pki.Authority(tmp_path).certificate("hook", "/CN=hook", "serverAuth", ["IP:127.0.0.1"])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "hook.crt", tmp_path / "hook.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Denies) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        authority = base64.b64encode((tmp_path / "ca.crt").read_bytes()).decode()
        yield {"url": f"https://127.0.0.1:{server.server_port}/", "caBundle": authority}
        server.shutdown()


def test_a_webhook_that_denies_without_a_code_ends_no_job(
    scene: Scene, operator: Operator, cluster: Cluster, denying: Object
) -> None:
    """The API server makes 400 of that, as of what is wrong in an object itself."""

    def refused() -> bool:
        spec = {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "a"}]}}}
        body = {"metadata": {"generateName": "probe-"}, "spec": spec}
        try:
            scene.api.request("POST", path("jobs", scene.namespace) + "?dryRun=All", body)
        except ApiError as error:
            return error.code == 400 and "registry timeout" in error.message
        return False

    scene.submit("old", backoffLimit=0)
    first = scene.attempt(1, "old").run()
    scene.phase("Running", name="old")
    with webhook(scene, cluster, denying):
        eventually(refused, "the webhook is in force")
        first.evict()
        scene.submit("new", backoffLimit=0)
        for name in ("old", "new"):
            assert scene.message("registry timeout", name=name, seconds=15)["phase"] == "Pending"
    assert scene.succeed(attempt=2, name="old")["phase"] == "Succeeded"
    assert scene.succeed(name="new")["phase"] == "Succeeded"


def test_a_file_server_that_is_refused_is_said(scene: Scene, operator: Operator, deny: Any) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    scene.phase("Running")
    off = deny("pods")
    scene.change(output={"serveUntil": "2100-01-01T00:00:00Z"})
    scene.until(lambda s: "image verification" in scene.condition("OutputServed").get("message", ""), "said")
    pod.exit(0, result())
    scene.phase("Succeeded")
    off()
    eventually(lambda: scene.api.find("pods", scene.namespace, names.files_pod("x")), "the file server", 20)


def test_the_client_says_why_no_file_server_comes_and_does_not_wait_for_long(
    scene: Scene, operator: Operator, deny: Any, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    monkeypatch.setattr(outputs, "REFUSED_SECONDS", 2.0)
    scene.submit()
    scene.succeed()
    off = deny("pods")
    with (
        pytest.raises(
            ClusterError, match=r"does not run after \d s \(.*image verification timed out.*stays where it is"
        ),
        outputs.file_server(connect(scene.namespace), "x"),
    ):
        pass
    off()


UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EVIL = "red \x1b[31malert\x1b[0m \x07 bell\r\n\u202eevil, no text \ud800, a zero \x00"


def test_no_escape_codes_of_a_pod_reach_status_events_or_log(scene: Scene, operator: Operator) -> None:
    scene.submit(backoffLimit=0)
    scene.attempt(1).run().exit(1, failure("@").replace('"@"', json.dumps(EVIL + "\n2026-01-01 INFO forged")))
    status = scene.phase("Failed")
    assert not UNFIT.search(json.dumps(status, ensure_ascii=False)), status
    eventually(lambda: len(scene.events()) >= 2, "Events")
    assert not [e["message"] for e in scene.events() if UNFIT.search(e["message"])]
    assert not UNFIT.search(operator.log.read_text())
    assert not [line for line in operator.log.read_text().splitlines() if line.startswith("2026-01-01 INFO forged")]


@pytest.mark.parametrize(
    "lie",
    [
        {"time": "yesterday"},
        {"time": "2026-02-30T25:61:00Z"},
        {"totalSteps": "many"},
        {"percent": 1e300},
        {"secondsRemaining": "soon"},
        {"checkpoint": {"latest": "../../etc/passwd", "latestStep": "x"}},
        {"metrics": {"\x1b[2J\u202e": "\x07", "a": 10**400}},
        {"epoch": [[[]]]},
    ],
)
def test_no_progress_keeps_a_job_from_its_end(scene: Scene, operator: Operator, lie: Object) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    pod.serve({"step": 3} | lie)
    scene.until(lambda s: s["progress"]["step"] == 3, "the step is told")
    pod.exit(0, json.dumps({"kind": "result", "totalSteps": 10} | {k: v for k, v in lie.items() if k != "totalSteps"}))
    status = scene.phase("Succeeded")
    assert status["result"]["totalSteps"] == 10
    assert ".." not in json.dumps(status.get("checkpoint", {}))


def test_a_result_with_a_text_for_a_number_is_a_result(scene: Scene, operator: Operator) -> None:
    scene.submit()
    scene.attempt(1).run().exit(0, '{"kind":"result","totalSteps":"all of them"}')
    assert scene.phase("Succeeded")


def test_progress_that_cannot_be_read_is_said(scene: Scene, operator: Operator) -> None:
    scene.submit()
    pod = scene.attempt(1).run()
    scene.message("its progress cannot be read", "NetworkPolicy", seconds=20)
    pod.serve({"step": 1})
    scene.until(lambda s: s["progress"]["step"] == 1 and "cannot be read" not in s["message"], "read again")
    pod.exit(0, result())
    scene.phase("Succeeded")


def test_objects_of_others_with_our_label_make_nobody_ill(scene: Scene, own_operator: OwnOperator) -> None:
    operator = own_operator(scene.namespace, **{"NEMO_RL_OPERATOR_RESYNC_SECONDS": "1"}).start().wait_ready()
    spec = {"restartPolicy": "Never", "containers": [{"name": "a", "image": "a"}]}
    for number, value in enumerate(["", "x", "nobody"]):
        meta = {"name": f"innocent-{number}", "labels": {names.LABEL_JOB: value}}
        scene.api.create("pods", scene.namespace, {"metadata": meta, "spec": spec})
        scene.api.create("jobs", scene.namespace, {"metadata": meta, "spec": {"template": {"spec": spec}}})
    limit = time.monotonic() + 8
    while time.monotonic() < limit:
        assert operator.probe("/healthz") == 200, operator.say("/healthz")
        time.sleep(0.2)


def test_bundle_parts_without_the_label_are_found(scene: Scene, operator: Operator) -> None:
    scene.submit(bundles=[bundle("code", 3)])
    scene.message("3 of 3 bundle parts")
    for number, labels in enumerate(({names.LABEL_BUNDLE: "0" * 16}, {}, {"other": "x"})):
        meta = {"name": f"code-part-{number}", "labels": labels}
        scene.api.create("configmaps", scene.namespace, {"metadata": meta, "binaryData": {"part": "AA=="}})
    scene.attempt(1)
