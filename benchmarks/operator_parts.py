"""What the operator's benchmark is made of: API server, played pods, what a user sees, and the operator as a process."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import re
import signal
import ssl
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
from nemo_rl.job.status import TerminationMessage  # noqa: E402

POD_SECONDS = 5.0
AT_ONCE = 64
IMAGE = "localhost/trainer:bench"
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


# --- what it costs


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


class Operator:
    """The operator as a process, and what the kernel and its own metrics say about it."""

    def __init__(self, kubeconfig: Path, folder: Path, checkout: Path = ROOT) -> None:
        """`checkout`: whose operator; another one than this has a virtual environment of its own."""
        self.kubeconfig, self.log, self.checkout = kubeconfig, folder / "operator.log", checkout
        own = checkout / ".venv" / "bin" / "python"
        self.python = sys.executable if checkout == ROOT else str(own)

    def start(self) -> Operator:
        arguments = ["run", "--health-port", "18186", "--metrics-port", "18187", "--image", IMAGE]
        paths = os.pathsep.join(str(self.checkout / part) for part in (".", "operator"))
        environment = os.environ | {"KUBECONFIG": str(self.kubeconfig), "PYTHONPATH": paths}
        with self.log.open("ab") as log:
            command = [self.python, "-m", "nemo_rl_operator.main", *arguments]
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
