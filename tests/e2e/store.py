"""A real S3 server in a namespace of its own: versitygw in a pod, with credentials in a Secret, and a way in from here."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import uuid
from collections.abc import Iterator

from e2e.kubectl import Kubectl, Lines, Object, eventually
from e2e.release import shared_values
from e2e.scene import RESTRICTED, SECONDS
from lab import programs
from nemo_rl.job import names
from ports import free_port

ACCESS = "nemo-rl-tests"
BUCKET = "bucket"
SECRET = "store-credentials"
PORT = 7070
# The program comes over `exec`: the image of the trainers is on every node, and no registry is needed for another one.
START = f"""
mkdir -p /store/data/{BUCKET}
until [ -x /store/versitygw ]; do sleep 0.2; done
exec /store/versitygw --port :{PORT} posix /store/data
"""
RECEIVE = "cat > /store/.versitygw && chmod 755 /store/.versitygw && mv /store/.versitygw /store/versitygw"


class ObjectStore:
    """The server. `open` a namespace for jobs that write to it; `environment` is that of a machine outside the cluster."""

    def __init__(self) -> None:
        programs.ensure(("versitygw",))
        self.namespace = f"e2e-object-store-{uuid.uuid4().hex[:6]}"
        self.secret = uuid.uuid4().hex
        self.kubectl = Kubectl(self.namespace)
        self._forward: Lines | None = None

    @property
    def inside(self) -> str:
        """Its address for pods."""
        return f"http://store.{self.namespace}:{PORT}"

    def start(self) -> ObjectStore:
        metadata = {"name": self.namespace, "labels": {RESTRICTED: "restricted"}}
        Kubectl().apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        self.kubectl.apply(self.credentials(), self._pod(), self._service())
        self.kubectl("wait", "--for=jsonpath={.status.phase}=Running", "pod/store", "--timeout=120s", seconds=130)
        command = [*self.kubectl.prefix, "exec", "-i", "store", "--", "sh", "-c", RECEIVE]
        with open(programs.path("versitygw"), "rb") as program:
            subprocess.run(command, stdin=program, check=True, timeout=SECONDS)
        self.kubectl("wait", "--for=condition=Ready", "pod/store", "--timeout=120s", seconds=130)
        self._reach()
        return self

    def stop(self) -> None:
        if self._forward is not None:
            self._forward.close()
        Kubectl()("delete", "namespace", self.namespace, "--wait=false", check=False)

    def open(self, kubectl: Kubectl) -> None:
        """The Secret with the credentials, and the right of that namespace's trainers to connect to the server.

        Policies add up: where a network plug-in enforces them, the one of the job lets its pods reach public addresses alone.
        """
        components = [names.COMPONENT_TRAINER, names.COMPONENT_FILES]
        expression = {"key": names.LABEL_COMPONENT, "operator": "In", "values": components}
        readers = {"matchExpressions": [expression]}
        to = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}}}
        policy = {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "trainers-to-store"},
            "spec": {
                "podSelector": readers,
                "policyTypes": ["Egress"],
                "egress": [{"to": [to], "ports": [{"port": PORT}]}],
            },
        }
        kubectl.apply(self.credentials(), policy)

    def credentials(self) -> Object:
        """The Secret whose keys become variables of the pods, by envFrom."""
        variables = {"AWS_ENDPOINT_URL": self.inside, "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": self.secret}
        variables["AWS_REGION"] = "us-east-1"
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "stringData": variables}

    @property
    def environment(self) -> dict[str, str]:
        assert self._forward is not None
        variables = dict(self.credentials()["stringData"])
        return variables | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_EC2_METADATA_DISABLED": "true"}

    def _reach(self) -> None:
        self.port = free_port()
        self._forward = Lines(self.kubectl, "port-forward", "pod/store", f"{self.port}:{PORT}", again=True)

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
            return False

        eventually(answers, "the store answers through the port that is forwarded", SECONDS)

    def _pod(self) -> Object:
        image = shared_values()["trainerImage"]
        name = f"{image['repository']}:{image['tag']}" if "tag" in image else f"{image['repository']}@{image['digest']}"
        given = {"ROOT_ACCESS_KEY": "AWS_ACCESS_KEY_ID", "ROOT_SECRET_KEY": "AWS_SECRET_ACCESS_KEY"}
        container = {
            "name": "store",
            "image": name,
            "command": ["sh", "-c", START],
            "env": [
                {"name": variable, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": key}}}
                for variable, key in given.items()
            ],
            "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
            "volumeMounts": [{"name": "store", "mountPath": "/store"}],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        spec = {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": [{"name": "store", "emptyDir": {}}],
        }
        metadata = {"name": "store", "labels": {"app": "store"}}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    def _service(self) -> Object:
        spec = {"selector": {"app": "store"}, "ports": [{"port": PORT}]}
        return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "store"}, "spec": spec}


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    try:
        yield store.start()
    finally:
        store.stop()
