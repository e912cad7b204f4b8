"""The kubelet's and the scheduler's part, played by the tests: pods get the states that a test tells, and nothing else.

Pods live at loopback addresses of their own (127.64.x.y), so that each can serve /progress on the trainer's port.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cluster.api import Api, ApiError, Object, eventually, path
from nemo_rl.job import names

NODE = "played-node"
FINISHED = ("Succeeded", "Failed")
Answer = Callable[[BaseHTTPRequestHandler], None]


def now(skew: float = 0) -> str:
    time = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=skew)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


class Kubelet:
    """Watches all pods; stops those that are deleted, as a kubelet does; hands out the others to be played with."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.pods: dict[tuple[str, str], Object] = {}
        self.played: dict[str, PlayedPod] = {}
        self.automatic: dict[str, Callable[[PlayedPod], None]] = {}
        self.clock: dict[str, float] = {}
        """By namespace: seconds by which the clock of its pods' nodes is wrong."""
        self.ended = threading.Event()
        # several test runs on one machine: the process id keeps their addresses apart
        net = f"127.{64 + os.getpid() % 128}"
        self.addresses = (f"{net}.{a}.{b}" for a, b in itertools.product(range(256), range(1, 255)))
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._follow, name="kubelet", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        for pod in list(self.played.values()):
            pod.stop_serving()

    def pod(self, namespace: str, job: str, index: int = 0) -> PlayedPod:
        """The pod of a Job with a completion index that is not finished and not being deleted, once it is there."""

        def check() -> PlayedPod | None:
            found = [pod for pod in self.of_job(namespace, job) if pod.index == index and pod.alive]
            return found[0] if found else None

        return eventually(check, f"a pod of Job {namespace}/{job} with index {index}")

    def named(self, namespace: str, name: str) -> PlayedPod:
        eventually(lambda: (namespace, name) in self.pods, f"pod {namespace}/{name}")
        return self._play(self.pods[namespace, name])

    def of_job(self, namespace: str, job: str) -> list[PlayedPod]:
        found = [
            pod
            for (where, _), pod in list(self.pods.items())
            if where == namespace and pod["metadata"].get("labels", {}).get("batch.kubernetes.io/job-name") == job
        ]
        return [self._play(pod) for pod in sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))]

    def automate(self, namespace: str, play: Callable[[PlayedPod], None]) -> None:
        """From now on every new pod of the namespace is played by this function, in a thread of its own."""
        self.automatic[namespace] = play
        for (where, _), pod in list(self.pods.items()):
            if where == namespace:
                self._react("ADDED", pod)

    def _play(self, pod: Object) -> PlayedPod:
        with self.lock:
            uid = str(pod["metadata"]["uid"])
            if uid not in self.played:
                self.played[uid] = PlayedPod(self, pod)
            return self.played[uid]

    def _follow(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(OSError, ApiError, http.client.HTTPException, ValueError):
                self._follow_once()
            self.ended.wait(0.1)

    def _follow_once(self) -> None:
        listed = self.api.request("GET", path("pods"))
        found = {_key(pod): pod for pod in listed["items"]}
        for key in [key for key in self.pods if key not in found]:
            self._forget(self.pods.pop(key))
        for pod in found.values():
            self._see("ADDED", pod)
        for event in self.api.watch("pods", listed["metadata"]["resourceVersion"]):
            if event["type"] == "ERROR" or self.ended.is_set():
                return
            if event["type"] != "BOOKMARK":
                self._see(event["type"], event["object"])

    def _see(self, kind: str, pod: Object) -> None:
        if kind == "DELETED":
            self.pods.pop(_key(pod), None)
            self._forget(pod)
            return
        self.pods[_key(pod)] = pod
        self._react(kind, pod)

    def _react(self, kind: str, pod: Object) -> None:
        meta = pod["metadata"]
        played = self._play(pod)
        if "deletionTimestamp" in meta and pod["spec"].get("nodeName"):
            if not played.stopping and not played.silent:
                played.stopping = True
                threading.Thread(target=played.stop, daemon=True).start()
        elif kind == "ADDED" and meta["namespace"] in self.automatic and not played.automated:
            played.automated = True
            threading.Thread(target=self._run_automatic, args=(played, meta["namespace"]), daemon=True).start()

    def _run_automatic(self, played: PlayedPod, namespace: str) -> None:
        # the API server may be away, and the pod gone, in a test of faults
        with contextlib.suppress(ApiError, OSError, http.client.HTTPException):
            self.automatic[namespace](played)

    def _forget(self, pod: Object) -> None:
        played = self.played.pop(str(pod["metadata"]["uid"]), None)
        if played:
            played.stop_serving()


class PlayedPod:
    """One pod, and what a node would make of it."""

    def __init__(self, kubelet: Kubelet, pod: Object) -> None:
        self.kubelet, self.api = kubelet, kubelet.api
        self.namespace: str = pod["metadata"]["namespace"]
        self.name: str = pod["metadata"]["name"]
        self.uid: str = pod["metadata"]["uid"]
        self.index = int(pod["metadata"].get("annotations", {}).get(names.ANNOTATION_JOB_INDEX, 0))
        self.job: str = pod["metadata"].get("labels", {}).get("batch.kubernetes.io/job-name", "")
        self.containers = [c["name"] for c in pod["spec"]["containers"]]
        self.address = next(kubelet.addresses)
        self.started = now()
        self.server: ThreadingHTTPServer | None = None
        self.requests = 0
        self.stopping = self.automated = False
        self.silent = False
        """Its node does not answer: nobody stops it, or reports its end."""
        self.stop_code, self.stop_message = int(names.ExitCode.PREEMPTED), ""

    @property
    def object(self) -> Object:
        return self.api.get("pods", self.namespace, self.name)

    @property
    def alive(self) -> bool:
        pod = self.kubelet.pods.get((self.namespace, self.name))
        return bool(
            pod
            and pod["metadata"]["uid"] == self.uid
            and pod.get("status", {}).get("phase") not in FINISHED
            and "deletionTimestamp" not in pod["metadata"]
        )

    def schedule(self) -> None:
        if self.object["spec"].get("nodeName"):
            return
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": self.name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": NODE},
        }
        self.api.request("POST", path("pods", self.namespace, self.name, "binding"), binding)

    def unschedulable(self, message: str) -> None:
        self._status(conditions=[condition("PodScheduled", False, "Unschedulable", message)])

    def wait_for(self, reason: str, message: str = "") -> None:
        """The container waits: ErrImagePull, ImagePullBackOff, ContainerCreating, CreateContainerConfigError, ..."""
        self.schedule()
        state = {"waiting": {"reason": reason, "message": message}}
        self._status(phase="Pending", containerStatuses=self._containers(state), hostIP="127.0.0.1")

    def run(self) -> PlayedPod:
        self.schedule()
        conditions = [condition(kind, True) for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")]
        self.started = self.now()
        conditions = [{**c, "lastTransitionTime": self.started} for c in conditions]
        self._status(
            phase="Running",
            podIP=self.address,
            podIPs=[{"ip": self.address}],
            hostIP="127.0.0.1",
            startTime=self.started,
            conditions=conditions,
            containerStatuses=self._containers({"running": {"startedAt": self.started}}, ready=True),
        )
        return self

    def exit(self, code: int, message: str | Object = "", reason: str = "", **status: Any) -> None:
        """The container ended. message: the termination message, as text or as what becomes JSON."""
        self.schedule()
        self.stop_serving()
        text = message if isinstance(message, str) else json.dumps(message)
        state = {
            "terminated": {
                "exitCode": code,
                "reason": reason or ("Error" if code else "Completed"),
                "message": text[: names.TERMINATION_LIMIT],
                "startedAt": self.started,
                "finishedAt": self.now(),
            }
        }
        self._status(phase="Failed" if code else "Succeeded", containerStatuses=self._containers(state), **status)

    def oom(self) -> None:
        self.exit(137, reason="OOMKilled")

    def disrupt(self, reason: str = "EvictionByEvictionAPI", code: int = 143, message: str | Object = "") -> None:
        """The cluster takes the pod away: the condition that says so, then the end of the container."""
        conditions = [condition("DisruptionTarget", True, reason, "the node is drained")]
        self._status(conditions=conditions)
        self.exit(code, message, conditions=conditions)

    def reject(self, reason: str, message: str) -> None:
        """The kubelet refuses a pod that was bound to its node: it ends at once, without any container."""
        self.schedule()
        self._status(phase="Failed", reason=reason, message=message, startTime=self.now())

    def states(self, phase: str, trainer: Object, init: list[Object] | None = None, **others: Object) -> None:
        """Each container by itself: the trainer's state, and by name those that a webhook added; and the pod's phase."""
        self.schedule()
        common = {"image": "test", "imageID": "test", "restartCount": 0, "ready": False}
        states = {names.TRAINER_CONTAINER: trainer, **others}
        found = [{"name": name.replace("_", "-"), **common, "state": state} for name, state in states.items()]
        before = {"initContainerStatuses": [{**common, **container} for container in init]} if init else {}
        self._status(phase=phase, containerStatuses=found, **before)

    def ended(self, code: int, message: str = "", reason: str = "") -> Object:
        """The state of a container that ended just now."""
        why = reason or ("Error" if code else "Completed")
        times = {"startedAt": self.started, "finishedAt": self.now()}
        return {"terminated": {"exitCode": code, "reason": why, "message": message, **times}}

    def now(self) -> str:
        """The time by the clock of the pod's node."""
        return now(self.kubelet.clock.get(self.namespace, 0))

    def evict(self, message: str = "The node was low on resource: memory.") -> None:
        """The kubelet evicts for lack of node resources: no container status at all, only the pod's reason."""
        self.schedule()
        self.stop_serving()
        disruption = condition("DisruptionTarget", True, "TerminationByKubelet", message)
        self._status(phase="Failed", reason="Evicted", message=message, conditions=[disruption])

    def when_stopped(self, code: int, message: str | Object = "") -> None:
        """What the container does on SIGTERM: its exit code and termination message. Default: 75, saved."""
        self.stop_code = code
        self.stop_message = message if isinstance(message, str) else json.dumps(message)

    def evict_by_api(self) -> None:
        """What `kubectl drain` asks for: the API server marks the pod as disrupted and deletes it."""
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": self.name}}
        self.api.request("POST", path("pods", self.namespace, self.name, "eviction"), eviction)

    def stop(self) -> None:
        """What a kubelet does for a pod that is deleted: ends its container, reports that, and lets the pod go."""
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            try:
                if self.object.get("status", {}).get("phase") == "Running":
                    self.exit(self.stop_code, self.stop_message)
                self.api.request("DELETE", path("pods", self.namespace, self.name), {"gracePeriodSeconds": 0})
                return
            except ApiError as error:
                if error.code == 404:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.2)

    def serve(self, progress: Object | bytes | Answer) -> None:
        """Serves /progress at the pod's address: a JSON object, raw bytes, or whatever the function answers."""
        self.stop_serving()
        pod = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pod.requests += 1
                with contextlib.suppress(OSError):
                    if callable(progress):
                        progress(self)
                    else:
                        answer(self, progress if isinstance(progress, bytes) else json.dumps(progress).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer((self.address, names.TRAINER_PORT), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop_serving(self) -> None:
        server, self.server = self.server, None
        if server:
            server.shutdown()
            server.server_close()

    def _containers(self, state: Object, ready: bool = False) -> list[Object]:
        common = {"image": "test", "imageID": "test", "restartCount": 0, "ready": ready, "state": state}
        return [{"name": name, **common} for name in self.containers]

    def _status(self, **status: Any) -> None:
        self.api.patch("pods", self.namespace, self.name, {"status": status}, "status")


def condition(kind: str, value: bool, reason: str = "", message: str = "") -> Object:
    found = {"type": kind, "status": str(value), "lastTransitionTime": now(), "reason": reason, "message": message}
    return {key: content for key, content in found.items() if content}


def answer(handler: BaseHTTPRequestHandler, body: bytes, code: int = 200) -> None:
    handler.send_response(code)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def endless(handler: BaseHTTPRequestHandler, total: int = 1 << 30) -> Iterator[int]:
    """Sends `total` bytes of a JSON string, without a length; yields what was sent so far."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"step": 1, "text": "')
    chunk = b"x" * (1 << 20)
    for sent in range(0, total, len(chunk)):
        handler.wfile.write(chunk)
        yield sent


def _key(pod: Object) -> tuple[str, str]:
    return pod["metadata"]["namespace"], pod["metadata"]["name"]
