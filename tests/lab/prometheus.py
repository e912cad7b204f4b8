"""Prometheus beside a control plane: it finds its targets by the API server, as the monitors of a chart describe them.

In a cluster the Prometheus operator writes its configuration from ServiceMonitors and PodMonitors; here `scrape_configs`
does, for what those of the chart use, by the rules of the operator's documentation.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from lab import programs
from lab.control_plane import ControlPlane
from lab.settings import LabError
from ports import free_ports

Object = dict[str, Any]
START_SECONDS = 90
META = "__meta_kubernetes"


def ensure() -> None:
    """Compiles Prometheus and promtool, where they are missing."""
    programs.ensure(("prometheus", "promtool"))


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The ended process."""
    ensure()
    command = [str(programs.path("promtool")), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


class Prometheus:
    """A server with these monitors and these PrometheusRules, which scrapes by a proxy. `query` and `api` ask it.

    The proxy (an address of HTTP) stands for the pods' network, which there is not without nodes.
    """

    def __init__(
        self, plane: ControlPlane, folder: Path, monitors: list[Object], rules: list[Object], *, proxy: str
    ) -> None:
        self.plane, self.folder = plane, folder
        (self.port,) = free_ports(1)
        jobs = [config for monitor in monitors for config in scrape_configs(monitor, plane.kubeconfig)]
        settings: Object = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "scrape_configs": [job | {"proxy_url": proxy} for job in jobs],
            "rule_files": [str(folder / f"rules-{number}.json") for number, _ in enumerate(rules)],
        }
        for path, rule in zip(settings["rule_files"], rules, strict=True):
            Path(path).write_text(json.dumps(rule["spec"]))
        (folder / "prometheus.json").write_text(json.dumps(settings, indent=1))

    def start(self) -> Prometheus:
        ensure()
        self.plane.commands["prometheus"] = [
            str(programs.path("prometheus")),
            f"--config.file={self.folder}/prometheus.json",
            f"--storage.tsdb.path={self.folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        self.plane.launch("prometheus")
        limit = time.monotonic() + START_SECONDS
        while not self._ready():
            process = self.plane.processes["prometheus"]
            if process.poll() is not None or time.monotonic() > limit:
                tail = (self.plane.logs / "prometheus.log").read_text(errors="replace")[-2000:]
                raise LabError(f"Prometheus is not ready: {tail}")
            time.sleep(0.1)
        return self

    def stop(self) -> None:
        self.plane.kill("prometheus")

    def api(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of /api/v1/<path>."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[Object]:
        """The series of an instant query."""
        return list(self.api("query", query=expression)["result"])

    def targets(self) -> list[Object]:
        return list(self.api("targets", state="active")["activeTargets"])

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def scrape_configs(monitor: Object, kubeconfig: Path) -> list[Object]:
    """What the Prometheus operator makes of a ServiceMonitor or PodMonitor: one job for each endpoint."""
    spec, meta = monitor["spec"], monitor["metadata"]
    of_pods = monitor["kind"] == "PodMonitor"
    role = "pod" if of_pods else "endpointslice"
    chosen = spec.get("namespaceSelector", {})
    discovery: Object = {"role": role, "kubeconfig_file": str(kubeconfig)}
    if not chosen.get("any"):
        discovery["namespaces"] = {"names": chosen.get("matchNames") or [meta["namespace"]]}
    found = []
    for number, endpoint in enumerate(spec["podMetricsEndpoints" if of_pods else "endpoints"]):
        labelled = "pod" if of_pods else "service"
        port = "pod_container_port_name" if of_pods else "endpointslice_port_name"
        relabel = [
            keep(f"{META}_{labelled}_label_{sanitized(name)}", value)
            for name, value in spec["selector"]["matchLabels"].items()
        ]
        relabel.append(keep(f"{META}_{port}", endpoint["port"]))
        if of_pods:
            relabel.append(keep(f"{META}_pod_phase", "Failed|Succeeded", action="drop"))
        relabel += [
            copied(f"{META}_{name}", label) for label, name in COPIED.items() if not of_pods or label != "service"
        ]
        relabel += [
            copied(f"{META}_pod_label_{sanitized(name)}", sanitized(name)) for name in spec.get("podTargetLabels", ())
        ]
        relabel.append({"target_label": "endpoint", "replacement": endpoint["port"]})
        found.append(
            {
                "job_name": f"{monitor['kind']}/{meta['namespace']}/{meta['name']}/{number}",
                "metrics_path": endpoint.get("path", "/metrics"),
                "scrape_interval": endpoint["interval"],
                "scrape_timeout": endpoint["interval"],
                "kubernetes_sd_configs": [discovery],
                "relabel_configs": relabel,
            }
        )
    return found


COPIED = {"namespace": "namespace", "pod": "pod_name", "container": "pod_container_name", "service": "service_name"}
"""Label that the Prometheus operator gives to each target → what the discovery says."""


def keep(source: str, value: str, action: str = "keep") -> Object:
    return {"action": action, "source_labels": [source], "regex": value}


def copied(source: str, target: str) -> Object:
    return {"source_labels": [source], "target_label": target, "regex": "(.+)"}


def sanitized(name: str) -> str:
    """A label's name as Prometheus can hold it."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)
