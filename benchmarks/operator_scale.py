"""Times and costs of the operator: N jobs at once, pods played by a stub, beside the floor of the same run.

    python benchmarks/operator_scale.py [--jobs 10 300 1000] [--restart 10000] [--rounds 1] [--json FILE]
    python benchmarks/operator_scale.py --jobs 1000 --rounds 2 --beside CHECKOUT

The floor is what the cluster needs without any operator: the same Jobs, created directly. For each number of jobs the
floor runs first, then the operator, on the same API server; what is compared is the ratio. All times are taken where a
user stands, by watches of this process. Pods run as soon as they are made and succeed five seconds later. --restart
measures only a start beside so many finished jobs, which are made without running them. --beside takes another checkout
of this repository (git worktree add CHECKOUT COMMIT, with its dependencies in CHECKOUT/.venv): its operator, with its
definition, is measured in turn with this one, and what is more than 10 % worse than there is a missed goal. Without --kubeconfig a control
plane is started for the benchmark (see tests/lab). The thresholds at the end are the goals of the project; the exit
code is 1 if one is missed. (The file is not called operator.py: beside it, that would hide the standard library's.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from operator_parts import (
    AT_ONCE,
    IMAGE,
    ROOT,
    WORD,
    Object,
    Operator,
    Server,
    job_names,
    namespace_of,
    plane_cost,
    plane_cpu,
    play_pods,
    post_all,
    wait_all,
    watching,
)

from nemo_rl.job import names
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl_operator import build, observe
from nemo_rl_operator.decide import decide
from nemo_rl_operator.observe import Resource
from nemo_rl_operator.runtime import timestamps

JOB = {
    "model": "org/model",
    "algorithm": "sft",
    "dataset": {"name": "org/rows"},
    "output": {"claim": "shared"},
    "resources": {"gpusPerNode": 0},
}
KINDS = ("writes", "events", "reads", "refused")


# --- floor and operator


async def run_floor(server: Server, count: int) -> Object:
    """The Jobs that the operator would make, without it."""
    spec, load = RLTrainingJobSpec.model_validate(JOB), os.getloadavg()[0]
    async with namespace_of(server, f"floor-{count}-{os.getpid()}") as namespace:
        bodies = {}
        for name in job_names(count):
            owner = Resource(namespace, name, "none", "", 1, "", False, "", "", json.dumps(JOB), "", "", False)
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
        return result | await restart(operator)


async def restart(operator: Operator) -> Object:
    """A start of the operator beside what there is, until it has nothing left to do."""
    operator.start()
    ready = await operator.wait_ready()
    await operator.wait_idle()
    calls = operator.calls()
    found = {
        "restart_ready": ready,
        "restart_cpu": operator.cpu(),
        "restart_mib": operator.peak(),
        "restart_writes": calls.get("writes", 0) + calls.get("events", 0),
        "restart_reads": calls.get("reads", 0),
    }
    operator.stop()
    return found


async def make_finished(server: Server, count: int) -> None:
    """As many finished jobs, in a namespace of their own."""
    await server.call("POST", "/api/v1/namespaces", {"metadata": {"name": f"restart-{count}"}})
    limit = asyncio.Semaphore(AT_ONCE)

    async def make(name: str) -> None:
        async with limit:
            await finished_job(server, f"restart-{count}", name)

    await asyncio.gather(*(make(name) for name in job_names(count)))


async def finished_job(server: Server, namespace: str, name: str) -> None:
    """A job with its Job and pod, all as they are after a good end."""
    base = f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}"
    body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": JOB}
    resource = observe.resource(await server.call("POST", base, body))
    spec, now = RLTrainingJobSpec.model_validate(JOB), timestamps.write(timestamps.now())
    made = build.attempt_job(resource, spec, 1, IMAGE)
    made["spec"]["suspend"] = True  # the Job controller is to make no pod
    jobs, pods = f"/apis/batch/v1/namespaces/{namespace}/jobs", f"/api/v1/namespaces/{namespace}/pods"
    job = await server.call("POST", jobs, made)
    ends = [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in ("SuccessCriteriaMet", "Complete")]
    # a Job that never ran would have no start; the API server wants one
    status = {"startTime": now, "completionTime": now, "succeeded": 1, "completedIndexes": "0", "conditions": ends}
    job = await server.call("PATCH", f"{jobs}/{job['metadata']['name']}/status", {"status": status})
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
    meta = {"name": f"{name}-1-0-abcde", "ownerReferences": [owner | {"controller": True}]}
    meta |= {"labels": made["spec"]["template"]["metadata"]["labels"]}
    pod = await server.call("POST", pods, {"metadata": meta, "spec": made["spec"]["template"]["spec"]})
    ended = {"exitCode": 0, "reason": "Completed", "message": WORD, "finishedAt": now}
    container = {"name": names.TRAINER_CONTAINER, "image": IMAGE, "imageID": "", "restartCount": 0, "ready": False}
    status = {"phase": "Succeeded", "containerStatuses": [container | {"state": {"terminated": ended}}]}
    pod = await server.call("PATCH", f"{pods}/{meta['name']}/status", {"status": status})
    seen = observe.observe(resource, [observe.attempt_view(job)], [observe.pod_view(pod)], None, IMAGE)
    status = decide(seen, timestamps.now()).status.dump()
    assert status["phase"] == "Succeeded", status
    await server.call("PATCH", f"{base}/{name}/status", {"status": status})


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
        ("create → Job p95 ≤ 1.8 × floor's create → pod", lambda r: r["job_p95"] / r["floor_pod_p95"], 1.8),
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


async def measure(chosen: argparse.Namespace, plane: Plane, folder: Path) -> dict[int, list[Object]]:
    """The figures of each round, by number of jobs; those of the other checkout, if any, begin with `before_`."""
    found: dict[int, list[Object]] = {}
    versions = [("", Operator(plane.kubeconfig, folder))]
    if chosen.beside:
        versions.append(("before_", Operator(plane.kubeconfig, folder, chosen.beside.resolve())))

    def note(count: int, result: Object) -> None:
        found.setdefault(count, []).append(result)
        print(f"N = {count}: {json.dumps({k: round(v, 3) for k, v in result.items()})}", file=sys.stderr)

    async with Server(plane.kubeconfig) as server:
        stub = subprocess.Popen([sys.executable, __file__, "--play-pods", "--kubeconfig", str(plane.kubeconfig)])
        try:
            for count in chosen.jobs:
                for turn in range(chosen.rounds):
                    floor = await run_floor(server, count)
                    result = {f"floor_{name}": value for name, value in floor.items()}
                    for word, operator in versions[:: -1 if turn % 2 else 1]:
                        plane.define(operator.checkout)
                        one = await run_operator(server, operator, count)
                        result |= {word + name: value for name, value in one.items()}
                    note(count, result)
        finally:
            stub.terminate()
            stub.wait()
        plane.define(ROOT)
        for count in chosen.restart:
            await make_finished(server, count)
            result = {}
            for word, operator in versions:
                plane.define(operator.checkout)
                one = {"load": os.getloadavg()[0], **await restart(operator)}
                result |= {word + name: value for name, value in one.items()}
            plane.define(ROOT)
            note(count, result)
    return found


WORSE = 1.1
SMALL = {"_p50": 0.05, "_p95": 0.05, "_ready": 0.3, "_cpu": 0.2, "sigterm": 0.1, "reads": 0.005, "refused": 0.005}
"""Differences that are no more than noise: in seconds, or calls per job, where a few are made once and not for each job."""


def compared(label: str, name: str, result: Object) -> tuple[bool, str]:
    """Whether a figure is not worse than beside it, and both in a line; empty where there is nothing to compare."""
    before = result.get(f"before_{name}")
    if before is None or name in ("load", "shown_running") or result[name] != result[name]:
        return True, ""
    now = result[name]
    noise = next((value for end, value in SMALL.items() if name.endswith(end)), 0.0)
    good = now <= before * WORSE or now - before <= noise
    return good, f"{'reached' if good else 'MISSED '}  {label}: {now:.3g}, beside {before:.3g}"


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
        cells = (form.format(result[name]) if name in result else "–" for result in medians.values())
        print(f"| {label} | {' | '.join(cells)} |")
    good = True
    for count, result in medians.items():
        for label, name, _ in ROWS:
            if name in result:
                one, line = compared(label, name, result)
                good &= one
                if line:
                    print(f"N = {count}: {line}")
        for label, value, limit in GOALS.get(count, []):
            reached = value(result) <= limit
            good &= reached
            print(
                f"{'reached' if reached else 'MISSED '}  N = {count}: {label} (measured {value(result):.3g}, limit {limit:g})"
            )
    return good


class Plane:
    """An API server, and which definition it serves."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        from cluster.api import Api  # type: ignore[import-not-found]
        from cluster.scene import run_kubectl  # type: ignore[import-not-found]
        from lab import programs  # type: ignore[import-not-found]

        self.kubeconfig, self._api, self._defined = kubeconfig, Api(kubeconfig), None
        self._kubectl = run_kubectl(programs.path("kubectl"), kubeconfig, folder / "cache")

    def define(self, checkout: Path) -> None:
        """Serve the definition of this checkout."""
        from cluster.server import define  # type: ignore[import-not-found]

        if self._defined == checkout:
            return
        first = self._defined is None
        define(self._api, self._kubectl, checkout / "crds")
        self._defined = checkout
        if not first:
            time.sleep(5)  # the API server takes the storage of the one before down, and ends its watches


@asynccontextmanager
async def cluster(kubeconfig: Path | None, folder: Path) -> AsyncIterator[Plane]:
    """An API server with the resource defined."""
    from lab.control_plane import ControlPlane  # type: ignore[import-not-found]

    if kubeconfig:
        plane = Plane(kubeconfig, folder)
        plane.define(ROOT)
        yield plane
        return
    own = ControlPlane(folder)
    try:
        own.start(lambda: Plane(own.kubeconfig, folder).define(ROOT))
        plane = Plane(own.kubeconfig, folder)
        plane.define(ROOT)
        yield plane
    finally:
        own.stop()


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="*", default=[10, 300, 1000])
    parser.add_argument("--restart", type=int, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kubeconfig", type=Path)
    parser.add_argument(
        "--beside", type=Path, help="another checkout, whose operator is measured in turn with this one"
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--play-pods", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.play_pods:
        await play_pods(chosen.kubeconfig)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        async with cluster(chosen.kubeconfig, Path(folder)) as plane:
            found = await measure(chosen, plane, Path(folder))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    return 0 if report(found) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
