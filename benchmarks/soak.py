"""A long life of the control plane: thousands of jobs come and go while what can go wrong goes wrong, again and again.

    python benchmarks/soak.py [--minutes 120] [--jobs 5000] [--output benchmarks/results/soak.md]

A real API server, etcd and Job controller; pods are played. Jobs succeed, fail, lose pods to evictions and to the
out-of-memory killer, are suspended, changed and resumed, are deleted in the midst of it, delete themselves, or never
end. Meanwhile the API server is killed and started again, all connections of the operator are cut, etcd forgets its
history, the operator's clock jumps by five minutes and back, and certificates are replaced: the API server's own, and
the authority behind the operator's, so that its old one is refused.

At the end there must be: one process of the operator, all along; its memory as it was in the middle; every job as its
story asks for; no status that differs from its pods; and no child of a job that is gone. The exit code is 1 where one
of these does not hold. See operator_scale.py for what the operator costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from operator_parts import IMAGE, ROOT, WORD, Object, Operator, Server

from nemo_rl.job import names
from nemo_rl.job.status import TerminationMessage

NAMESPACE = "soak"
SPEC: Object = {
    "model": "org/model",
    "algorithm": "sft",
    "dataset": {"name": "org/rows"},
    "output": {"claim": "shared"},
    "resources": {"gpusPerNode": 0, "memory": "1Gi"},
    "backoffLimit": 5,
}
STORIES: dict[str, int] = {
    **{"succeeds": 30, "two-nodes": 8, "wrong": 8, "evicted": 8, "oom": 8, "paused": 8, "deleted": 10, "expires": 10},
    "forever": 1,
}
"""What becomes of a job, by the beginning of its name; and how many of 91 jobs have this story."""
FATE = {
    **dict.fromkeys(("succeeds", "two-nodes", "evicted", "oom", "paused"), "Succeeded"),
    "wrong": "Failed",
    "forever": "Running",
}
"""The phase in which a job must be at the end, if it is still there."""
POD_SECONDS = (2.0, 20.0)
KEPT_SECONDS = 60.0
"""How long a finished job stays before its user deletes it."""
WRONG = TerminationMessage(
    kind="failure", exit_code=40, cause="ValueError", message="no", traceback="Traceback: no"
).encode()
JUMP_SECONDS = 300.0
SETTLE_SECONDS = 420.0
"""For what is under way at the end: the longest back-off of a job is 300 s."""
MOST_GROWTH = 1.10
JOBS, PODS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs", f"/api/v1/namespaces/{NAMESPACE}/pods"
MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
RESOURCES = f"/apis/{names.API_VERSION}/namespaces/{NAMESPACE}/{names.PLURAL}"
AWAY = (aiohttp.ClientError, OSError, RuntimeError, asyncio.TimeoutError, json.JSONDecodeError, AttributeError)
"""How calls end while the API server is killed and comes back."""


def story_of(name: str) -> str:
    return name.rpartition("-")[0]


async def insistent(server: Server, verb: str, path: str, body: Object | None = None) -> Object:
    """A call that is repeated until the API server answers."""
    while True:
        try:
            return await asyncio.wait_for(server.call(verb, path, body), 20)
        except AWAY as error:
            if server.session.closed or (isinstance(error, RuntimeError) and re.search(r": 4(00|22) ", str(error))):
                raise
            await asyncio.sleep(0.5)


async def items(server: Server, path: str) -> list[Object]:
    while True:
        found = await insistent(server, "GET", path)
        if "items" in found:
            return list(found["items"])
        await asyncio.sleep(0.5)


# --- the kubelets' part


class Pods:
    """Plays all pods, whatever happens to the API server meanwhile."""

    def __init__(self, server: Server, random_numbers: random.Random) -> None:
        self.server, self.random = server, random_numbers
        self.seen: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """A watch that is begun anew, with a list, at each fault."""
        while True:
            try:
                async for event in self.server.watch(PODS):
                    self._see(event["object"])
            except (*AWAY, KeyError):
                await asyncio.sleep(0.5)

    def _see(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if uid in self.seen:
            return
        self.seen.add(uid)
        task = asyncio.create_task(self._live(pod))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _live(self, pod: Object) -> None:
        meta = pod["metadata"]
        job, attempt = meta["labels"][names.LABEL_JOB], int(meta["labels"][names.LABEL_ATTEMPT])
        story = story_of(job)
        if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            return
        await self._state(pod, "Running", {"running": {"startedAt": _now()}})
        if story == "forever" or (story == "paused" and attempt == 1):
            return
        await asyncio.sleep(self.random.uniform(*POD_SECONDS))
        if story == "wrong":
            await self._end(pod, 40, WRONG)
        elif story == "evicted" and attempt == 1:
            disruption = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
            condition = {**disruption, "message": "the node was low on memory", "lastTransitionTime": _now()}
            await self._patch(pod, {"phase": "Failed", "reason": "Evicted", "conditions": [condition]})
        elif story == "oom" and attempt == 1:
            await self._end(pod, 137, "", "OOMKilled")
        else:
            await self._end(pod, 0, WORD if meta["annotations"][names.ANNOTATION_JOB_INDEX] == "0" else "")

    async def _end(self, pod: Object, code: int, message: str, reason: str = "") -> None:
        ended = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "message": message}
        state = {"terminated": {**ended, "finishedAt": _now()}}
        await self._state(pod, "Failed" if code else "Succeeded", state)

    async def _state(self, pod: Object, phase: str, state: Object) -> None:
        common = {"name": names.TRAINER_CONTAINER, "image": IMAGE, "imageID": "", "restartCount": 0}
        containers = [{**common, "ready": phase == "Running", "state": state}]
        await self._patch(pod, {"phase": phase, "containerStatuses": containers})

    async def _patch(self, pod: Object, status: Object) -> None:
        with contextlib.suppress(RuntimeError):  # a pod of that name that is another one by now
            meta = pod["metadata"]
            await insistent(
                self.server,
                "PATCH",
                f"{PODS}/{meta['name']}/status",
                {"metadata": {"uid": meta["uid"]}, "status": status},
            )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# --- the users' part


@dataclass
class Users:
    """Submit jobs over the whole time, and do with them what their stories say."""

    server: Server
    random: random.Random
    count: int
    submitted: Counter[str] = field(default_factory=Counter)
    removed: set[str] = field(default_factory=set)
    """Deleted by their users."""

    async def run(self, seconds: float) -> None:
        begin = time.monotonic()
        tasks = []
        for number in range(self.count):
            await asyncio.sleep(max(0.0, begin + seconds * number / self.count - time.monotonic()))
            tasks.append(asyncio.create_task(self._story(number)))
        await asyncio.gather(*tasks)

    async def _story(self, number: int) -> None:
        story = self.random.choices(list(STORIES), list(STORIES.values()))[0]
        name = f"{story}-{number:05d}"
        spec = json.loads(json.dumps(SPEC))
        if story == "two-nodes":
            spec["resources"]["nodes"] = 2
        if story == "expires":
            spec["ttlSecondsAfterFinished"] = 5
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}
        await insistent(self.server, "POST", RESOURCES, body)
        self.submitted[story] += 1
        if story == "deleted":
            await asyncio.sleep(self.random.uniform(0, POD_SECONDS[1]))
            await self._delete(name)
        elif story == "paused":
            await self._pause(name)
        if story in ("succeeds", "two-nodes", "wrong", "evicted", "oom", "paused"):
            await self._until(name, lambda status: status.get("phase") in ("Succeeded", "Failed"))
            await asyncio.sleep(KEPT_SECONDS)
            if number % max(2, self.count // 100):  # the others stay, to be looked at in the end
                await self._delete(name)

    async def _pause(self, name: str) -> None:
        """Suspended, given more memory, resumed."""
        await self._until(name, lambda status: status.get("phase") == "Running")
        await self._patch(name, {"suspend": True})
        await self._until(name, lambda status: status.get("phase") in ("Suspended", "Succeeded", "Failed"))
        await self._patch(name, {"resources": {"memory": "2Gi"}})
        await self._patch(name, {"suspend": False})

    async def _patch(self, name: str, spec: Object) -> None:
        await insistent(self.server, "PATCH", f"{RESOURCES}/{name}", {"spec": spec})

    async def _delete(self, name: str) -> None:
        self.removed.add(name)
        await insistent(self.server, "DELETE", f"{RESOURCES}/{name}")

    async def _until(self, name: str, check: Callable[[Object], bool]) -> None:
        while True:
            found = await insistent(self.server, "GET", f"{RESOURCES}/{name}")
            if found.get("code") == 404:
                raise RuntimeError(f"{name} is gone, and nobody deleted it")
            if check(found.get("status") or {}):
                return
            await asyncio.sleep(2.0)


# --- the faults


class Forwarder:
    """Carries the operator's connections to the API server, and cuts them."""

    def __init__(self, port: int) -> None:
        self.target, self.port = port, 0
        self.writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Forwarder]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self.cut()
            server.close()

    def cut(self) -> None:
        for writer in list(self.writers):
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, there[1]}
        self.writers |= both
        with contextlib.suppress(asyncio.CancelledError):  # at the end of the soak
            await asyncio.gather(self._copy(reader, there[1]), self._copy(there[0], writer))
        self.writers -= both

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


class Keys:
    """The operator's certificate, whose authority is replaced while it runs, and that of the API server."""

    def __init__(self, plane: Any, server: str, folder: Path) -> None:
        from lab import pki  # type: ignore[import-not-found]

        self._pki, self._plane, self.folder = pki, plane, folder
        self._own = (plane.pki / "ca.crt").read_text()
        self._round, self._before = 0, ""
        self.kubeconfig = folder / "kubeconfig"
        folder.mkdir()
        shutil.copy(plane.pki / "ca.crt", folder / "ca.crt")
        self.kubeconfig.write_text(pki.kubeconfig(folder, "operator", server))

    async def rotate(self) -> None:
        """New ones. For a while both authorities are trusted, then the new one alone."""
        self._round += 1
        folder = self.folder / f"authority-{self._round}"
        # a name of its own: of two authorities of one name OpenSSL asks the first alone
        authority = self._pki.Authority(folder, f"ca-{self._round}")
        authority.certificate("operator", f"{self._pki.ADMINISTRATORS}/CN=operator-{self._round}", "clientAuth")
        now = (folder / f"ca-{self._round}.crt").read_text()
        await self._trust(self._before + now, folder)
        for name in ("operator.crt", "operator.key"):
            shutil.copy(folder / name, self.folder / name)
        self._before = now
        if self._round > 1:
            await asyncio.sleep(5)
        (self._plane.pki / "ca.crt").write_text(self._own + now)
        hosts = ["IP:127.0.0.1", "IP:10.0.0.1", "DNS:localhost"]
        self._pki.Authority(self._plane.pki).certificate("apiserver", "/CN=kube-apiserver", "serverAuth", hosts)

    async def _trust(self, authorities: str, folder: Path) -> None:
        """Wait until the API server knows the new authority, which takes it up to a minute."""
        (self._plane.pki / "ca.crt").write_text(self._own + authorities)
        for _ in range(240):
            if await asyncio.to_thread(self._accepted, folder):
                return
            await asyncio.sleep(0.5)
        raise RuntimeError("the API server does not trust a new authority within two minutes")

    def _accepted(self, folder: Path) -> bool:
        tls = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        tls.load_cert_chain(folder / "operator.crt", folder / "operator.key")
        connection = http.client.HTTPSConnection("127.0.0.1", self._plane.port, timeout=10, context=tls)
        try:
            connection.request("GET", "/api/v1/namespaces")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@dataclass
class Faults:
    plane: Any
    forwarder: Forwarder
    keys: Keys
    clock: Path
    done: Counter[str] = field(default_factory=Counter)

    async def run(self, seconds: float, rounds: int) -> None:
        kinds: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("connections cut", self._cut),
            ("etcd compacted and connections cut", self._compact),
            ("clock set forward by 5 minutes", lambda: self._jump(JUMP_SECONDS)),
            ("clock right again", lambda: self._jump(0)),
            ("API server killed and started", self._restart),
            ("clock set back by 5 minutes", lambda: self._jump(-JUMP_SECONDS)),
            ("clock right again", lambda: self._jump(0)),
            ("certificates replaced", self.keys.rotate),
        ]
        begin, every = time.monotonic(), seconds / (rounds * len(kinds) + 1)
        for number in range(rounds * len(kinds)):
            await asyncio.sleep(max(0.0, begin + every * (number + 1) - time.monotonic()))
            name, make = kinds[number % len(kinds)]
            print(f"{time.monotonic() - begin:6.0f} s  {name}", file=sys.stderr)
            await make()
            self.done[name] += 1

    async def _cut(self) -> None:
        self.forwarder.cut()

    async def _compact(self) -> None:
        await asyncio.to_thread(self.plane.compact)
        self.forwarder.cut()

    async def _restart(self) -> None:
        await asyncio.to_thread(self._restart_plane)

    def _restart_plane(self) -> None:
        """The controllers too: of themselves they would come back up to half a minute later."""
        self.plane.kill("kube-apiserver")
        self.plane.launch("kube-apiserver")
        limit = time.monotonic() + SETTLE_SECONDS
        while self.plane.get("/readyz") is None:
            if time.monotonic() > limit:
                raise RuntimeError(f"the API server does not come back within {SETTLE_SECONDS:.0f} s")
            time.sleep(0.2)
        self.plane.kill("kube-controller-manager")
        self.plane.launch("kube-controller-manager")

    async def _jump(self, seconds: float) -> None:
        self.clock.write_text(str(seconds))


# --- the operator


def operator_with_a_clock(clock: Path, arguments: list[str]) -> None:
    """The operator in this process; its clock is wrong by as many seconds as the file says."""
    from datetime import timedelta

    from nemo_rl_operator.runtime import timestamps

    right = timestamps.now

    def now() -> object:
        with contextlib.suppress(OSError, ValueError):
            return right() + timedelta(seconds=float(clock.read_text()))
        return right()

    timestamps.now = now  # type: ignore[assignment]
    from nemo_rl_operator.main import app

    app(arguments)


class Soaked(Operator):
    """The operator as a process with a clock that can be set."""

    def __init__(self, kubeconfig: Path, folder: Path, clock: Path) -> None:
        super().__init__(kubeconfig, folder)
        self.clock = clock
        from ports import free_ports  # type: ignore[import-not-found]

        self.health, self.metrics = free_ports(2)

    def start(self) -> Soaked:
        ports = ["--health-port", str(self.health), "--metrics-port", str(self.metrics)]
        command = [sys.executable, __file__, "--operator", str(self.clock), "run", *ports, "--image", IMAGE]
        environment = os.environ | {"KUBECONFIG": str(self.kubeconfig), "NEMO_RL_OPERATOR_RESYNC_SECONDS": "60"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        return self

    def asked(self, path: str) -> tuple[int, str]:
        """The status code of an answer, and its words; 0 where there was none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health}{path}", timeout=10) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(self.log.read_text()[-3000:])
        return self.asked("/readyz")[0] == 200

    def resident(self) -> float:
        """MiB now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def errors(self) -> float:
        """Reconciliations that ended in an exception that nobody expected."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            found = re.findall(r'reconciles_total\{[^}]*"error"[^}]*\} (\S+)', answer.read().decode())
        return sum(map(float, found))


@dataclass
class Samples:
    """What the operator was like, every few seconds."""

    operator: Soaked
    users: Users
    taken: list[tuple[float, float, int]] = field(default_factory=list)
    """Seconds since the begin, MiB, jobs submitted so far."""
    unhealthy: list[str] = field(default_factory=list)
    """What /healthz said when it refused."""

    async def run(self, every: float) -> None:
        begin = time.monotonic()
        while True:
            self.taken.append((time.monotonic() - begin, self.operator.resident(), self.users.submitted.total()))
            code, words = await asyncio.to_thread(self.operator.asked, "/healthz")
            if code != 200:
                self.unhealthy.append(words.strip())
            await asyncio.sleep(every)

    def growth(self) -> tuple[float, float]:
        """Median MiB of the fifth of the time that follows the middle, and of the last fifth."""
        end = self.taken[-1][0]
        parts = ((0.5, 0.6), (0.9, 1.0)) if len(self.taken) > 100 else ((0.5, 0.7), (0.8, 1.0))
        found = [statistics.median(m for t, m, _ in self.taken if a * end <= t <= b * end) for a, b in parts]
        return found[0], found[1]


# --- the end


async def differences(server: Server, users: Users) -> list[str]:
    """All that is not as it must be, in words; empty in the end."""
    jobs = {job["metadata"]["name"]: job for job in await items(server, RESOURCES)}
    pods: dict[str, list[Object]] = {}
    uids = {job["metadata"]["uid"] for job in jobs.values()}
    found = []
    for pod in await items(server, PODS):
        labels = pod["metadata"]["labels"]
        if labels[names.LABEL_JOB_UID] in uids:
            pods.setdefault(labels[names.LABEL_JOB], []).append(pod)
        else:
            found.append(f"pod {pod['metadata']['name']} of a job that is gone")
    for path in (JOBS, MAPS):
        for child in await items(server, path):
            uid = (child["metadata"].get("labels") or {}).get(names.LABEL_JOB_UID)
            if uid and uid not in uids:
                found.append(f"{path.rpartition('/')[2]} {child['metadata']['name']} of a job that is gone")
    found += [f"{name} was deleted and is still there" for name in jobs if name in users.removed]
    for name, job in jobs.items():
        found += [f"{name}: {what}" for what in _wrong(job, pods.get(name, []))]
    return found


def _wrong(job: Object, pods: list[Object]) -> list[str]:
    story, status = story_of(job["metadata"]["name"]), job.get("status") or {}
    phase, attempt, nodes = status.get("phase"), str(status.get("attempt")), job["spec"]["resources"].get("nodes", 1)
    if story not in FATE:
        return [f"{story} is still there in phase {phase}"]
    if phase != FATE[story]:
        return [f"is {phase} ({status.get('message')}), not {FATE[story]}"]
    wrong = []
    if status.get("observedGeneration") != job["metadata"]["generation"]:
        wrong.append("its newest generation was not looked at")
    newest = [p["status"].get("phase") for p in pods if p["metadata"]["labels"][names.LABEL_ATTEMPT] == attempt]
    if newest.count(FATE[story]) != nodes:
        wrong.append(f"says {phase} of attempt {attempt}, whose pods are {newest}")
    if phase != "Running" and any(p["status"].get("phase") in ("Running", "Pending") for p in pods):
        wrong.append(f"has ended, and has pods that have not: {[p['status'].get('phase') for p in pods]}")
    ends = [a.get("cause") for a in status["attempts"]]
    expected = {"evicted": 2, "oom": 2, "paused": 2}.get(story, 1)
    if len(ends) < expected or (phase == "Succeeded" and ends[-1] != "Succeeded"):
        wrong.append(f"its attempts ended by {ends}")
    if story == "paused" and {p["spec"]["containers"][0]["resources"]["limits"]["memory"] for p in pods} != {"2Gi"}:
        wrong.append("was resumed without the memory that it was given")
    return wrong


async def settled(server: Server, users: Users) -> list[str]:
    """What is still wrong once all that was under way has had its time."""
    limit = time.monotonic() + SETTLE_SECONDS
    while found := await differences(server, users):
        if time.monotonic() > limit:
            return found
        await asyncio.sleep(5)
    return []


# --- the whole


async def soak(chosen: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    from cluster.api import Api  # type: ignore[import-not-found]
    from cluster.scene import run_kubectl  # type: ignore[import-not-found]
    from cluster.server import define  # type: ignore[import-not-found]
    from lab import programs  # type: ignore[import-not-found]
    from lab.control_plane import ControlPlane  # type: ignore[import-not-found]

    plane = ControlPlane(folder / "plane")
    numbers = random.Random(chosen.seed)
    seconds = chosen.minutes * 60
    try:
        kubectl = run_kubectl(programs.path("kubectl"), plane.kubeconfig, folder / "cache")
        await asyncio.to_thread(plane.start, lambda: define(Api(plane.kubeconfig), kubectl, ROOT / "crds"))
        clock = folder / "clock"
        async with Server(plane.kubeconfig) as server, Forwarder(plane.port).serving() as forwarder:
            await insistent(server, "POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
            keys = Keys(plane, f"https://127.0.0.1:{forwarder.port}", folder / "operator")
            await keys.rotate()
            operator = Soaked(keys.kubeconfig, folder, clock).start()
            try:
                await operator.wait_ready()
                users, pods = Users(server, numbers, chosen.jobs), Pods(server, numbers)
                faults, samples = Faults(plane, forwarder, keys, clock), Samples(operator, users)
                background = [asyncio.create_task(part) for part in (pods.run(), samples.run(seconds / 240))]
                begin = time.monotonic()
                rounds = max(1, round(chosen.minutes / 15))
                # what was submitted last is to end within the time
                load = asyncio.create_task(users.run(seconds * 0.95))
                await faults.run(seconds * 0.97, rounds)
                await asyncio.sleep(max(0.0, begin + seconds - time.monotonic()))
                await asyncio.wait_for(load, KEPT_SECONDS + SETTLE_SECONDS)
                wrong = await settled(server, users)
                lived = time.monotonic() - begin
                for task in background:
                    if task.done():
                        task.result()
                    task.cancel()
                left = len(await items(server, RESOURCES))
                errors = operator.errors()
                alive = operator.process.poll() is None
            finally:
                if chosen.log:
                    shutil.copy(operator.log, chosen.log)
                operator.stop()
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
    finally:
        plane.stop()
    first, last = samples.growth()
    said = "".join(f'; {count} times: "{words}"' for words, count in Counter(samples.unhealthy).most_common(3))
    goals = [
        (f"the operator lived on as one process ({lived / 60:.0f} minutes)", alive),
        (
            f"its memory grew by {100 * (last / first - 1):.1f} % in the last half, at most 10 %",
            last <= first * MOST_GROWTH,
        ),
        (
            f"/healthz refused {len(samples.unhealthy)} of {len(samples.taken)} times, never{said}",
            not samples.unhealthy,
        ),
        (f"{errors:.0f} reconciliations ended unexpectedly, none", errors == 0),
        (f"{len(wrong)} jobs or children are not as they must be, none", not wrong),
    ]
    text = report(chosen, samples, users, faults, goals, left) + "".join(f"\n- {line}" for line in wrong[:50])
    return text.rstrip() + "\n", all(good for _, good in goals)


def report(
    chosen: argparse.Namespace,
    samples: Samples,
    users: Users,
    faults: Faults,
    goals: list[tuple[str, bool]],
    left: int,
) -> str:
    uname = os.uname()
    stories = ", ".join(f"{story} {count}" for story, count in sorted(users.submitted.items()))
    lines = [
        "# A long life of the control plane",
        "",
        f"`make soak MINUTES={chosen.minutes:g} JOBS={chosen.jobs}` (seed {chosen.seed}), "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {os.cpu_count()} cores, {uname.sysname} {uname.release}, "
        f"Python {sys.version.split()[0]}. Written by `benchmarks/soak.py`, whose beginning says what happens.",
        "",
        *(f"- {'Reached' if good else 'MISSED'}: {goal}." for goal, good in goals),
        "",
        f"Jobs by their stories: {stories}; {left} were there at the end. Faults: "
        + ", ".join(f"{name} ({count})" for name, count in faults.done.items())
        + ".",
        "",
        "| Minute | Jobs submitted | Memory of the operator, MiB |",
        "| --- | --- | --- |",
    ]
    step = max(1, len(samples.taken) // 12)
    lines += [f"| {t / 60:.1f} | {jobs} | {mib:.1f} |" for t, mib, jobs in samples.taken[step - 1 :: step]]
    return "\n".join(lines) + "\n"


async def main(chosen: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        text, good = await soak(chosen, Path(folder))
    print(text)
    chosen.output.write_text(text)
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--operator"]:
        operator_with_a_clock(Path(sys.argv[2]), sys.argv[3:])
        sys.exit(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/soak.md")
    parser.add_argument("--log", type=Path, help="keep the operator's log there")
    sys.exit(asyncio.run(main(parser.parse_args())))
