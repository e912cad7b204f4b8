"""Who reaches whom in real pods, on a node that enforces NetworkPolicies: the operator's, and the one of each job.

Beside what this node cannot show: traffic between a pod and the node that it runs on, where the lab's API server is, is
always allowed (so the documentation of NetworkPolicies); a trainer that tries to reach an API server elsewhere is in the
same place as one that tries a private address.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from e2e.kubectl import Kubectl, Object, eventually
from e2e.operator_pod import OperatorPod
from e2e.release import shared_values
from e2e.scene import SECONDS, Scene, TrainingJob
from enforced.conftest import LISTEN, METADATA, OUTSIDE, PRIVATE
from lab.deploy import SCRAPES
from lab.settings import DNS_IP
from nemo_rl.job import names

pytestmark = pytest.mark.usefixtures("enforced")
CONNECT_SECONDS = 4
PLAIN_PORT = 8000
"""Where pods listen that are only there to be reached."""
# every address at once: those that a policy forbids answer nothing until the time is over
CONNECT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def reached(target):
    try:
        socket.create_connection((target[0], int(target[1])), timeout=float(sys.argv[2])).close()
        return True
    except ConnectionRefusedError:
        return True  # it got there, and nobody listens
    except OSError:
        return False
targets = json.loads(sys.argv[1])
with ThreadPoolExecutor(len(targets)) as pool:
    print(json.dumps(list(pool.map(reached, targets))))
"""
DETACH = """
import subprocess, sys
none = subprocess.DEVNULL
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdin=none, stdout=none, stderr=none, start_new_session=True)
"""
"""Starts a Python of its own, which outlives the command."""
Target = tuple[str, int]


@dataclass
class Place:
    """The pods of the matrix by name, with their namespace, and their addresses."""

    pods: dict[str, tuple[Kubectl, str]] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    guarded: TrainingJob | None = None

    def add(self, name: str, kubectl: Kubectl, pod: Object) -> None:
        self.pods[name] = kubectl, pod["metadata"]["name"]
        self.addresses[name] = pod["status"]["podIP"]

    def execute(self, source: str, *command: str) -> str:
        kubectl, pod = self.pods[source]
        return kubectl("exec", pod, "--", *command)

    def reaches(self, source: str, targets: list[tuple[str, int]]) -> dict[tuple[str, int], bool]:
        """By name (or address) and port: whether a connection from within this pod gets there."""
        asked = json.dumps([(self.addresses.get(name, name), port) for name, port in targets])
        answers = json.loads(self.execute(source, "python", "-c", CONNECT, asked, str(CONNECT_SECONDS)))
        return dict(zip(targets, answers, strict=True))

    def listen(self, source: str, *ports: int) -> None:
        """Makes a pod listen on these ports, until it ends."""
        self.execute(source, "python", "-c", DETACH, LISTEN, *map(str, ports))


def running(pod: Object) -> Object | None:
    return pod if pod["status"]["phase"] == "Running" and pod["status"].get("podIP") else None


def plain_pod(name: str, labels: Object, ports: tuple[int, ...]) -> Object:
    """A pod that is no trainer and listens."""
    image = shared_values()["trainerImage"]
    container = {
        "name": "main",
        "image": f"{image['repository']}:{image['tag']}",
        "command": ["python", "-c", LISTEN, *map(str, ports)],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


@pytest.fixture(scope="module")
def place(enforced: None, new_scene: Callable[[str], Scene], operator: OperatorPod) -> Place:
    made = Place()
    team, elsewhere, monitoring = (new_scene(word) for word in ("team", "elsewhere", "monitoring"))
    Kubectl()("label", "namespace", monitoring.namespace, *(f"{key}={value}" for key, value in SCRAPES.items()))
    later = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    manifest = team.manifests.grpo("guarded", steps=100_000, pause=0.1, resources={"nodes": 2})
    manifest["spec"]["output"]["serveUntil"] = later
    made.guarded = team.apply(manifest)
    other = team.apply(team.manifests.grpo("other", steps=100_000, pause=0.1))
    pods = {name: made.guarded.pod(index) for index, name in enumerate(("trainer", "second"))}
    ports = (PLAIN_PORT, names.TRAINER_PORT)
    copied = {k: v for k, v in pods["trainer"]["metadata"]["labels"].items() if k.startswith(names.GROUP)}
    # by what policies know the operator; not by all of its labels, or these tests would take it for the operator
    known = ("app.kubernetes.io/name", "app.kubernetes.io/instance")
    imposter = copied | {key: operator.wait_ready()["metadata"]["labels"][key] for key in known}
    plain = {
        "neighbour": (team, plain_pod("neighbour", {"app": "web"}, ports)),
        "stranger": (elsewhere, plain_pod("stranger", {"app": "web"}, ports)),
        "imposter": (elsewhere, plain_pod("imposter", imposter, ports)),
        "scraper": (monitoring, plain_pod("scraper", {"app": "prometheus"}, ports)),
    }
    for scene, pod in plain.values():
        scene.kubectl.apply(pod)
    for name, (scene, _) in plain.items():
        scene.kubectl("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={SECONDS:.0f}s", seconds=SECONDS + 10)
        made.add(name, scene.kubectl, scene.kubectl.json("pod", name))
    for name, job, index in (("trainer", made.guarded, 0), ("second", made.guarded, 1), ("other", other, 0)):
        made.add(name, team.kubectl, eventually(lambda j=job, i=index: running(j.pod(i)), f"{name} runs", SECONDS))  # type: ignore[misc]
    files = names.files_pod("guarded")
    team.kubectl("wait", "--for=condition=Ready", f"pod/{files}", f"--timeout={SECONDS:.0f}s", seconds=SECONDS + 10)
    made.add("files", team.kubectl, team.kubectl.json("pod", files))
    made.add("operator", operator.kubectl, operator.wait_ready())
    # its server listens on its own loopback, out of everybody's reach: another port shows what the policy does
    made.listen("files", PLAIN_PORT)
    made.listen("other", PLAIN_PORT)
    made.listen("trainer", PLAIN_PORT)
    return made


PROGRESS, RENDEZVOUS, METRICS, PROBES = names.TRAINER_PORT, names.RENDEZVOUS_PORT, 9090, 8080
TO_TRAINER: list[Target] = [("trainer", PROGRESS), ("trainer", RENDEZVOUS), ("trainer", PLAIN_PORT)]
TO_FILES: list[Target] = [("files", PLAIN_PORT)]
TO_METRICS: list[Target] = [("operator", METRICS)]
TO_PLAIN: list[Target] = [(n, port) for n in ("neighbour", "stranger") for port in (PLAIN_PORT, PROGRESS)]
TO_OUTSIDE: list[Target] = [(a, port) for a in (OUTSIDE, PRIVATE, METADATA) for port in (80, 443)]
TO_DNS: list[Target] = [(DNS_IP, 53)]
EVERYWHERE = [*TO_TRAINER, *TO_FILES, *TO_METRICS, ("operator", PROBES), *TO_PLAIN, *TO_OUTSIDE, *TO_DNS]
EVERYWHERE += [("other", PROGRESS), ("other", PLAIN_PORT)]

# pod → where it gets; everywhere else of EVERYWHERE it does not
FREE = {*TO_PLAIN, *TO_OUTSIDE, *TO_DNS, ("operator", PROBES)}
"""What a pod reaches that no policy selects: all that no policy guards, and the operator's probes."""
OF_TRAINER = {*TO_DNS, (OUTSIDE, 443)}
MATRIX: dict[str, set[Target]] = {
    "neighbour": FREE,
    "stranger": FREE,
    "imposter": FREE,
    "scraper": FREE | {("trainer", PROGRESS), ("other", PROGRESS), *TO_METRICS},
    "trainer": OF_TRAINER | {*TO_TRAINER, *TO_FILES},
    "second": OF_TRAINER | {*TO_TRAINER, *TO_FILES},
    "files": OF_TRAINER | {*TO_TRAINER, *TO_FILES},
    "other": OF_TRAINER | {("other", PROGRESS), ("other", PLAIN_PORT)},
    "operator": {("trainer", PROGRESS), ("other", PROGRESS), *TO_DNS, (OUTSIDE, 443), *TO_METRICS, ("operator", PROBES)}
    | {(PRIVATE, 443), (METADATA, 443)},
}


def test_each_pod_reaches_what_it_must_and_nothing_else(place: Place) -> None:
    wanted = {source: {target: target in reached for target in EVERYWHERE} for source, reached in MATRIX.items()}
    wrong: list[str] = []

    def found() -> dict[str, dict[Target, bool]]:
        with ThreadPoolExecutor(len(MATRIX)) as pool:
            return dict(zip(MATRIX, pool.map(lambda source: place.reaches(source, EVERYWHERE), MATRIX), strict=True))

    def as_wanted() -> bool:
        seen = found()
        wrong[:] = [
            f"{source} {'reaches' if seen[source][target] else 'does not reach'} {target[0]}:{target[1]}"
            for source, targets in wanted.items()
            for target, open_ in targets.items()
            if seen[source][target] != open_
        ]
        return not wrong

    # a connection may be late on a busy machine; that a policy holds is no matter of time
    try:
        eventually(as_wanted, "the matrix", SECONDS)
    except AssertionError as error:
        raise AssertionError("; ".join(wrong)) from error
    assert as_wanted(), "; ".join(wrong)


def test_names_are_resolved_and_the_job_goes_on(place: Place) -> None:
    """What a job needs of the network: names of its pods, its ranks' own connections, and the operator's reading of its progress."""
    lookup = "import socket; print(socket.gethostbyname('kubernetes.default.svc.cluster.local'))"
    assert place.execute("trainer", "python", "-c", lookup).strip().startswith("10.")
    job = place.guarded
    assert job is not None
    job.reached(2)
    assert len(job.status["attempts"]) == 1
    assert "cannot be read" not in job.status["message"]


def test_it_is_the_policy_that_keeps_strangers_away(place: Place) -> None:
    """Policies add up: with one more, the stranger gets in at that port, and without it he does not any more."""
    assert place.guarded is not None
    kubectl, port = place.guarded.kubectl, names.RENDEZVOUS_PORT
    target = ("trainer", port)
    rule = {"from": [{"namespaceSelector": {}}], "ports": [{"port": port, "protocol": "TCP"}]}
    spec = {
        "podSelector": {"matchLabels": {names.LABEL_JOB: "guarded"}},
        "policyTypes": ["Ingress"],
        "ingress": [rule],
    }
    kubectl.apply(
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "opened"}, "spec": spec}
    )
    eventually(lambda: place.reaches("stranger", [target])[target], "the stranger gets in where he is let", SECONDS)
    kubectl("delete", "networkpolicy", "opened")
    eventually(lambda: not place.reaches("stranger", [target])[target], "and only as long as he is", SECONDS)
