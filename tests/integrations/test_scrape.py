"""Prometheus scrapes the operator and trainers where the chart's monitors say, and every panel of the dashboard has data.

Real are Prometheus, the API server and its controllers of Deployments and Services, the operator, and the trainers' processes,
which train and hold at a step. Pods are played, and their network is a proxy: what is asked at a pod's address and port is
answered by those processes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from charts import CHART, render
from cluster.api import Object, eventually
from cluster.kubelet import NODE, Kubelet, PlayedPod
from cluster.operator_process import Operator, Operators
from cluster.scene import Scene
from cluster.server import Cluster
from lab.prometheus import Prometheus
from lab.settings import LabError
from nemo_rl.job import names
from unit.worker.conftest import engine, tiny_model
from unit.worker.pods import Engine, Pod
from unit.worker.test_attempts import PROMPTS, TEXTS, grpo, sft

__all__ = ["engine", "tiny_model"]
pytestmark = pytest.mark.timeout(900)  # the first test waits until both trainers have begun
SECONDS = 120.0
OPERATOR_PORT = 9090
HELD_AT, HOLD_SECONDS = 3, 1800
VALUES = {
    "crds": {"enabled": False},
    "metrics": {
        "serviceMonitor": {"enabled": True, "interval": "3s"},
        "podMonitor": {"enabled": True, "interval": "3s"},
        "rules": {"enabled": True},
    },
}
CONTROLLERS = "deployment-controller,replicaset-controller,endpointslice-controller"


class Network:
    """The pods' network as an HTTP proxy: what is asked at a pod's address and port is answered by a process of this machine."""

    def __init__(self) -> None:
        self.ports: dict[str, Callable[[], int]] = {}
        """Address and port of a pod → port of the process here."""
        network = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = urlsplit(self.path)
                with contextlib.suppress(OSError):
                    network.answer(self, asked.netloc, asked.path)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler, where: str, path: str) -> None:
        code, kind, body = 502, "text/plain", b"nobody is there"
        with contextlib.suppress(OSError, http.client.HTTPException, KeyError):
            found = http.client.HTTPConnection("127.0.0.1", self.ports[where](), timeout=10)
            found.request("GET", path)
            response = found.getresponse()
            code, kind, body = response.status, response.headers["Content-Type"], response.read()
            found.close()
        handler.send_response(code)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Scraped:
    """All that runs: `grpo` of two pods, and `sft`, both trainers of which hold at a step; `done` has succeeded."""

    scene: Scene
    operator: Operator
    prometheus: Prometheus

    def value(self, expression: str) -> float:
        (found,) = self.prometheus.query(expression)
        return float(found["value"][1])


@pytest.fixture(scope="module")
def scraped(
    cluster: Cluster,
    new_scene: Callable[[str], Scene],
    kubelet: Kubelet,
    operators: Operators,
    engine: Engine,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scraped]:
    plane = cluster.plane
    if plane is None:
        raise LabError("Prometheus runs beside a control plane of the tests' own; unset NEMO_RL_TEST_KUBECONFIG")
    with contextlib.ExitStack() as ending:
        scene = new_scene("scraped")
        ending.callback(scene.close)
        plane.commands["deployments"] = [
            f"--controllers={CONTROLLERS}" if word.startswith("--controllers=") else word
            for word in plane.commands["kube-controller-manager"]
        ]
        plane.launch("deployments")
        ending.callback(plane.kill, "deployments")
        # the pods' node: a pod on a node that is not there is in no EndpointSlice
        cluster.api.create("nodes", None, {"metadata": {"name": NODE}})
        ending.callback(cluster.api.delete, "nodes", None, NODE)
        objects = render(VALUES | {"watchNamespaces": [scene.namespace]}, namespace=scene.namespace)
        deployed = [o for o in objects if o["kind"] in ("ServiceAccount", "Deployment", "Service")]
        cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(deployed))
        monitors = [o for o in objects if o["kind"] in ("ServiceMonitor", "PodMonitor")]
        rules = [o for o in objects if o["kind"] == "PrometheusRule"]
        assert len(monitors) == 2
        network = Network()
        ending.callback(network.close)
        folder = tmp_path_factory.mktemp("prometheus")
        prometheus = Prometheus(plane, folder, monitors, rules, proxy=network.url).start()
        ending.callback(prometheus.stop)

        operator = operators.make(scene.namespace).start().wait_ready()
        ending.callback(operators.end)
        pod = played(scene, kubelet, "app.kubernetes.io/component", "operator")
        pod.address = "198.18.0.1"  # the API server takes no EndpointSlice of loopback addresses
        network.ports[f"{pod.address}:{OPERATOR_PORT}"] = lambda: operator.metrics_port
        pod.run()

        validated: Object = {"evalEvery": 1, "saveEvery": 1, "maxSteps": 100, "maxEpochs": 100}
        settings = grpo(tiny_model, **validated) | {"validationDataset": {"inline": PROMPTS[:2]}}
        settings["grpo"] |= {"beta": 0.01}
        trainers = {"grpo": settings}
        settings = sft(tiny_model) | {"validationDataset": {"inline": TEXTS[:2]}}
        settings["callbacks"] = trainers["grpo"]["callbacks"]
        settings["training"] |= validated
        trainers["sft"] = settings
        scene.submit("grpo", resources={"nodes": 2})
        scene.submit("sft", algorithm="sft")
        scene.attempt(1, "grpo", 1).run()
        for name, spec in trainers.items():
            process = Pod(tmp_path_factory.mktemp(name), engine, spec).start(
                HOLD_AT=str(HELD_AT), HOLD_SECONDS=str(HOLD_SECONDS)
            )
            ending.callback(process.end)
            ending.callback(process.stop, 9)
            process.wait_at_gate()
            trainer = scene.attempt(1, name)
            network.ports[f"{trainer.address}:{names.TRAINER_PORT}"] = process.port
            trainer.serve(lambda handler, where=trainer.address: network.answer(handler, f"{where}:8080", handler.path))  # type: ignore[misc]
            trainer.run()
        scene.submit("done")
        scene.succeed(name="done")
        yield Scraped(scene, operator, prometheus)


def played(scene: Scene, kubelet: Kubelet, label: str, value: str) -> PlayedPod:
    """A pod that is no attempt's, by its label."""

    def name() -> str | None:
        found = scene.api.list("pods", scene.namespace, f"{label}={value}")
        return str(found[0]["metadata"]["name"]) if found else None

    return kubelet.named(scene.namespace, eventually(name, f"a pod with {label}={value}"))


def up(scraped: Scraped) -> dict[str, str]:
    """Targets: pod → health."""
    return {t["labels"].get("pod", ""): t["health"] for t in scraped.prometheus.targets()}


def test_the_monitors_lead_to_the_operator_and_to_the_first_pod_of_each_job(scraped: Scraped) -> None:
    pods = scraped.scene.api.list("pods", scraped.scene.namespace)
    by_name = {pod["metadata"]["name"]: pod["metadata"]["labels"] for pod in pods}
    wanted = {
        name
        for name, labels in by_name.items()
        if labels.get("app.kubernetes.io/component") == "operator"
        or (
            labels.get(names.LABEL_JOB) in ("grpo", "sft") and labels["batch.kubernetes.io/job-completion-index"] == "0"
        )
    }
    assert len(wanted) == 3 and len(by_name) > 3
    try:
        eventually(lambda: up(scraped) == dict.fromkeys(wanted, "up"), f"exactly {wanted} are scraped", SECONDS)
    except AssertionError as error:
        raise AssertionError(
            f"{error}; the targets are {json.dumps(scraped.prometheus.targets(), indent=1)}"
        ) from error


def test_series_carry_the_jobs_name_and_what_the_trainer_says(scraped: Scraped) -> None:
    for name in ("grpo", "sft"):
        where = f'{{namespace="{scraped.scene.namespace}",nemo_rl_io_job="{name}",nemo_rl_io_algorithm="{name}"}}'
        eventually(lambda w=where: scraped.prometheus.query(f"nemo_rl_train_step{w}"), f"series of {name}", SECONDS)  # type: ignore[misc]
        assert scraped.value(f"nemo_rl_train_step{where}") == HELD_AT
        assert scraped.value(f"nemo_rl_train_total_steps{where}") == 100
    ended = 'nemo_rl_operator_attempts_ended_total{cause="Succeeded"}'
    eventually(lambda: scraped.value(ended) == 1, "the attempt that ended", SECONDS)
    assert scraped.value('nemo_rl_operator_jobs{phase="Succeeded"}') == 1
    assert scraped.value('nemo_rl_operator_jobs{phase="Running"}') == 2


def panels() -> list[tuple[str, str]]:
    board = json.loads((CHART / "files/dashboard.json").read_text())
    return [(panel["title"], t["expr"]) for panel in board["panels"] for t in panel.get("targets", [])]


@pytest.mark.parametrize(("title", "expression"), panels())
def test_every_query_of_the_dashboard_returns_data(scraped: Scraped, title: str, expression: str) -> None:
    """At least one number; a rate has one when Prometheus has scraped twice."""
    asked = expression.replace("$namespace", scraped.scene.namespace).replace("$job", "grpo|sft|done")

    def numbers() -> list[float]:
        values = [float(series["value"][1]) for series in scraped.prometheus.query(asked)]
        return [value for value in values if math.isfinite(value)]

    eventually(numbers, f"{title}: {asked} returns data", SECONDS)


def test_the_variables_of_the_dashboard_have_the_jobs(scraped: Scraped) -> None:
    board = json.loads((CHART / "files/dashboard.json").read_text())
    found: dict[str, Any] = {}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            series, _, label = variable["definition"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
            asked = {"match[]": series.replace("$namespace", scraped.scene.namespace)}
            found[variable["name"]] = scraped.prometheus.api(f"label/{label}/values", **asked)
    assert found == {"namespace": [scraped.scene.namespace], "job": ["grpo", "sft"]}


def alerts(prometheus: Prometheus) -> dict[str, str]:
    return {alert["labels"]["alertname"]: alert["state"] for alert in prometheus.api("alerts")["alerts"]}


def test_the_rules_are_evaluated_and_wait_for_an_operator_that_is_killed(scraped: Scraped) -> None:
    """Last, because it ends the operator. Only the first minute of the alert is seen here; test_alerts has the others."""
    eventually(lambda: not alerts(scraped.prometheus), "no alert of healthy jobs", SECONDS)
    (group,) = scraped.prometheus.api("rules")["groups"]
    assert len(group["rules"]) == 6
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    scraped.operator.kill()
    eventually(lambda: alerts(scraped.prometheus) == {"NemoRLOperatorDown": "pending"}, "its absence is seen", SECONDS)
