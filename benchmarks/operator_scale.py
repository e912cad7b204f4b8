"""Times and costs of the operator: N jobs at once, pods played by a stub, beside the floor of the same run.

    python benchmarks/operator_scale.py [--jobs 10 300 1000] [--rounds 1] [--kubeconfig FILE] [--json FILE]

The floor is what the cluster needs without any operator: the same Jobs, created directly. For each number of jobs the
floor runs first, then the operator, on the same API server; what is compared is the ratio. All times are taken where a
user stands, by watches of this process. Without --kubeconfig a control plane is started for the benchmark (see
tests/lab). Pods run as soon as they are made and succeed five seconds later. The thresholds at the end are the goals of
the project; the exit code is 1 if one is missed. (The file is not called operator.py: beside it, that would hide the
standard library's.)
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import os
import re
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "operator"), str(ROOT / "tests")]

from nemo_rl.job import names  # noqa: E402
from nemo_rl.job.spec import RLTrainingJobSpec  # noqa: E402
from nemo_rl.job.status import TerminationMessage  # noqa: E402

POD_SECONDS = 5.0
AT_ONCE = 64
IMAGE = "localhost/trainer:bench"
JOB = {
    "model": "org/model",
    "algorithm": "sft",
    "dataset": {"name": "org/rows"},
    "output": {"claim": "shared"},
    "resources": {"gpusPerNode": 0},
}
KINDS = ("writes", "events", "reads", "refused")
WORD = TerminationMessage(kind="result", total_steps=100, metrics={"loss": 0.5}).encode()
Object = dict[str, Any]


# --- the API server


class Server:
    """Calls and watches with the credentials of a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        found = yaml.safe_load(kubeconfig.read_text())
        cluster, user = found["clusters"][0]["cluster"], found["users"][0]["user"]
        self.url = cluster["server"]
        self.tls = ssl.create_default_context(cadata=_data(cluster, "certificate-authority").decode())
        if "token" in user:
            self.headers = {"Authorization": f"Bearer {user['token']}"}
        else:
            self.headers = {}
            with tempfile.NamedTemporaryFile() as both:
                both.write(_data(user, "client-certificate") + b"\n" + _data(user, "client-key"))
                both.flush()
                self.tls.load_cert_chain(both.name)

    async def __aenter__(self) -> Server:
        connector = aiohttp.TCPConnector(ssl=self.tls, limit=AT_ONCE + 8)
        timeout = aiohttp.ClientTimeout(total=None)
        self.session = aiohttp.ClientSession(connector=connector, headers=self.headers, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def call(self, verb: str, path: str, body: Object | None = None) -> Object:
        kind = "application/merge-patch+json" if verb == "PATCH" else "application/json"
        data = json.dumps(body) if body is not None else None
        while True:
            async with self.session.request(verb, self.url + path, data=data, headers={"Content-Type": kind}) as answer:
                found: Object = await answer.json(content_type=None)
                if answer.status == 429:
                    await asyncio.sleep(0.5)
                    continue
                if answer.status >= 300 and answer.status not in (404, 409):
                    raise RuntimeError(f"{verb} {path}: {answer.status} {found.get('message')}")
                return found

    async def watch(self, path: str) -> AsyncIterator[Object]:
        """Every event, from a list on; for ever."""
        listed = await self.call("GET", path)
        for item in listed["items"]:
            yield {"type": "ADDED", "object": item}
        version = listed["metadata"]["resourceVersion"]
        while True:
            where = f"{self.url}{path}?watch=1&allowWatchBookmarks=1&resourceVersion={version}"
            async with self.session.get(where) as stream:
                buffer = b""
                async for chunk in stream.content.iter_any():
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        event: Object = json.loads(line)
                        version = event["object"]["metadata"]["resourceVersion"]
                        if event["type"] != "BOOKMARK":
                            yield event


def _data(section: Object, name: str) -> bytes:
    if f"{name}-data" in section:
        return base64.b64decode(section[f"{name}-data"])
    return Path(section[name]).read_bytes()


# --- the kubelet's part, in a process of its own


async def play_pods(kubeconfig: Path) -> None:
    """Every pod runs at once and succeeds after POD_SECONDS."""
    tasks: set[asyncio.Task[None]] = set()

    async def live(server: Server, pod: Object) -> None:
        meta = pod["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/status"
        common = {"name": names.TRAINER_CONTAINER, "image": IMAGE, "imageID": "", "restartCount": 0}
        states: list[tuple[str, Object]] = [
            ("Running", {"running": {"startedAt": _now()}}),
            (
                "Succeeded",
                {"terminated": {"exitCode": 0, "reason": "Completed", "message": WORD, "finishedAt": _now()}},
            ),
        ]
        for phase, state in states:
            statuses = [{**common, "ready": phase == "Running", "state": state}]
            await server.call("PATCH", path, {"status": {"phase": phase, "containerStatuses": statuses}})
            await asyncio.sleep(POD_SECONDS)

    seen = set()
    async with Server(kubeconfig) as server:
        async for event in server.watch("/api/v1/pods"):
            uid = event["object"]["metadata"]["uid"]
            if event["type"] == "ADDED" and uid not in seen and not event["object"]["status"].get("containerStatuses"):
                seen.add(uid)
                task = asyncio.create_task(live(server, event["object"]))
                tasks.add(task)
                task.add_done_callback(tasks.discard)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# --- what is seen


@dataclass
class Times:
    """When this process saw what, by job; seconds of one clock."""

    posted: dict[str, float] = field(default_factory=dict)
    job: dict[str, float] = field(default_factory=dict)
    pod: dict[str, float] = field(default_factory=dict)
    pod_running: dict[str, float] = field(default_factory=dict)
    pod_ended: dict[str, float] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)


def _first(times: dict[str, float], name: str) -> None:
    times.setdefault(name, time.monotonic())


@asynccontextmanager
async def watching(server: Server, namespace: str, resource: bool) -> AsyncIterator[Times]:
    """Notes the times of everything in the namespace. Without an operator, a Job's own status counts."""
    times = Times()

    def see_job(found: Object) -> None:
        name = found["metadata"]["labels"].get(names.LABEL_JOB, "")
        _first(times.job, name)
        if not resource:
            status = found.get("status") or {}
            if status.get("active"):
                _first(times.running, name)
            if any(c["type"] == "Complete" and c["status"] == "True" for c in status.get("conditions") or ()):
                _first(times.ended, name)

    def see_pod(found: Object) -> None:
        name, phase = found["metadata"]["labels"].get(names.LABEL_JOB, ""), found["status"].get("phase")
        _first(times.pod, name)
        if phase == "Running":
            _first(times.pod_running, name)
        elif phase == "Succeeded":
            _first(times.pod_ended, name)

    def see_resource(found: Object) -> None:
        phase = (found.get("status") or {}).get("phase")
        if phase == "Running":
            _first(times.running, found["metadata"]["name"])
        elif phase == "Succeeded":
            _first(times.ended, found["metadata"]["name"])
        elif phase == "Failed":
            raise RuntimeError(found["status"])

    async def follow(path: str, see: Callable[[Object], None]) -> None:
        async for event in server.watch(path):
            see(event["object"])

    found = [
        (f"/apis/batch/v1/namespaces/{namespace}/jobs", see_job),
        (f"/api/v1/namespaces/{namespace}/pods", see_pod),
    ]
    if resource:
        found.append((f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}", see_resource))
    tasks = [asyncio.create_task(follow(path, see)) for path, see in found]
    await asyncio.sleep(0.5)
    try:
        yield times
    finally:
        for task in tasks:
            task.cancel()


async def post_all(server: Server, path: str, bodies: dict[str, Object], times: Times) -> None:
    """Post everything, AT_ONCE at a time; the time of a job begins when its request is sent."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def post(name: str, body: Object) -> None:
        async with limit:
            times.posted[name] = time.monotonic()
            await server.call("POST", path, body)

    await asyncio.gather(*(post(name, body) for name, body in bodies.items()))


async def wait_all(times: Times, count: int, limit: float) -> float:
    """Seconds from the first post until all have ended."""
    begin = min(times.posted.values())
    while len(times.ended) < count:
        if time.monotonic() - begin > limit:
            raise RuntimeError(f"only {len(times.ended)} of {count} jobs ended within {limit:.0f} s")
        await asyncio.sleep(0.05)
    return max(times.ended.values()) - begin


# --- floor and operator


@asynccontextmanager
async def namespace_of(server: Server, name: str) -> AsyncIterator[str]:
    await server.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    try:
        yield name
    finally:
        await server.call("DELETE", f"/api/v1/namespaces/{name}")
        for _ in range(1200):
            if (await server.call("GET", f"/api/v1/namespaces/{name}")).get("code") == 404:
                break
            await asyncio.sleep(0.5)


def job_names(count: int) -> list[str]:
    return [f"j{n:05d}" for n in range(count)]


def plane_cpu() -> dict[str, float]:
    """Seconds of CPU so far of the control plane's programs; empty where they are somebody else's."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, after = stat.read_text().rpartition(")")
        except OSError:  # it ended meanwhile
            continue
        name, fields = before.partition("(")[2], after.split()
        if int(fields[1]) == os.getpid() and name.startswith(("kube-", "etcd")):
            found[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def plane_cost(before: dict[str, float], count: int) -> Object:
    """Milliseconds of CPU per job since then: of the API server, and of etcd and the Job controller."""
    spent = {name: 1000 * (value - before[name]) / count for name, value in plane_cpu().items()}
    return {
        "server_ms": spent.get("kube-apiserver", math.nan),
        "rest_ms": sum(value for name, value in spent.items() if name != "kube-apiserver") if spent else math.nan,
    }


async def run_floor(server: Server, count: int) -> Object:
    """The Jobs that the operator would make, without it."""
    from nemo_rl_operator import build
    from nemo_rl_operator.observe import Resource

    spec, load = RLTrainingJobSpec.model_validate(JOB), os.getloadavg()[0]
    async with namespace_of(server, f"floor-{count}-{os.getpid()}") as namespace:
        bodies = {}
        for name in job_names(count):
            owner = Resource(namespace, name, "none", "", 1, "", False, "", "", "", "", "", False)
            body = build.attempt_job(owner, spec, 1, IMAGE)
            del body["metadata"]["ownerReferences"]
            bodies[name] = body
        async with watching(server, namespace, resource=False) as times:
            before = plane_cpu()
            await post_all(server, f"/apis/batch/v1/namespaces/{namespace}/jobs", bodies, times)
            wall = await wait_all(times, count, 60 + count)
            cost = plane_cost(before, count)
    return {
        "load": load,
        "wall": wall,
        "job_p95": percentile(times.job, times.posted, 95),
        "pod_p95": percentile(times.pod, times.posted, 95),
        **cost,
    }


class Operator:
    """The operator as a process, and what the kernel and its own metrics say about it."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.kubeconfig, self.log = kubeconfig, folder / "operator.log"

    def start(self) -> Operator:
        arguments = ["run", "--health-port", "18186", "--metrics-port", "18187", "--image", IMAGE]
        paths = os.pathsep.join(str(ROOT / part) for part in (".", "operator"))
        environment = os.environ | {"KUBECONFIG": str(self.kubeconfig), "PYTHONPATH": paths}
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "nemo_rl_operator.main", *arguments]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        return self

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen("http://127.0.0.1:18186/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-2000:]) from None
            return False

    async def wait_ready(self) -> float:
        begin = time.monotonic()
        while not await asyncio.to_thread(self.ready):
            await asyncio.sleep(0.1)
        return time.monotonic() - begin

    def calls(self) -> dict[str, int]:
        """API calls by what they are: writes, Events, reads; and how many of all were refused."""
        with urllib.request.urlopen("http://127.0.0.1:18187/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: dict[str, int] = defaultdict(int)
        for code, resource, verb, value in re.findall(
            r'api_calls_total\{code="(\d+)",resource="([^"]+)",verb="([A-Z]+)"\} (\S+)', text
        ):
            found["refused"] += int(float(value)) if not code.startswith("2") else 0
            kind = "reads" if verb == "GET" else "events" if resource == "events" else "writes"
            found[kind] += int(float(value))
        return found

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak(self) -> float:
        """MiB at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024

    async def wait_idle(self) -> None:
        """Until it uses next to no CPU for a second."""
        while True:
            before = self.cpu()
            await asyncio.sleep(1.0)
            if self.cpu() - before < 0.05:
                return

    def stop(self) -> float:
        begin = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        return time.monotonic() - begin


async def run_operator(server: Server, operator: Operator, count: int) -> Object:
    load = os.getloadavg()[0]
    operator.start()
    await operator.wait_ready()
    idle_cpu, idle_calls = operator.cpu(), operator.calls()
    async with namespace_of(server, f"operator-{count}-{os.getpid()}") as namespace:
        base = {"apiVersion": names.API_VERSION, "kind": names.KIND, "spec": JOB}
        bodies = {name: {**base, "metadata": {"name": name}} for name in job_names(count)}
        path = f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}"
        async with watching(server, namespace, resource=True) as times:
            before = plane_cpu()
            await post_all(server, path, bodies, times)
            wall = await wait_all(times, count, 60 + count)
            cost = plane_cost(before, count)
        await operator.wait_idle()
        calls = operator.calls()
        result = {
            "load": load,
            "wall": wall,
            "job_p50": percentile(times.job, times.posted, 50),
            "job_p95": percentile(times.job, times.posted, 95),
            "pod_p95": percentile(times.pod, times.posted, 95),
            **cost,
            "running_lag_p50": percentile(times.running, times.pod_running, 50),
            "running_lag_p95": percentile(times.running, times.pod_running, 95),
            "ended_lag_p50": percentile(times.ended, times.pod_ended, 50),
            "ended_lag_p95": percentile(times.ended, times.pod_ended, 95),
            "shown_running": 100 * len(times.running) / count,
            "cpu_ms": 1000 * (operator.cpu() - idle_cpu) / count,
            "peak_mib": operator.peak(),
            **{kind: (calls.get(kind, 0) - idle_calls.get(kind, 0)) / count for kind in KINDS},
            "sigterm": operator.stop(),
        }
        operator.start()
        result["restart_ready"] = await operator.wait_ready()
        await operator.wait_idle()
        calls = operator.calls()
        result |= {"restart_cpu": operator.cpu(), "restart_mib": operator.peak()}
        result |= {
            "restart_writes": calls.get("writes", 0) + calls.get("events", 0),
            "restart_reads": calls.get("reads", 0),
        }
        operator.stop()
    return result


def percentile(later: dict[str, float], earlier: dict[str, float], share: int) -> float:
    """Of the differences of those that both have; NaN where there is none."""
    found = sorted(later[name] - earlier[name] for name in later if name in earlier)
    return found[min(len(found) - 1, len(found) * share // 100)] if found else float("nan")


# --- the report


ROWS = (
    ("load average of the machine before the floor", "floor_load", "{:.1f}"),
    ("load average before the operator", "load", "{:.1f}"),
    ("all Complete, s", "wall", "{:.1f}"),
    ("floor: all Complete, s", "floor_wall", "{:.1f}"),
    ("create → Job p50, s", "job_p50", "{:.3f}"),
    ("create → Job p95, s", "job_p95", "{:.3f}"),
    ("floor: create → Job p95, s", "floor_job_p95", "{:.3f}"),
    ("create → pod p95, s", "pod_p95", "{:.3f}"),
    ("floor: create → pod p95, s", "floor_pod_p95", "{:.3f}"),
    ("Running, lag behind the pod p50, s", "running_lag_p50", "{:.3f}"),
    ("Running, lag behind the pod p95, s", "running_lag_p95", "{:.3f}"),
    ("Succeeded, lag behind the pod p50, s", "ended_lag_p50", "{:.3f}"),
    ("Succeeded, lag behind the pod p95, s", "ended_lag_p95", "{:.3f}"),
    ("jobs that ever showed Running, %", "shown_running", "{:.0f}"),
    ("writes per job", "writes", "{:.2f}"),
    ("Events per job", "events", "{:.2f}"),
    ("reads per job", "reads", "{:.2f}"),
    ("refused calls per job", "refused", "{:.2f}"),
    ("CPU per job, ms", "cpu_ms", "{:.1f}"),
    ("CPU per job of the API server, ms", "server_ms", "{:.1f}"),
    ("floor: CPU per job of the API server, ms", "floor_server_ms", "{:.1f}"),
    ("CPU per job of etcd and controllers, ms", "rest_ms", "{:.1f}"),
    ("floor: CPU per job of etcd and controllers, ms", "floor_rest_ms", "{:.1f}"),
    ("peak memory, MiB", "peak_mib", "{:.0f}"),
    ("restart: ready after, s", "restart_ready", "{:.1f}"),
    ("restart: CPU, s", "restart_cpu", "{:.1f}"),
    ("restart: writes", "restart_writes", "{:.0f}"),
    ("restart: peak memory, MiB", "restart_mib", "{:.0f}"),
    ("SIGTERM to exit, s", "sigterm", "{:.2f}"),
)
Goal = tuple[str, Callable[[Object], float], float]
GOALS: dict[int, list[Goal]] = {
    10: [
        ("create → Job p95 ≤ 0.15 s", lambda r: r["job_p95"], 0.15),
        ("Running lag p95 ≤ 0.1 s", lambda r: r["running_lag_p95"], 0.1),
        ("Succeeded lag p95 ≤ 0.1 s", lambda r: r["ended_lag_p95"], 0.1),
        ("SIGTERM to exit ≤ 1 s", lambda r: r["sigterm"], 1.0),
    ],
    300: [("all showed Running", lambda r: 100 - r["shown_running"], 0.0)],
    1000: [
        ("all Complete ≤ 1.6 × floor", lambda r: r["wall"] / r["floor_wall"], 1.6),
        ("create → Job p95 ≤ 1.8 × floor", lambda r: r["job_p95"] / r["floor_job_p95"], 1.8),
        ("≥ 60 % showed Running", lambda r: 100 - r["shown_running"], 40.0),
        ("≤ 4 writes per job", lambda r: r["writes"] + r["events"], 4.0),
        ("0 reads per job", lambda r: r["reads"], 0.0),
        ("≤ 20 ms CPU per job", lambda r: r["cpu_ms"], 20.0),
        ("≤ 150 MiB", lambda r: r["peak_mib"], 150.0),
        ("restart: 0 writes", lambda r: r["restart_writes"], 0.0),
        ("restart: CPU ≤ 4 s", lambda r: r["restart_cpu"], 4.0),
        ("SIGTERM to exit ≤ 1 s", lambda r: r["sigterm"], 1.0),
    ],
    10_000: [
        ("restart: ready < 10 s", lambda r: r["restart_ready"], 10.0),
        ("restart: < 250 MiB", lambda r: r["restart_mib"], 250.0),
    ],
}


async def measure(kubeconfig: Path, counts: list[int], rounds: int, folder: Path) -> dict[int, list[Object]]:
    found: dict[int, list[Object]] = {}
    stub = subprocess.Popen([sys.executable, __file__, "--play-pods", "--kubeconfig", str(kubeconfig)])
    try:
        async with Server(kubeconfig) as server:
            for count in counts:
                for _ in range(rounds):
                    floor = await run_floor(server, count)
                    result = await run_operator(server, Operator(kubeconfig, folder), count)
                    result |= {f"floor_{name}": value for name, value in floor.items()}
                    found.setdefault(count, []).append(result)
                    print(f"N = {count}: {json.dumps({k: round(v, 3) for k, v in result.items()})}", file=sys.stderr)
    finally:
        stub.terminate()
        stub.wait()
    return found


def report(found: dict[int, list[Object]]) -> bool:
    """Print conditions, medians and goals; whether all goals are reached."""
    uname = os.uname()
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    print(f"{when}, {os.cpu_count()} cores, {uname.sysname} {uname.release}, Python {sys.version.split()[0]}\n")
    print("| | " + " | ".join(f"N = {count}" for count in found) + " |\n|---|" + "---|" * len(found))
    medians = {
        count: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for count, results in found.items()
    }
    for label, name, form in ROWS:
        print(f"| {label} | " + " | ".join(form.format(result[name]) for result in medians.values()) + " |")
    good = True
    for count, result in medians.items():
        for label, value, limit in GOALS.get(count, []):
            reached = value(result) <= limit
            good &= reached
            print(
                f"{'reached' if reached else 'MISSED '}  N = {count}: {label} (measured {value(result):.3g}, limit {limit:g})"
            )
    return good


@asynccontextmanager
async def cluster(kubeconfig: Path | None, folder: Path) -> AsyncIterator[Path]:
    """The kubeconfig of an API server with the resource defined."""
    from cluster.api import Api  # type: ignore[import-not-found]
    from cluster.scene import run_kubectl  # type: ignore[import-not-found]
    from cluster.server import define  # type: ignore[import-not-found]
    from lab import programs  # type: ignore[import-not-found]
    from lab.control_plane import ControlPlane  # type: ignore[import-not-found]

    kubectl = programs.path("kubectl")
    if kubeconfig:
        define(Api(kubeconfig), run_kubectl(kubectl, kubeconfig, folder / "cache"))
        yield kubeconfig
        return
    plane = ControlPlane(folder)
    try:
        plane.start(lambda: define(Api(plane.kubeconfig), run_kubectl(kubectl, plane.kubeconfig, folder / "cache")))
        yield plane.kubeconfig
    finally:
        plane.stop()


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[10, 300, 1000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kubeconfig", type=Path)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--play-pods", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.play_pods:
        await play_pods(chosen.kubeconfig)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        async with cluster(chosen.kubeconfig, Path(folder)) as kubeconfig:
            found = await measure(kubeconfig, chosen.jobs, chosen.rounds, Path(folder))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    return 0 if report(found) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
